"""The report end to end on small real students: complete, resumed, quick when done, and clear when it cannot be made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from eval import causal, judge, reconstruct, study
from eval.__main__ import main, parse
from eval.config import ReportConfig
from tests.eval.world import write_causal, write_heldout, write_student, write_world

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def recipe(world: Path, output: Path, **change: object) -> Path:
    settings = {
        "output": str(output),
        "systems": {
            "plain": {"student": str(world / "plain"), "temperatures": [0.5, 1.0, 2.0]},
            "noisy": {"student": str(world / "gumbel"), "noise_temperatures": [0.5, 1.0, 2.0]},
            "blind": {"student": str(world / "independent"), "temperatures": [0.5, 1.0, 2.0], "nucleus": 0.9},
        },
        "baseline": "plain", "control": "blind", "heldout": str(world / "heldout"), "judge": str(world / "judge"), "teacher": str(world / "teacher"),
        "nfe": [1, 3], "sequences": 36, "batch": 16, "reconstruction_rows": 20, "replicates": 30, "device": "cpu", "shown": 2,
    }  # fmt: skip
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**settings, **change}, sort_keys=False))
    return path


def run(path: Path, *overrides: str) -> int:
    return main(["report", "--config", str(path), *overrides])


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "out"
    assert run(recipe(world, output)) == 0
    return output


def test_report_holds_every_figure_with_its_interval(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    assert set(report["systems"]) == {"plain", "noisy", "blind"} and report["warnings"] == []
    for system in report["systems"].values():
        assert list(system["nfe"]) == ["1", "3"]
        for at in system["nfe"].values():
            assert len(at["points"]) == 3
            for point in at["points"]:
                assert point["perplexity"]["low"] < point["perplexity"]["value"] < point["perplexity"]["high"]
                assert point["entropy"]["value"] > 0 and point["sequences"] == 36 and 0 <= point["teacher_agreement"] <= 1
    assert [(line["system"], line["against"], line["nfe"]) for line in report["comparisons"]] == [
        ("noisy", "plain", 1), ("noisy", "plain", 3), ("blind", "plain", 1), ("blind", "plain", 3), ("noisy", "blind", 1), ("noisy", "blind", 3),
    ]  # fmt: skip
    assert {name: list(by_nfe) for name, by_nfe in report["reconstruction"].items()} == {name: ["1", "3"] for name in ("plain", "noisy", "blind")}
    assert report["teacher"]["sequences"] == 36 and report["real"]["sequences"] == 36
    assert len(report["shown"]) == 2 and report["shown_nfe"] == 3 and report["shown"][0]["systems"]["noisy"].startswith("w")


def test_page_states_every_verdict_and_shows_the_picture(finished: Path) -> None:
    page, report = (finished / "report.md").read_text(), json.loads((finished / "report.json").read_text())
    assert all(line["sentence"] in page for line in report["comparisons"])
    assert "](report.png)" in page and (finished / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "it is not a likelihood" in page and report["provenance"]["heldout_root_hash"] in page


def test_a_rerun_loads_no_causal_lm_and_samples_nothing(world: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: (finished / name).read_bytes() for name in ("report.json", "report.md", "report.png")}

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("this was done already")

    monkeypatch.setattr(study, "sample", refuse)
    monkeypatch.setattr(reconstruct, "sample", refuse)
    monkeypatch.setattr(causal.CausalLM, "__init__", refuse)
    assert run(recipe(world, finished)) == 0
    assert {name: (finished / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("stop_after", [2, 30])
def test_an_interrupted_report_continues_and_ends_equal(
    world: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = {"sample": 0, "stop": stop_after}
    real_sample = study.sample

    def counted(*args: object, **kwargs: object) -> object:
        if calls["sample"] == calls["stop"]:
            raise KeyboardInterrupt
        calls["sample"] += 1
        return real_sample(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(study, "sample", counted)
    path = recipe(world, tmp_path / "out")
    assert run(path) == 130 and "the same command continues" in capsys.readouterr().err
    calls["stop"] = -1
    assert run(path) == 0
    assert calls["sample"] == 3 * 2 * 3 * 3  # systems, NFE, traced points, batches: none twice
    ours, theirs = (json.loads((folder / "report.json").read_text()) for folder in (tmp_path / "out", finished))
    for report in (ours, theirs):
        del report["settings"]["output"]
    assert ours == theirs


def test_a_student_that_was_trained_again_is_sampled_again(world: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "out")
    shutil.copytree(world / "plain", tmp_path / "plain")
    write_student(tmp_path / "plain", seed=77)
    before = {entry.name for entry in (tmp_path / "out" / "samples").iterdir()}
    path = recipe(world, tmp_path / "out")
    assert run(path, "--systems.plain.student", str(tmp_path / "plain")) == 0
    new = {entry.name for entry in (tmp_path / "out" / "samples").iterdir()} - before
    assert len(new) == 6 and all(name.startswith("plain-nfe") for name in new)


def test_the_judge_that_made_the_noise_and_scarce_real_text_are_said(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(world, tmp_path / "out", judge=str(world / "teacher"), nfe=[1], sequences=50, shown=0)
    assert run(path) == 0
    assert "The judge is the teacher that made the noise" in (tmp_path / "out" / "report.md").read_text()
    out = capsys.readouterr().out
    assert "Only 39 full rows of held-out text for 50 samples" in out and "report.png" in out and "NFE 1: perplexity of noisy / plain" in out


def test_tokens_alone_give_a_report_without_reconstruction(world: Path, tmp_path: Path) -> None:
    write_heldout(tmp_path / "tokens", extraction="none")
    shutil.copytree(world / "heldout" / "tokenizer", tmp_path / "tokens" / "tokenizer")
    path = recipe(world, tmp_path / "out", heldout=str(tmp_path / "tokens"), nfe=[1], teacher="", control="")
    assert run(path) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["reconstruction"] is None and report["teacher"] is None and "Noise to text" not in (tmp_path / "out" / "report.md").read_text()


def test_what_does_not_fit_is_one_clear_line_before_any_work(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_student(tmp_path / "ar", kind="ar")
    write_student(tmp_path / "short", length=5)
    write_causal(tmp_path / "wide", 1, vocab_size=30)
    cases: list[tuple[dict, str]] = [
        ({"systems": {"plain": {"student": str(tmp_path / "ar")}}}, f"{tmp_path / 'ar'} holds a student of kind ar"),
        ({"systems": {"plain": {"student": str(tmp_path / "short")}}}, "block length 5"),
        ({"systems": {"plain": {"student": str(tmp_path / "none")}}}, "is not a student"),
        ({"systems": {"plain": {"student": str(world / "plain"), "noise_temperatures": [0.9]}}}, "takes no noise"),
        ({"systems": {"plain": {"student": str(world / "gumbel"), "temperatures": [0.9]}}}, "do nothing to an argmax"),
        ({"judge": str(tmp_path / "gone")}, f"{tmp_path / 'gone'} does not exist"),
        ({"heldout": str(tmp_path / "gone")}, "is not a noise dataset"),
        ({"nfe": [1, 8]}, "7 unknown ones; lower nfe"),
        ({"teacher": str(tmp_path / "wide")}, "logits 30 wide"),
    ]
    for change, message in cases:
        kept = {} if "systems" not in change else {"control": ""}
        assert run(recipe(world, tmp_path / "out", **{**change, **kept})) == 1
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ") and error.count("\n") == 1, error
        assert not list(tmp_path.glob("out/samples/plain*"))


def test_settings_that_contradict_each_other_are_refused(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for change, message in [
        ({"baseline": "nobody"}, "'nobody', which is not among the systems"),
        ({"control": "plain"}, "baseline and control are both 'plain'"),
        ({"nfe": [2, 2]}, "each once"),
        ({"sequences": 1}, "sequences is 1"),
    ]:
        assert _status(recipe(world, tmp_path / "out", **change)) != 0
        assert message in capsys.readouterr().err


def _status(path: Path) -> int:
    try:
        return run(path)
    except SystemExit as stop:
        return int(stop.code or 0)


def test_an_unknown_key_ends_with_status_2(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _status(recipe(world, tmp_path / "out", temperatur=1.0)) == 2
    assert "temperatur" in capsys.readouterr().err


def test_single_students_are_sampled_judged_and_reconstructed(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--student", str(world / "gumbel"), "--output", str(tmp_path), "--nfe", "3", "--sequences", "20"]
    assert main(["sample", *common]) == 0
    assert "[0] w" in capsys.readouterr().out
    assert main(["perplexity", *common, "--judge", str(world / "judge")]) == 0
    assert "perplexity" in capsys.readouterr().out and len(list((tmp_path / "samples").iterdir())) == 1
    assert main(["reconstruct", "--student", str(world / "gumbel"), "--heldout", str(world / "heldout"), "--nfe", "[1,7]", "--rows", "9"]) == 0
    assert "NFE 7" in capsys.readouterr().out
    assert main(["perplexity", *common]) == 1 and "judge is empty" in capsys.readouterr().err


def test_a_judge_is_loaded_once_for_all_sets(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    original = judge.CausalLM.__init__

    def counting(self: causal.CausalLM, name: str, *rest: str) -> None:
        loaded.append(name)
        original(self, name, *rest)

    monkeypatch.setattr(causal.CausalLM, "__init__", counting)
    assert run(recipe(world, tmp_path / "out", nfe=[1], shown=0)) == 0
    assert sorted(loaded) == sorted([str(world / "judge"), str(world / "teacher")])


def test_the_demos_recipe_is_understood() -> None:
    command, config = parse(["report", "--config", str(RECIPES / "demo_report.yaml"), "--nfe", "[1, 2]", "--systems.mdlm.temperatures", "[1.0]"])
    assert command == "report" and isinstance(config, ReportConfig)
    assert config.nfe == [1, 2] and config.systems["mdlm"].temperatures == [1.0] and config.baseline in config.systems
