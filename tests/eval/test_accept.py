"""`python -m eval accept`: what it counts, writes, finds again, lists and refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import eval.accept
from eval import tables
from eval.__main__ import main, parse
from eval.accept import build as build_accept
from eval.accept_figures import figures
from eval.causal import CausalLM
from eval.config import AcceptConfig
from eval.exact import write_dataset
from eval.given import given_noise
from eval.markov import MarkovTeacher
from eval.metrics import bootstrap_weights
from eval.prompts import BLANK
from noise.storage import DatasetError, read_json
from pipeline.tokenizer import tokenizer_hash
from tests.eval.test_speculative import EVERYTHING, INPUT, KNOWN, L, V, student
from tests.eval.world import write_causal, write_tokenizer
from tests.trainer.chain import write_chain
from trainer.config import NoiseConfig
from trainer.students import save_student


def write_markov(folder: Path, chain: MarkovTeacher) -> None:
    """The chain as a Hugging Face model: one-hot embeddings, layers that add nothing, and an output layer of log-probs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    V, H = chain.vocab_size, chain.vocab_size + chain.vocab_size % 2
    shape = {"hidden_size": H, "intermediate_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1, "rms_norm_eps": 1e-12}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, max_position_embeddings=64, tie_word_embeddings=False, **shape))
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(V, H))
        model.lm_head.weight.copy_(torch.nn.functional.pad(chain.log_p.clamp_min(-60).T, (0, H - V)) / H**0.5)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    model.save_pretrained(folder)


def save(folder: Path, module: Any, tokenizer: str = "") -> None:
    identity = {"tokenizer": {"sha256": tokenizer}} if tokenizer else {}
    save_student(folder, module, module.own_state(), {}, {"identity": identity, "dataset": "", "root_hash": ""})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """teacher/: a Markov chain; heldout/: its text and noise; masked/, noisy/, heads/, blocks/: students; small/: another causal LM."""
    folder = tmp_path_factory.mktemp("world")
    chain = MarkovTeacher(states=V - 1)
    write_markov(folder / "teacher", chain)
    write_tokenizer(folder / "teacher", V)
    write_dataset(folder / "heldout", chain, 12, L, 3)
    write_causal(folder / "small", 2, vocab_size=V)
    save(folder / "masked", student(folder, "mdlm"), tokenizer_hash(folder / "teacher"))
    save(folder / "noisy", student(folder, "mdlm", EVERYTHING))
    save(folder / "reads", student(folder, "mdlm", KNOWN))
    save(folder / "control", student(folder, "mdlm", NoiseConfig("independent", "replace", known=True)))
    save(folder / "heads", student(folder, "medusa", INPUT, backbone="teacher"))
    save(folder / "blocks", student(folder, "bd3lm", block_size=4))
    return folder


def settings_of(world: Path, output: Path, *students: str, **settings: Any) -> dict[str, Any]:
    names = [str(world / name) for name in students]
    usual = {"teacher": str(world / "teacher"), "output": str(output), "device": "cpu", "replicates": 20, "block": 3}
    return {"student": names[0] if len(names) == 1 else names, **usual, **settings}


def accept(world: Path, output: Path, *students: str, **settings: Any) -> dict[str, Any]:
    build_accept(AcceptConfig(**settings_of(world, output, *students, **settings)))
    return read_json(output / "accept.json")


