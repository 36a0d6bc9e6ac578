"""`python -m eval sample` end to end: every sampler and writer, prompts, counts, interruption, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from eval import tables, writers
from eval.__main__ import main, parse
from eval.config import SampleConfig
from eval.prompts import Prompts
from eval.sample_set import SampleSet, sample_set
from tests.eval.world import LENGTH, VOCAB, write_causal, write_student, write_world
from trainer.config import NoiseConfig, StudentConfig
from trainer.students import build, save_student

KINDS = {
    "even": {"nfe": 3},
    "confidence": {"nfe": 3, "order": "confidence", "top_k": 5},
    "ancestral": {"nfe": 20, "sampler": "ancestral", "nucleus": 0.9},
    "first_hitting": {"sampler": "first_hitting"},
    "adaptive": {"sampler": "adaptive", "student_weight": 0.7},
    "adaptive in view": {"student": "gumbel", "sampler": "adaptive", "lookahead": 3, "recompute": 2},
    "fresh": {"student": "gumbel", "nfe": 3, "fresh_noise": True, "noise_temperature": 0.9},
    "adaptive with noise": {"student": "gumbel", "sampler": "adaptive"},
    "ar student": {"student": "ar", "temperature": 0.8, "length": LENGTH},
    "causal LM": {"student": "judge", "top_k": 4, "length": LENGTH},
    "blocks": {"student": "blocks", "nfe": 2},
    "medusa": {"student": "medusa", "length": LENGTH},
    "mtp": {"student": "mtp", "nfe": 4},
    "mtp with noise": {"student": "mtp", "noise_temperature": 0.9, "order": "left_to_right"},
    "drafted": {"student": "teacher", "drafter": "gumbel", "length": LENGTH},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_world(tmp_path_factory.mktemp("world"))
    write_student(folder / "ar", kind="ar", seed=4)
    write_student(folder / "medusa", kind="medusa", seed=5, noise=NoiseConfig("gumbel", "add", readout=True), backbone=folder / "teacher")
    ahead = build(
        StudentConfig("mtp", layers=2, hidden=16, heads=2, predict=3, context="drawn", noise=NoiseConfig("gumbel", "replace")), VOCAB, LENGTH
    )
    save_student(folder / "mtp", ahead, ahead.state_dict(), {}, {"dataset": str(folder / "heldout")})
    (folder / "near.jsonl").write_text('{"text": "w5 w6 w7 w8 w9"}')
    (folder / "long.jsonl").write_text(json.dumps({"ids": [5] * 9}))
    write_causal(folder / "small", 9, vocab_size=13)
    blocks = build(StudentConfig("bd3lm", layers=2, hidden=16, heads=2, block_size=3), VOCAB, LENGTH)
    save_student(folder / "blocks", blocks, blocks.state_dict(), {}, {"dataset": str(folder / "heldout")})
    lines = [{"text": "w5 w6"}, {"text": ["w7 ", 2, " w8"]}, {"ids": [9, None, None, 10], "length": LENGTH}, {"ids": [None] * 7}]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "prefixes.jsonl").write_text('{"text": "w5 w6"}\n{"text": "w7", "length": 5}')
    return folder


def config(world: Path, output: Path, **settings: object) -> SampleConfig:
    settings = {"student": "plain", "sequences": 11, "device": "cpu", **settings}
    if settings.get("sampler") == "adaptive":
        settings["auxiliary"] = str(world / "judge")
    if settings.get("drafter"):
        settings["drafter"] = str(world / str(settings["drafter"]))
    return SampleConfig(**{**settings, "student": str(world / str(settings["student"])), "output": str(output)})  # type: ignore[arg-type]


def equal(ours: SampleSet, theirs: SampleSet) -> bool:
    return all(np.array_equal(ours.columns[name], theirs.columns[name]) for name in ("sequence_id", "input_ids", "length", "nfe"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_set_is_the_same_at_any_batch_size_and_after_an_interruption(
    world: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {"ar": "Causal", "judge": "Causal", "blocks": "Block", "medusa": "Medusa", "teacher": "Drafted"}
    writes = kinds.get(str(KINDS[kind].get("student")), "Masked")
    fills = writes in ("Block", "Masked") and KINDS[kind].get("student") != "mtp"
    settings = {**KINDS[kind], "prompts": str(world / ("prompts.jsonl" if fills else "prefixes.jsonl"))}
    whole = sample_set(config(world, tmp_path / "a", **settings))
    writer = getattr(writers, f"{writes}Writer")
    real, calls = writer.__call__, []

    def stopping(self: object, *given: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *given)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(writer, "__call__", stopping)
        with pytest.raises(KeyboardInterrupt):
            sample_set(config(world, tmp_path / "b", batch=2, **settings))
    resumed = sample_set(config(world, tmp_path / "b", batch=3, **settings))
    assert resumed.path.name == whole.path.name and equal(whole, resumed)
    assert not list(resumed.path.parent.glob("*.parts"))


@pytest.mark.parametrize("kind", ["even", "ancestral", "first_hitting", "adaptive", "adaptive with noise"])
def test_given_tokens_stay_and_blanks_are_filled_to_each_rows_length(world: Path, tmp_path: Path, kind: str) -> None:
    drawn = sample_set(config(world, tmp_path, **KINDS[kind], prompts=str(world / "prompts.jsonl")))
    ids, length, nfe = (drawn.columns[name] for name in ("input_ids", "length", "nfe"))
    given = np.array([[0, 5, 6, -1, -1, -1, -1, -1], [0, 7, -1, -1, 8, 0, 0, 0], [0, 9, -1, -1, 10, -1, -1, -1], [0] + [-1] * 7])[np.arange(11) % 4]
    assert length.tolist() == ([8, 5, 8, 8] * 3)[:11] and ids.max() < 24 and (ids >= 0).all()
    assert np.array_equal(ids[given >= 0], given[given >= 0])
    blanks = (given == -1).sum(1)
    expected = {"even": np.minimum(3, blanks), "first_hitting": blanks}
    assert np.array_equal(nfe, expected[kind]) if kind in expected else ((nfe >= 1) & (nfe <= blanks)).all()
    assert len(np.unique(ids, axis=0)) > 4


def test_an_mtp_student_makes_as_few_forwards_as_its_blanks_take(world: Path, tmp_path: Path) -> None:
    for settings, forwards in [({}, 3), ({"length": 4}, 1), ({"length": 5}, 2), ({"prompts": str(world / "near.jsonl")}, 1)]:
        drawn = sample_set(config(world, tmp_path, student="mtp", **settings))
        assert (drawn.columns["nfe"] == forwards).all() and f"even-nfe{forwards}-" in drawn.path.name and drawn.asked == forwards
    with pytest.raises(ValueError, match="give at least 3"):  # told the prompts, before any forward
        writers.writer(config(world, tmp_path, student="mtp", nfe=2)).prepare(Prompts.bare(0, LENGTH))


def test_a_causal_lm_continues_prefixes_and_counts_a_forward_a_token(world: Path, tmp_path: Path) -> None:
    drawn = sample_set(config(world, tmp_path, student="ar", prompts=str(world / "prefixes.jsonl"), sequences=6))
    assert drawn.columns["length"].tolist() == [8, 5] * 3 and drawn.columns["nfe"].tolist() == [5, 3] * 3
    ids = drawn.columns["input_ids"]
    assert (ids[::2, :3] == [0, 5, 6]).all() and (ids[1::2, :2] == [0, 7]).all() and not ids[1::2, 5:].any()


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.3}, {"top_k": 1}, {"nucleus": 0.8, "length": 6}])
def test_medusa_heads_write_their_backbones_own_samples_at_any_batch_size_in_no_more_calls(world: Path, tmp_path: Path, settings: dict) -> None:
    settings = {**settings, "prompts": str(world / "prefixes.jsonl"), "sequences": 30}
    alone = sample_set(config(world, tmp_path, **{"length": LENGTH, **settings}, student="teacher"))
    drafted = sample_set(config(world, tmp_path / "a", **settings, student="medusa"))
    assert all(np.array_equal(drafted.columns[name], alone.columns[name]) for name in ("input_ids", "length"))
    assert (drafted.columns["nfe"] <= alone.columns["nfe"]).all() and drafted.columns["nfe"].sum() < alone.columns["nfe"].sum()
    assert equal(drafted, sample_set(config(world, tmp_path / "b", **settings, student="medusa", batch=7)))


@pytest.mark.parametrize("drafter", ["plain", "gumbel", "blocks", "medusa", "judge", "ar"])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.3, "packed": True}, {"nucleus": 0.8, "length": 6, "block": 2}])
def test_a_causal_lm_writes_its_own_samples_whoever_drafts(world: Path, tmp_path: Path, drafter: str, settings: dict) -> None:
    settings = {"length": LENGTH, **settings, "prompts": str(world / "prefixes.jsonl"), "sequences": 30, "student": "teacher"}
    alone = sample_set(config(world, tmp_path, **{name: value for name, value in settings.items() if name != "block"}))
    drafted = sample_set(config(world, tmp_path / "a", **settings, drafter=drafter))
    assert all(np.array_equal(drafted.columns[name], alone.columns[name]) for name in ("input_ids", "length"))
    assert (drafted.columns["nfe"] <= alone.columns["nfe"]).all() and drafted.columns["nfe"].sum() < alone.columns["nfe"].sum()
    assert equal(drafted, sample_set(config(world, tmp_path / "b", **settings, drafter=drafter, batch=7)))


def test_a_shorter_length_is_a_shorter_row_and_bare_rows_are_a_thousand(world: Path, tmp_path: Path) -> None:
    assert sample_set(config(world, tmp_path, nfe=2, length=5)).columns["input_ids"].shape == (11, 5)
    assert sample_set(config(world, tmp_path, nfe=1, length=3, sequences=0)).columns["input_ids"].shape == (1024, 3)
    assert len(sample_set(config(world, tmp_path, nfe=1, sequences=0, prompts=str(world / "prompts.jsonl"))).columns["nfe"]) == 4


def test_every_setting_that_decides_tokens_names_another_set_and_batch_does_not(world: Path, tmp_path: Path) -> None:
    common = {"student": "gumbel", "nfe": 2, "sequences": 2, "choose": "sample"}
    changes: list[dict] = [
        {}, {"nfe": 3}, {"temperature": 0.9}, {"noise_temperature": 0.9}, {"nucleus": 0.9}, {"top_k": 3}, {"order": "left_to_right"},
        {"sampler": "ancestral"}, {"fresh_noise": True}, {"choose": "argmax"}, {"seed": 2}, {"bos": 3}, {"length": 7}, {"sequences": 3},
        {"prompts": str(world / "prompts.jsonl")}, {"prompts": str(world / "prefixes.jsonl")}, {"sampler": "adaptive", "nfe": 0},
        {"sampler": "adaptive", "nfe": 0, "student_weight": 0.6}, {"sampler": "adaptive", "nfe": 0, "lookahead": 2},
        {"sampler": "adaptive", "nfe": 0, "recompute": 2}, {"student": "plain"}, {"student": "judge", "nfe": 0, "length": 8},
        {"student": "judge", "nfe": 0, "length": 8, "packed": True}, {"student": "judge", "nfe": 0, "drafter": str(world / "plain")},
        {"student": "judge", "nfe": 0, "drafter": str(world / "plain"), "block": 2}, {"student": "judge", "nfe": 2, "drafter": str(world / "plain")},
    ]  # fmt: skip
    paths = [sample_set(config(world, tmp_path, **{**common, **change})).path for change in changes]
    assert len(set(paths)) == len(changes)
    assert sample_set(config(world, tmp_path, **common, batch=1)).path == paths[0]
    _, request = tables.read(paths[0])
    assert request["seed"] == "1" and "batch" not in json.dumps(request) and str(tmp_path) not in json.dumps(request)


def test_the_command_shows_texts_and_the_forwards_made(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--student", str(world / "plain"), "--output", str(tmp_path), "--sequences", "30", "--device", "cpu"]
    assert main(["sample", *common, "--sampler", "ancestral", "--nfe", "50", "--prompts", str(world / "prompts.jsonl"), "--shown", "2"]) == 0
    out = capsys.readouterr().out
    assert "[0] w5 w6 w" in out and "[1] w7 w" in out and "[2]" not in out
    assert "a sequence (" in out and ", 50 asked for" in out and ".arrow" in out
    assert main(["perplexity", *common, "--sampler", "adaptive", "--auxiliary", str(world / "teacher"), "--judge", str(world / "judge")]) == 0
    assert "perplexity" in capsys.readouterr().out


def test_help_teaches_the_samplers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(["sample", "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    for taught in ("--sampler adaptive --auxiliary SMALL_LM", '{"text": ["The old man ", 3, " the sea."]}', "forwards that were really made"):
        assert taught in out


def test_what_does_not_fit_is_one_clear_line(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "nothing").mkdir()
    cases: list[tuple[str, dict, str]] = [
        ("plain", {"length": 9}, "rows of 2 to 8 positions"),
        ("plain", {"nfe": 8}, "no row has more than 7 unknown positions"),
        ("plain", {"sampler": "adaptive"}, "adaptive needs a small causal LM"),
        ("plain", {"nfe": 2, "auxiliary": str(world / "judge")}, "the others take none"),
        ("plain", {"sampler": "first_hitting", "nfe": 2}, "its own order and number of forwards"),
        ("plain", {"fresh_noise": "true", "nfe": 2}, "takes no noise"),
        ("plain", {"nfe": 2, "bos": 24}, "BOS is 24"),
        ("gumbel", {"nfe": 2, "temperature": 0.5}, "set output (of sample and perplexity: choose) to sample"),
        ("plain", {"nfe": 2, "temperature": 0}, "set output (of sample and perplexity: choose) to argmax"),
        ("plain", {"lookahead": 4, "nfe": 2}, "sampler even does not write from left to right"),
        ("ar", {"nfe": 4}, "nfe is 4, but"),
        ("ar", {"recompute": 4}, "recompute is 4, but"),
        ("mtp", {"nfe": 2}, "the student writes at most 3 tokens a forward, and a row has 7 unknown ones; give at least 3"),
        ("mtp", {"order": "confidence"}, "order confidence, but an mtp student writes from left to right, in even groups; drop them"),
        ("mtp", {"sampler": "first_hitting"}, "sampler is first_hitting and order random, but an mtp student"),
        ("mtp", {"sampler": "ancestral"}, "an mtp student writes from left to right"),
        ("mtp", {"prompts": str(world / "prompts.jsonl")}, "a row has tokens after its first unknown one"),
        ("medusa", {"nfe": 4}, "which fill no masks"),
        ("medusa", {"choose": "argmax"}, "or take the backbone itself, "),
        ("teacher", {"choose": "argmax", "drafter": str(world / "plain")}, "set top_k to 1, or drop drafter"),
        ("teacher", {"nfe": 2, "drafter": str(world / "medusa")}, "is medusa, which takes what it takes"),
        ("teacher", {"block": 2}, "block is 2, but nobody drafts"),
        ("teacher", {"block": 0, "drafter": str(world / "plain")}, "block is 0; it must be at least 1"),
        ("teacher", {"nfe": -1, "drafter": str(world / "plain")}, "nfe is -1; it must be at least 0"),
        ("teacher", {"length": 20, "drafter": str(world / "plain")}, f"length is 20, and {world / 'plain'} takes rows of 2 to 8 positions"),
        (
            "teacher",
            {"drafter": str(world / "plain"), "prompts": str(world / "long.jsonl")},
            f"room for 7 ({world / 'plain'} takes rows of at most 8)",
        ),
        ("blocks", {"block": 8}, "block 8, but"),
        ("blocks", {"eos": 3, "packed": "true"}, "is no causal LM alone"),
        ("teacher", {"order": "confidence", "drafter": str(world / "plain")}, "order is confidence, but"),
        ("teacher", {"drafter": str(world / "small")}, "has another vocabulary than the teacher"),
        ("plain", {"packed": "true"}, "is no causal LM alone"),
        ("blocks", {"drafter": str(world / "plain")}, "is no causal LM alone"),
        ("medusa", {"drafter": str(world / "plain")}, "is no causal LM alone"),
        ("ar", {"order": "confidence"}, "order is confidence, but"),
        ("ar", {"prompts": str(world / "prompts.jsonl")}, "tokens after its blanks"),
        ("heldout", {}, "is neither a student"),
    ]
    for student, change, message in cases:
        options = [part for name, value in change.items() for part in (f"--{name}", str(value))]
        assert main(["sample", "--student", str(world / student), "--output", str(tmp_path / "out"), "--device", "cpu", *options]) == 1, message
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ") and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()
