"""Benchmarks run through their real functions on small inputs; what they count is checked by hand."""

from __future__ import annotations

import json
import math
import platform
from pathlib import Path

import pytest
import torch

from benchmarks import codec, floor, layout, teachers
from benchmarks.rows import simulated
from noise.shard import Layout
from noise.sketch import Codec, encode
from tests.noise.teachers import BigramTeacher, write_dataset

SMALL = ["--vocab_size", "400", "--positions", "48", "--block_length", "33", "--epsilons", "[0.0625,0.125]", "--draws", "[3]", "--top_k", "[8,500]"]


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The JSON of one small run of the command."""
    output = tmp_path_factory.mktemp("codec") / "codec.json"
    assert codec.main([*SMALL, "--output", str(output)]) == 0
    return json.loads(output.read_text())


def rows(printed: dict, kind: str) -> list[dict]:
    return [row for row in printed["teachers"]["simulated"]["codecs"] if row["codec"] == kind]


def test_every_codec_that_fits_the_vocabulary_is_in_the_table(printed: dict) -> None:
    assert [(row["epsilon"], row["draws"]) for row in rows(printed, "sketch")] == [(0.0625, 1), (0.125, 1), (0.125, 3)]
    assert [(row["k"], row["tail"]) for row in rows(printed, "top-k")] == [(8, "even"), (8, "unigram")]
    assert [row["bytes"] for row in rows(printed, "dense fp16")] == [804]


def test_sketches_read_back_from_their_shard_keep_their_bounds(printed: dict) -> None:
    for row in rows(printed, "sketch"):
        assert row["worst_error"] <= row["epsilon"] + 1e-5
        assert row["total_variation"] <= row["worst_total_variation"] <= math.tanh((row["epsilon"] + min(row["epsilon"], 0.125)) / 4)
        assert row["expected_kept"] <= row["bound_kept"]
        assert row["kept"] == pytest.approx(row["expected_kept"], rel=0.5)


def test_a_shard_holds_what_the_format_says_and_a_few_kilobytes_of_headers(printed: dict) -> None:
    for row in rows(printed, "sketch"):
        assert 0 < (row["bytes"] - row["format_bytes"]) * 64 * 32 < 8192


def test_an_ideal_coder_pays_less_than_the_format(printed: dict) -> None:
    for row in rows(printed, "sketch"):
        for ideal in row["ideal_bits"].values():
            assert 0 < ideal["which"] + ideal["codes"] < 8 * row["entry_bytes"]


@pytest.mark.parametrize("vocab_size", [400, 70_000])
def test_every_layout_gives_the_rows_back_and_those_of_the_format_have_its_columns(vocab_size: int, tmp_path: Path) -> None:
    small = ["--distributions", "64", "--positions", "4", "--block_length", "9", "--repeats", "1", "--vocab_size", str(vocab_size)]
    assert layout.main([*small, "--output", str(tmp_path / "layout.json")]) == 0  # it compares what it reads with what it wrote
    found = json.loads((tmp_path / "layout.json").read_text())["rows"]["simulated"]
    sizes = {row["name"]: row["bytes"] for row in found["layouts"]}
    taken = next(row for row in found["layouts"] if "(version 2)" in row["name"])
    columns = Layout.of(codec.metadata_of(Codec(vocab_size), 9))
    assert (taken["input_ids"], taken["kept"]) == (str(columns.input_ids), str(columns.kept))
    assert taken["entries"] == ("packed" if list(columns.entries) == ["entry"] else "columns")
    assert taken["bytes"] == min(size for name, size in sizes.items() if name in ("version 1", "narrow ids and counts", taken["name"]))
    assert taken["held"] == 0 and all(row["shuffled"] > 0 and row["once"] > 0 for row in found["layouts"])


def test_rows_drawn_from_the_law_of_the_sketch_keep_as_many_entries_as_the_theorem_says() -> None:
    sketch = Codec(300, 0.125, 3)
    made = simulated(sketch, block_length=200, distributions=64, seed=1)
    log_probs_NV = teachers.simulated(300, 64, 1, seed=2).log_probs_NV.double()
    moved_NV = -torch.expm1(-3 * torch.log1p(log_probs_NV.exp() / sketch.c))
    expected = float((moved_NV * (1 - log_probs_NV.exp())).sum(1).mean())  # the token, drawn from p, is left out
    assert len(made.index) / (64 * 199) == pytest.approx(expected, rel=0.05)


def test_results_say_when_and_on_what_and_name_no_machine(printed: dict) -> None:
    assert {"date", "hardware", "versions", "settings"} <= set(printed)
    assert printed["hardware"]["processor"]
    text = json.dumps(printed)
    assert platform.node() not in text and str(Path.cwd()) not in text and "output" not in printed["settings"]


def test_ideal_coder_pays_the_binary_entropy_of_one_entry_in_v() -> None:
    """One likely entry a position, anywhere: log2 V + log2 e bits to say which, none for its code."""
    vocab_size, positions = 256, 512
    log_probs_NV = torch.full((positions, vocab_size), -20.1)
    log_probs_NV[torch.arange(positions), torch.randint(1, vocab_size, (positions,), generator=torch.Generator().manual_seed(0))] = -0.05
    beliefs = floor.Beliefs.learn(log_probs_NV, torch.zeros(vocab_size, dtype=torch.int64))
    nats_NV = torch.full((positions, vocab_size), 10.0, dtype=torch.float64)
    which, codes = floor.bits(log_probs_NV, torch.zeros(positions, dtype=torch.int64), nats_NV, Codec(vocab_size), beliefs)
    expected = math.log2(vocab_size) - (vocab_size - 2) * math.log2(1 - 1 / vocab_size)
    assert which / positions == pytest.approx(expected, rel=0.01)
    assert codes / positions == pytest.approx(1, rel=0.1)  # beliefs are flat within a bin of two codes


def test_thresholds_name_the_entries_that_the_sketch_keeps() -> None:
    source = teachers.simulated(300, 40, 1, seed=5)
    config = Codec(300, 0.125, 3)
    places_N5 = codec._places(40, codec.Config(block_length=16, seed=5))
    kept_NV = -source.log_probs_NV < floor.thresholds(places_N5, config)
    kept_NV[torch.arange(40), source.token_N] = False
    assert torch.equal(kept_NV.nonzero()[:, 1], encode(source.log_probs_NV, source.token_N, places_N5, config).index_K)


def test_a_causal_lm_is_measured_on_a_dataset_of_its_own_vocabulary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=40, max_position_embeddings=16, **shape)).save_pretrained(tmp_path / "teacher")
    write_dataset(tmp_path / "data", BigramTeacher(40), Codec(40), [40, 30])
    given = ["--teacher", str(tmp_path / "teacher"), "--dataset", str(tmp_path / "data"), "--output", str(tmp_path / "codec.json")]
    assert codec.main([*SMALL, *given, "--teacher_positions", "60"]) == 0
    found = json.loads((tmp_path / "codec.json").read_text())["teachers"]["real"]
    assert found["vocab_size"] == 40 and found["positions"] == 60 and len(found["teacher"]["weights_sha256"]) == 64
    assert str(tmp_path) not in (tmp_path / "codec.json").read_text()

    capsys.readouterr()
    assert codec.main([*SMALL, *given, "--teacher_positions", "5000"]) == 1
    assert "10000 are asked for; lower --teacher_positions" in capsys.readouterr().err
    assert codec.main([*SMALL, *given[:2]]) == 1
    assert "give both or neither" in capsys.readouterr().err