def test_the_command_counts_calls_writes_the_teachers_samples_and_finds_its_work_again(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    students = ("masked", "noisy", "heads", "blocks", "small")
    settings = {"dtype": "float64", "sequences": 7, "batch": 3, "temperature": 0.9}
    found = accept(world, tmp_path, *students, **settings)
    columns, _ = tables.read(Path(found["samples"]))
    expected = CausalLM(str(world / "teacher"), dtype="float64").sample(0, L, torch.arange(7), 1, 0.9)
    assert torch.equal(torch.from_numpy(columns["input_ids"]).long(), expected)
    both = [(name, rule) for name in students for rule in (("shared noise",) if name in ("noisy", "heads") else ("shared noise", "rejection"))]
    assert [(system["name"], system["rule"]) for system in found["systems"]] == both
    for at, system in enumerate(found["systems"], start=1):
        calls, stood = columns[f"{at}/calls"].sum(), columns[f"{at}/stands"].sum()
        assert calls + stood == 7 * (L - 1)
        assert system["tokens_per_call"]["value"] == pytest.approx(7 * (L - 1) / calls)
        assert system["accepted_per_call"]["value"] == pytest.approx(stood / calls)
        assert sum(line["rows"] * line["drafted"]["value"] for line in system["positions"]) == pytest.approx(stood)
        first, second = system["heads"][:2]
        assert second["conditional"]["value"] >= second["acceptance"]["value"] and first["conditional"] == first["acceptance"]
        assert system["speed"]["value"] == pytest.approx(columns["seconds"].sum() / columns[f"{at}/seconds"].sum())
        assert system["rule"] == "rejection" or system["divergence"]["rows"] == 0
    assert found["systems"][both.index(("heads", "shared noise"))]["drafter_calls_per_call"]["value"] == 0
    arguments = [part for key, value in settings_of(world, tmp_path, *students, **settings).items() for part in (f"--{key}", str(value))]
    assert main(["accept", *arguments]) == 0 and read_json(tmp_path / "accept.json") == found
    assert f"{found['systems'][0]['tokens_per_call']['value']:.2f} (" in capsys.readouterr().out


def test_rows_of_a_dataset_come_out_as_its_text(world: Path, tmp_path: Path) -> None:
    found = accept(world, tmp_path, "noisy", "heads", rows=str(world / "heldout"), sequences=20, batch=4)
    assert found["rows_that_are_the_datasets_text"] == found["settings"]["sequences"] == 12
    assert [system["divergence"]["rows"] for system in found["systems"]] == [0, 0]


def test_prompts_are_continued_to_their_own_lengths(world: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"text": "w5 w7"}\n{"ids": [3], "length": 6}\n')
    found = accept(world, tmp_path, "blocks", prompts=str(tmp_path / "prompts.jsonl"), length=9, batch=2)
    columns, _ = tables.read(Path(found["samples"]))
    assert columns["tokens"].tolist() == [6, 4] and columns["input_ids"][:, :2].tolist() == [[0, 5], [0, 3]]
    assert not columns["input_ids"][1, 6:].any() and found["systems"][0]["divergence"]["rows"] == 0


def test_prompts_carry_posterior_noise_where_it_is_asked_for_and_its_call_is_counted(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"text": "w5 w7 w2"}\n{"ids": [3, 4], "length": 9}\n{"ids": [null, null]}\n')
    settings = {"prompts": str(tmp_path / "prompts.jsonl"), "length": 11, "sequences": 30, "batch": 4, "dtype": "float64"}
    real, handed = eval.accept.speculate, []

    def noted(*given: Any) -> Any:
        handed.append(given)
        return real(*given)

    monkeypatch.setattr(eval.accept, "speculate", noted)
    silent, told = (accept(world, tmp_path, "reads", "noisy", given_noise=given, **settings) for given in (False, True))
    assert silent["samples"] != told["samples"]
    for _, drafter, _, given_BP, given_B, _, _, noise in handed[-2:]:
        if drafter.student.noise.known:
            blank_BP = torch.arange(given_BP.shape[1]) >= given_B[:, None]
            number_B = torch.arange(28, 30)
            expected = given_noise(
                CausalLM(str(world / "teacher"), dtype="float64"), 1.0, given_BP.masked_fill(blank_BP, BLANK), number_B, told["settings"]["seed"]
            )
            assert expected is not None and torch.equal(noise.where_K, expected.where_K) and torch.equal(noise.g_KV, expected.g_KV)
        else:
            assert noise is None
    columns, _ = tables.read(Path(told["samples"]))
    before, _ = tables.read(Path(silent["samples"]))
    assert np.array_equal(columns["input_ids"], before["input_ids"]) and told["settings"]["given_noise"] is True
    assert [system["divergence"]["rows"] for system in told["systems"]] == [0, 0]
    assert columns["1/calls"].sum() + columns["1/stands"].sum() == columns["tokens"].sum() + 20  # two of three prompts have tokens behind BOS
    alone = accept(world, tmp_path / "alone", "reads", given_noise=True, **{**settings, "batch": 1})
    assert np.array_equal(tables.read(Path(alone["samples"]))[0]["1/calls"], columns["1/calls"])
    assert not np.array_equal(columns["1/stands"], before["1/stands"])
    assert all(np.array_equal(columns[f"2/{name}"], before[f"2/{name}"]) for name in ("calls", "stands"))  # this one reads none
    with pytest.raises(ValueError, match="no student reads the posterior noise of known tokens"):
        accept(world, tmp_path / "c", "noisy", "small", "control", given_noise=True, **settings)
    assert (
        accept(world, tmp_path / "d", "reads", "control", given_noise=True, **settings)["systems"][0]["tokens_per_call"]
        == told["systems"][0]["tokens_per_call"]
    )
    with pytest.raises(ValueError, match="prompts is empty"):
        accept(world, tmp_path / "c", "reads", given_noise=True)


def test_texts_that_differ_are_near_ties_that_are_listed_or_an_error_or_in_half_precision_a_rate() -> None:
    lengths = {"given": [1, 1, 1], "length": [5, 5, 5], "tokens": [4, 4, 4], "seconds": [1.0, 1.0, 1.0]}
    own = {"calls": [2, 2, 2], "drafter_calls": [2, 2, 2], "offered": [[1]] * 3, "head": [[0, 1, 0, 0, 0]] * 3, "stands": [[0, 1, 0, 0, 0]] * 3}
    own |= {"seconds": [2.0, 2.0, 2.0], "differs_at": [0, 3, 0], "gap": [0.0, 5e-5, 0.0]}
    columns = {**lengths, **{f"1/{name}": values for name, values in own.items()}}
    made = {name: np.array(values) for name, values in columns.items()}
    weights = bootstrap_weights(3, 20, 1)
    divergence = figures([("s", "shared noise")], made, weights, "float32", 1e-4)["systems"][0]["divergence"]
    assert divergence == {"rows": 1, "of": 3, "a_token": 1 / 11, "near_ties": ["sequence 1, position 3: 5.0e-05 apart in log p + g"]}
    with pytest.raises(DatasetError, match=r"sequence 1, position 3: 5.0e-05 apart in log p \+ g, which is no near tie in float64"):
        figures([("s", "shared noise")], made, weights, "float64", 0.0)
    assert figures([("s", "shared noise")], made, weights, "bfloat16", None)["systems"][0]["divergence"] == {**divergence, "near_ties": []}


def test_half_precision_writes_and_reports(world: Path, tmp_path: Path) -> None:
    found = accept(world, tmp_path, "small", dtype="bfloat16", sequences=60, length=L, block=3)
    columns, _ = tables.read(Path(found["samples"]))
    at_S = columns["1/differs_at"]
    divergence = found["systems"][0]["divergence"]
    assert divergence["of"] == 60 and divergence["rows"] == (at_S > 0).sum()
    before = np.where(at_S > 0, at_S - 1, L - 1).sum()  # tokens that are equal, up to each row's first difference
    assert divergence["a_token"] == pytest.approx((at_S > 0).sum() / (before + (at_S > 0).sum()))


def test_help_teaches_what_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(["accept", "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    for taught in ("--student '[MDLM, MEDUSA, BD3LM, SMALL_LM]'", "exactly what the teacher alone writes from that noise", "--rows DATASET"):
        assert taught in out


def test_what_does_not_fit_is_one_clear_line(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "other-tokens", student(world, "mdlm"), "ab" * 32)
    save(tmp_path / "narrow", student(world, "mdlm", vocab_size=V - 1))
    write_chain(tmp_path / "silent", 4, L, extraction="none")
    write_chain(tmp_path / "wide", 4, L, vocab_size=V + 1)
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (tmp_path / "narrow", {}, f"vocab_size: {V - 1} here, {V} there"),
        (tmp_path / "other-tokens", {}, "tokenizer.sha256: 'abab"),
        (world / "masked", {"length": 12}, "rows have 12 positions, and"),
        (world / "masked", {"length": 1}, "length is 1"),
        (world / "masked", {"rows": str(tmp_path / "silent")}, "tokens but no noise"),
        (world / "masked", {"rows": str(tmp_path / "wide")}, f"vocab_size is {V + 1} there, {V} of the teacher"),
        (world / "masked", {"rows": str(world / "heldout"), "temperature": 0.5}, "temperature is 0.5, but the dataset"),
        (world / "masked", {"sight": 2}, "sight is 2, less than the 4 tokens"),
        (world / "small", {"nfe": 2}, "nfe is 2, which only students of kind mdlm and bd3lm read"),
        (world / "heads", {"sight": 8}, "sight is 8, which only students of kind mdlm read"),
        (world / "masked", {"block": 0}, "block is 0"),
        (world / "masked", {"bos": V}, f"BOS is {V}"),
    ]
    for student_, change, message in cases:
        with pytest.raises(ValueError, match=re.escape(message)):
            build_accept(AcceptConfig(**{**settings_of(world, tmp_path / "out"), "block": 4, "student": str(student_), **change}))
    arguments = ["--student", str(tmp_path / "narrow"), "--teacher", str(world / "teacher"), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["accept", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and f"vocab_size: {V - 1} here, {V} there" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
