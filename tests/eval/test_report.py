"""The report end to end on small real students: complete, resumed, quick when done, and clear when it cannot be made."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from eval import causal, features, reconstruct, systems
from eval.__main__ import parse
from eval.config import ReportConfig
from eval.report import _interval_at
from tests.eval.reports import recipe, run
from tests.eval.world import LENGTH, VOCAB, write_blocks, write_causal, write_heldout, write_student, write_world
from trainer.config import NoiseConfig, StudentConfig
from trainer.students import build, save_student

PAGES = ("report.json", "report.md", "report.html", "report.png")
RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def write_ahead(folder: Path, context: str = "drawn") -> None:
    """A student of two tokens a call; with context row it has learnt the last ones of its rows alone, and writes no row by itself."""
    student = build(StudentConfig(kind="mtp", layers=1, hidden=16, heads=2, predict=2, context=context), VOCAB, LENGTH)  # type: ignore[arg-type]
    save_student(folder, student, student.state_dict(), {}, {})


def write_medusa(folder: Path, world: Path) -> None:
    write_student(folder, kind="medusa", seed=5, noise=NoiseConfig("gumbel", "add", readout=True), backbone=world / "teacher")


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
            assert len(at["points"]) == 4
            for point in at["points"]:
                assert point["perplexity"]["low"] < point["perplexity"]["value"] < point["perplexity"]["high"]
                assert point["entropy"]["value"] > 0 and point["sequences"] == 36 and 0 <= point["teacher_agreement"] <= 1
                for name in ("sequence_entropy", "distinct_1", "distinct_2", "repeated_2", "repeated_4", "looped"):
                    assert 0 <= point[name]["low"] <= point[name]["value"] <= point[name]["high"]
                assert 0 <= point["length"]["mean"]["value"] <= 7 and point["length"]["quantiles"]["95%"] <= 7
    assert [(line["system"], line["against"], line["nfe"]) for line in report["comparisons"]] == [
        ("noisy", "plain", 1), ("noisy", "plain", 3), ("blind", "plain", 1), ("blind", "plain", 3), ("noisy", "blind", 1), ("noisy", "blind", 3),
    ]  # fmt: skip
    assert {name: list(by_nfe) for name, by_nfe in report["reconstruction"].items()} == {name: ["1", "3"] for name in ("plain", "noisy", "blind")}
    positions = report["reconstruction_by_position"]["noisy"]["3"]
    assert [part["first"] for part in positions] == list(range(1, 8))
    assert np.mean([part["share"]["value"] for part in positions]) == pytest.approx(report["reconstruction"]["noisy"]["3"]["value"])
    assert report["rejected"] == 0 and report["machine"] is None
    assert report["teacher"]["sequences"] == 36 and report["real"]["sequences"] == 36
    assert len(report["shown"]) == 2 and report["shown_nfe"] == 3 and report["shown"][0]["systems"]["noisy"].startswith("w")


def test_page_states_every_verdict_and_shows_the_picture(finished: Path) -> None:
    page, report = (finished / "report.md").read_text(), json.loads((finished / "report.json").read_text())
    assert all(line["sentence"] in page for line in report["comparisons"])
    assert "](report.png)" in page and (finished / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "it is not a likelihood" in page and report["provenance"]["heldout_root_hash"] in page


def test_a_rerun_loads_no_causal_lm_and_samples_nothing(world: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: (finished / name).read_bytes() for name in PAGES}

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("this was done already")

    for room, name in ((systems, "sample_counted"), (reconstruct, "sample"), (causal.CausalLM, "__init__")):
        monkeypatch.setattr(room, name, refuse)
    assert run(recipe(world, finished)) == 0
    assert {name: (finished / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("stop_after", [2, 30])
def test_an_interrupted_report_continues_and_ends_equal(
    world: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = {"sample": 0, "stop": stop_after}
    real_sample = systems.sample_counted

    def counted(*args: object, **kwargs: object) -> object:
        if calls["sample"] == calls["stop"]:
            raise KeyboardInterrupt
        calls["sample"] += 1
        return real_sample(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(systems, "sample_counted", counted)
    path = recipe(world, tmp_path / "out")
    assert run(path) == 130 and "the same command continues" in capsys.readouterr().err
    calls["stop"] = -1
    assert run(path) == 0
    assert calls["sample"] == 3 * 2 * 4 * 3  # systems, NFE, traced points, batches: none twice
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
    assert len(new) == 8 and all(name.startswith("plain-nfe") for name in new)


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
    write_ahead(tmp_path / "heads", "row")
    write_ahead(tmp_path / "ahead")
    write_medusa(tmp_path / "medusa", world)
    write_student(tmp_path / "short", length=5)
    write_causal(tmp_path / "wide", 1, vocab_size=30)
    cases: list[tuple[dict, str]] = [
        ({"systems": {"plain": {"student": str(tmp_path / "heads"), "nfe": [4]}}}, "the student has learnt the last 2 of a row alone"),
        (
            {"systems": {"plain": {"student": str(tmp_path / "ahead"), "nfe": [3]}}},
            "system plain: nfe is 3, but the student writes at most 2 tokens a forward, and a row has 7 unknown ones; give at least 4",
        ),
        ({"systems": {"plain": {"student": str(tmp_path / "ahead"), "nfe": [4], "order": "confidence"}}}, "an mtp student writes from left to right"),
        (
            {"systems": {"plain": {"student": str(tmp_path / "medusa"), "noise_temperatures": [1.1]}}},
            "a medusa student writes what its backbone does",
        ),
        ({"systems": {"plain": {"student": str(tmp_path / "ar"), "noise_temperatures": [0.9]}}}, "an ar student writes one token a forward"),
        ({"systems": {"plain": {"student": str(world / "plain"), "sampler": "first_hitting", "nfe": [3]}}}, "takes the forwards that it takes"),
        ({"systems": {}, "students": str(tmp_path / "gone"), "baseline": ""}, "gone, which is not a folder"),
        ({"systems": {}, "students": str(world / "teacher"), "baseline": ""}, "holds no student of kind mdlm, bd3lm, mtp, medusa, ar"),
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
        ({"systems": {}}, "name the systems, or a folder of students"),
        ({"systems": {"plain": {"student": "x", "nuclei": [0.8, 0.9], "temperatures": [0.5, 1.0]}}}, "several temperatures and several nuclei"),
        ({"systems": {"plain": {"student": "x", "nuclei": [0.8, 0.9], "nucleus": 0.9}}}, "nuclei stand in its place"),
        ({"systems": {"plain": {"student": "x", "sampler": "adaptive"}}}, "adaptive needs a small causal LM"),
        ({"mauve": {"clusters": 1}}, "give 2 clusters or more"),
    ]:
        assert status(recipe(world, tmp_path / "out", **change)) != 0
        assert message in capsys.readouterr().err


def status(path: Path) -> int:
    try:
        return run(path)
    except SystemExit as stop:
        return int(stop.code or 0)


class Page(HTMLParser):
    """Checks that tags nest, and collects text and everything that is loaded or linked."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.elsewhere, self.text, self.pictures = [], [], "", 0
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.pictures += tag == "img"
        self.elsewhere += [value for name, value in attrs if name in ("src", "href") and not value.startswith("data:image/png;base64,")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_figure_is_read_between_its_points_at_one_entropy() -> None:
    points = [{"entropy": {"value": e}, "distinct_1": {"value": v, "low": v - 1, "high": v + e}} for e, v in ((3.0, 10.0), (1.0, 2.0), (2.0, 4.0))]
    assert _interval_at(points, "distinct_1", 2.5) == {"value": 7.0, "low": 6.0, "high": 9.5}
    assert _interval_at(points, "distinct_1", 0.5) == {"value": 2.0, "low": 1.0, "high": 3.0}, "nothing is extrapolated"


def test_all_students_of_a_folder_stand_beside_ar_with_mauve_and_wall_time(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    students = tmp_path / "students"
    for name in ("plain", "gumbel"):
        shutil.copytree(world / name, students / name)
    write_student(students / "ar", kind="ar", seed=5)
    write_blocks(students / "blocks")
    write_ahead(students / "heads", "row")
    write_ahead(students / "ahead")
    write_medusa(students / "medusa", world)
    longer = build(StudentConfig(layers=1, hidden=16, heads=2), VOCAB, 2 * LENGTH)
    save_student(students / "longer", longer, longer.state_dict(), {}, {})
    change = {
        "systems": {}, "students": str(students), "baseline": "", "control": "", "nfe": [1, 2, 4], "timing_rows": 4, "sequences": 30,
        "mauve": {"featuriser": str(world / "judge")},
    }  # fmt: skip
    path = recipe(world, tmp_path / "out", **change)
    assert run(path) == 0
    assert "its own NFE" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (drafted,) = report["systems"]["medusa"]["nfe"]
    calls = report["systems"]["medusa"]["nfe"][drafted]["points"]
    assert [point["temperature"] for point in calls[:3]] == [0.8, 0.95, 1.1] and len(calls) == 4
    assert int(drafted) < 7 and report["systems"]["medusa"]["free"]
    assert {name: list(system["nfe"]) for name, system in report["systems"].items()} == {
        "ahead": ["4"], "ar": ["7"], "blocks": ["2", "4"], "gumbel": ["1", "2", "4"], "plain": ["1", "2", "4"], "medusa": [drafted],
    }  # fmt: skip
    assert report["settings"]["baseline"] == "plain" and any("heads has learnt the last tokens of a row alone" in line for line in report["warnings"])
    assert any("longer has vocabulary 24 and block length 16, the held-out rows 24 and 8" in line for line in report["warnings"])
    assert set(report["reconstruction"]) == {"ahead", "blocks", "gumbel", "plain"}
    pairs = [(line["system"], line["against"], line["nfe"], line["against_nfe"]) for line in report["comparisons"]]
    assert ("ahead", "plain", 4, 4) in pairs and ("medusa", "ar", int(drafted), 7) in pairs
    assert ("blocks", "plain", 2, 2) in pairs and ("plain", "ar", 4, 7) in pairs and not any(pair[0] == "ar" for pair in pairs)
    for name, system in report["systems"].items():
        for nfe, at in system["nfe"].items():
            assert 0 < at["seconds"]["low"] <= at["seconds"]["value"] <= at["seconds"]["high"] and at["matched"]["mauve"] is not None
            for point in at["points"]:
                assert 0 <= point["mauve"]["low"] <= point["mauve"]["value"] <= point["mauve"]["high"] <= 1
                if name != "medusa":
                    assert point["forwards"] == {"mean": float(nfe), "least": int(nfe), "most": int(nfe)}, name
                else:
                    assert 1 < point["forwards"]["least"] < point["forwards"]["mean"] < 7
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert not page.elsewhere and report["shown"][0]["systems"]["plain"] in page.text
    for said in ('"steps": 77', '"seed": "<99>"', "3 clusters", "30 samples against 30 rows", "scale 5", report["machine"]["name"]):
        assert said in page.text, said
    before = {name: (tmp_path / "out" / name).read_bytes() for name in PAGES}

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("this was done already")

    for room, name in (
        (systems, "sample_counted"),
        (systems, "sample_blocks"),
        (systems, "write_drafted"),
        (causal.CausalLM, "__init__"),
        (features.Featuriser, "__init__"),
    ):
        monkeypatch.setattr(room, name, refuse)
    assert run(path) == 0 and {name: (tmp_path / "out" / name).read_bytes() for name in PAGES} == before


def test_a_medusa_students_text_is_its_backbones(world: Path, tmp_path: Path) -> None:
    write_medusa(tmp_path / "medusa", world)
    named = {"heads": {"student": str(tmp_path / "medusa")}, "sure": {"student": str(tmp_path / "medusa"), "top_k": 1}}
    path = recipe(world, tmp_path / "out", systems=named, baseline="heads", control="", sequences=24, reconstruction_rows=0)
    assert run(path) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (heads,), (sure,) = ([point for at in system["nfe"].values() for point in at["points"]] for system in report["systems"].values())
    assert heads["teacher_agreement"] == 1.0 > sure["teacher_agreement"] and heads["teacher_prefix"] == LENGTH - 1


def test_settings_of_a_system_reach_its_samples(world: Path, tmp_path: Path) -> None:
    plain, gumbel, small = str(world / "plain"), str(world / "gumbel"), str(world / "judge")
    named = {
        "nuclei": {"student": plain, "nuclei": [0.1, 0.9]}, "one": {"student": plain, "top_k": 1}, "argmax": {"student": plain, "output": "argmax"},
        "held": {"student": gumbel}, "fresh": {"student": gumbel, "fresh_noise": True}, "hits": {"student": plain, "sampler": "first_hitting"},
        "steps": {"student": plain, "sampler": "ancestral"}, "few": {"student": plain, "sampler": "adaptive", "auxiliary": small},
        "cut": {"student": plain, "sampler": "adaptive", "auxiliary": small, "lookahead": 1, "recompute": 1},
        "surest": {"student": plain, "order": "confidence"}, "ar": {"student": str(tmp_path / "ar"), "top_k": 1},
    }  # fmt: skip
    write_student(tmp_path / "ar", kind="ar", seed=5)
    path = recipe(
        world, tmp_path / "out", systems=named, baseline="nuclei", control="", nfe=[3], teacher="", sequences=32, shown=1, reconstruction_rows=0
    )
    assert run(path) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    found = {name: [point for at in system["nfe"].values() for point in at["points"]] for name, system in report["systems"].items()}
    entropy = {name: points[-1]["entropy"]["value"] for name, points in found.items()}
    assert [point["nucleus"] for point in found["nuclei"]] == [0.1, 0.9, 1.0] and found["nuclei"][0]["entropy"]["value"] < entropy["nuclei"]
    text = report["shown"][0]["systems"]
    assert entropy["one"] == entropy["argmax"] and text["one"] == text["argmax"] and text["surest"] != text["nuclei"]
    assert text["held"] != text["fresh"] and entropy["ar"] > 0
    assert {name for name, system in report["systems"].items() if system["free"]} == {"hits", "few", "cut", "ar"}
    assert found["hits"][0]["forwards"] == found["ar"][0]["forwards"] == found["cut"][0]["forwards"] == {"mean": 7.0, "least": 7, "most": 7}
    made = found["few"][0]["forwards"]
    assert 1 <= made["least"] < made["mean"] < made["most"] <= 7 and list(report["systems"]["few"]["nfe"]) == [str(round(made["mean"]))]
    assert found["steps"][0]["forwards"]["least"] < 3  # steps in which nothing is revealed cost nothing
    page = (tmp_path / "out" / "report.md").read_text()
    assert "temperature 1, nucleus 0.9" in page and "fresh noise" in page and f"({made['mean']:.4g} made)" in page


def test_free_systems_of_one_sampler_are_compared_each_at_its_own_nfe(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, gumbel, independent = ({"student": str(world / name)} for name in ("plain", "gumbel", "independent"))
    hits, few = {"sampler": "first_hitting"}, {"sampler": "adaptive", "auxiliary": str(world / "judge"), "student_weight": 0.9}
    named = {
        "plain": plain, "hits": {**plain, **hits}, "few": {**plain, **few}, "noisy-hits": {**gumbel, **hits},
        "noisy-few": {**gumbel, **few, "student_weight": 0.1}, "blind": independent, "blind-few": {**independent, **few},
    }  # fmt: skip
    path = recipe(world, tmp_path / "out", systems=named, control="blind", nfe=[3], teacher="", sequences=24, shown=0, reconstruction_rows=0)
    assert run(path) == 0
    report, out = json.loads((tmp_path / "out" / "report.json").read_text()), capsys.readouterr().out
    lines = {(line["system"], line["against"]): line for line in report["comparisons"]}
    free = [("noisy-hits", "hits"), ("noisy-few", "few"), ("blind-few", "few"), ("noisy-few", "blind-few")]
    assert list(lines) == [("blind", "plain"), *free] and len(report["comparisons"]) == 5
    page, own = (tmp_path / "out" / "report.md").read_text(), {name: int(next(iter(system["nfe"]))) for name, system in report["systems"].items()}
    for ours, theirs in free:
        line = lines[ours, theirs]
        ratio = [report["systems"][name]["nfe"][str(own[name])]["matched"]["perplexity"]["value"] for name in (ours, theirs)]
        assert (line["nfe"], line["against_nfe"]) == (own[ours], own[theirs]) and line["ratio"]["value"] == pytest.approx(ratio[0] / ratio[1])
        assert f"NFE {own[ours]}: perplexity of {ours} / {theirs} at its NFE {own[theirs]}" in line["sentence"] in page and line["sentence"] in out
    assert own["noisy-few"] > own["few"]


def test_an_unknown_key_ends_with_status_2(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(recipe(world, tmp_path / "out", temperatur=1.0)) == 2
    assert "temperatur" in capsys.readouterr().err


def test_the_demos_recipe_is_understood() -> None:
    command, config = parse(["report", "--config", str(RECIPES / "demo_report.yaml"), "--nfe", "[1, 2]", "--systems.mdlm.temperatures", "[1.0]"])
    assert command == "report" and isinstance(config, ReportConfig)
    assert config.nfe == [1, 2] and config.systems["mdlm"].temperatures == [1.0] and config.baseline in config.systems
    reports = [path for path in RECIPES.rglob("*.yaml") if {"judge", "nfe"} <= yaml.safe_load(path.read_text()).keys()]
    assert len(reports) >= 6 and all(isinstance(parse(["report", "--config", str(path)])[1], ReportConfig) for path in reports)
    _, quality = parse(["report", "--config", str(RECIPES / "demo_quality.yaml")])
    assert quality.students and quality.mauve.featuriser
    assert {Path(system.student).parent for system in quality.systems.values()} == {Path(quality.students), Path("runs/demo")}
