"""Students that differ in one thing, over seeds: trained once, compared with their own seed's baseline, in one page."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import pytest
import yaml

from eval import tables
from eval.__main__ import main, parse
from eval.ablation import _report_config, markdown, training
from tests.eval.world import write_world
from trainer.loop import _Run

BASE = {
    "student": {"kind": "mdlm", "layers": 1, "hidden": 16, "heads": 2},
    "optim": {"steps": 4, "global_batch": 8, "warmup": 1, "ema": 0},
    "threads": 1, "tensorboard": False, "device": "cpu", "log_every": 2, "eval_every": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished ablation of two groups and two seeds."""
    root = write_world(tmp_path_factory.mktemp("ablation"))
    data = {"path": str(root / "heldout"), "heldout": str(root / "heldout")}
    (root / "base.yaml").write_text(yaml.safe_dump(BASE | {"data": data, "output": "unused"}))
    noise = {"student.noise.kind": "gumbel", "student.noise.input": "replace"}
    groups = {
        "masked": {"recipe": str(root / "base.yaml"), "baseline": "plain", "nfe": [1, 2], "students": {"noisy": {"set": noise}, "plain": {}}},
        "drafting": {
            "recipe": str(root / "base.yaml"), "baseline": "plain", "measure": "accept", "teacher": str(root / "teacher"), "block": 2,
            "students": {"plain": {}, "noisy": {"about": "drafts with noise", "set": noise}},
        },
    }  # fmt: skip
    settings = {
        "output": str(root / "out"), "heldout": str(root / "heldout"), "judge": str(root / "judge"), "groups": groups, "seeds": [1, 2],
        "settings": {"optim.steps": 3}, "sequences": 24, "workers": 1, "device": "cpu",
    }  # fmt: skip
    (root / "ablation.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    assert main(["ablation", "--config", str(root / "ablation.yaml")]) == 0
    return root


def test_every_student_is_its_recipe_with_its_own_change_and_seed(made: Path) -> None:
    config = parse(["ablation", "--config", str(made / "ablation.yaml")])[1]
    plain, noisy = (training(config, "masked", name, 2) for name in ("plain", "noisy"))
    assert (plain.seed, plain.optim.steps, noisy.student.noise.kind, noisy.student.noise.input) == (2, 3, "gumbel", "replace")
    noisy.student.noise, noisy.output = plain.student.noise, plain.output
    assert noisy == plain


def test_frontiers_are_refined_as_it_says(made: Path) -> None:
    config = parse(["ablation", "--config", str(made / "ablation.yaml"), "--refine", "3"])[1]
    assert _report_config(config, "masked", 2).refine == 3
    with pytest.raises(ValueError, match="refine is -1"):
        parse(["ablation", "--config", str(made / "ablation.yaml"), "--refine", "-1"])


def test_figures_are_ratios_to_the_baseline_of_the_same_seed(made: Path) -> None:
    built = json.loads((made / "out" / "ablation.json").read_text())
    students = built["groups"]["masked"]["students"]
    for nfe in ("1", "2"):
        values = {}
        for seed in (1, 2):
            scored = {name: students[name]["columns"][f"NFE {nfe}"]["values"][seed - 1] for name in ("plain", "noisy")}
            values[seed] = scored["noisy"]
            assert scored["plain"] > 1
        column = students["noisy"]["columns"][f"NFE {nfe}"]
        assert math.isclose(column["mean"], math.sqrt(values[1] * values[2])) and (column["low"], column["high"]) == tuple(sorted(values.values()))


def test_students_that_draft_are_compared_by_the_tokens_of_a_call(made: Path) -> None:
    group = json.loads((made / "out" / "ablation.json").read_text())["groups"]["drafting"]
    built = group["students"]
    rules = ["tokens a call, shared noise", "tokens a call, rejection"]
    assert group["columns"] == [*rules, "token 1 stands, shared noise", "token 2 stands, shared noise"]
    assert built["noisy"]["columns"][rules[1]] is None and "| drafts with noise | " in (made / "out" / "ablation.md").read_text()
    assert next(line for line in (made / "out" / "ablation.md").read_text().splitlines() if "drafts with noise" in line).split(" | ")[2] == "—"
    for seed in (1, 2):
        report = json.loads((made / "out" / f"seed-{seed}" / "accept-drafting" / "accept.json").read_text())
        assert report["settings"]["sequences"] == 24 and report["settings"]["seed"] == seed and report["settings"]["block"] == 2
        for system in report["systems"]:
            columns = built[system["name"].removeprefix("drafting-")]["columns"]
            assert columns[f"tokens a call, {system['rule']}"]["values"][seed - 1] == system["tokens_per_call"]["value"] >= 1
            if system["rule"] == "shared noise":
                stands = [columns[f"token {k} stands, shared noise"]["values"][seed - 1] for k in (1, 2)]
                assert stands == [head["conditional"]["value"] for head in system["heads"]]


def test_the_page_names_seeds_steps_and_students_in_the_recipes_order(made: Path) -> None:
    config = parse(["ablation", "--config", str(made / "ablation.yaml")])[1]
    page = (made / "out" / "ablation.md").read_text()
    assert page == markdown(config, json.loads((made / "out" / "ablation.json").read_text()))
    assert "Seeds 1, 2" in page and "3 steps of 8 rows" in page and page.index("| noisy |") < page.index("| plain |")


def test_the_same_command_trains_and_samples_nothing_again(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {path: path.stat().st_mtime_ns for path in (made / "out").rglob("*") if path.suffix in (".arrow", ".safetensors")}
    capsys.readouterr()
    assert main(["ablation", "--config", str(made / "ablation.yaml")]) == 0
    assert "trained already" in capsys.readouterr().out
    assert files == {path: path.stat().st_mtime_ns for path in files}


def test_an_interrupted_ablation_continues_with_what_is_missing(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the third student's training, at a sample set, and at the second batch of each seed's drafts."""
    stepped: list[tuple[Path, int]] = []
    written: list[Path] = []
    stopped_at: list[Path] = []
    one_step, write = _Run._one_step, tables.write

    def step_or_stop(run, *arguments):
        stepped.append((run.output, run.step))
        if len(stepped) == 3 + 3 + 2:
            os.kill(os.getpid(), signal.SIGINT)
        return one_step(run, *arguments)

    def write_or_stop(path, *arguments):
        if path not in stopped_at and (len(written) == 2 or path.name == "00000016.arrow"):
            stopped_at.append(path)
            raise KeyboardInterrupt
        written.append(path)
        write(path, *arguments)

    monkeypatch.setattr(_Run, "_one_step", step_or_stop)
    monkeypatch.setattr(tables, "write", write_or_stop)
    command = ["ablation", "--config", str(made / "ablation.yaml"), "--output", str(tmp_path)]
    assert main(command) == 130 and len(stepped) == 8 and not written
    assert [main(command) for _ in range(4)] == [130, 130, 130, 0]
    assert stopped_at[0].parent.name == "samples" and len(stopped_at) == 3
    assert len(set(stepped)) == len(stepped) == 2 * 4 * 3, "each step of each student once"
    assert len(set(written)) == len(written), "each table once"
    assert (tmp_path / "ablation.json").read_text() == (made / "out" / "ablation.json").read_text()


def test_no_recipe_of_the_project_writes_its_page_over_what_was_written_by_hand() -> None:
    recipes = [path for path in Path("recipes").glob("*.yaml") if "groups" in yaml.safe_load(path.read_text())]
    assert len(recipes) > 2
    for path in recipes:
        config = parse(["ablation", "--config", str(path)])[1]
        assert not config.page or config.folder in Path(config.page).parents


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seeds": [1, 1]}, "each once"),
        ({"groups": {"g": {"recipe": "r", "baseline": "b", "students": {"a": {}}}}}, "not among the students"),
        ({"groups": {"g": {"recipe": "r", "baseline": "a", "measure": "accept", "students": {"a": {}}}}}, "measure is accept, but teacher is empty"),
        ({"groups": {"g": {"recipe": "r", "baseline": "a", "block": 8, "students": {"a": {}}}}}, "block is 8, but measure is perplexity"),
        (
            {"groups": {"g": {"recipe": "r", "baseline": "a", "measure": "accept", "teacher": "t", "nfe": [3], "students": {"a": {}}}}},
            "nfe is [3], but measure is accept",
        ),
        (
            {"groups": {"g": {"recipe": "r", "baseline": "a", "measure": "accept", "teacher": "t", "students": {"a": {"output": "sample"}}}}},
            "output of a is sample, but measure is accept",
        ),
        (
            {"groups": {"g": {"recipe": "r", "baseline": "a", "measure": "accept", "teacher": "t", "block": 0, "students": {"a": {}}}}},
            "block is 0; it must be at least 1",
        ),
        (
            {"groups": {"g": {"recipe": "r", "baseline": "a", "measure": "accept", "teacher": "/nowhere/gone", "students": {"a": {}}}}},
            "/nowhere/gone",
        ),
        ({"groups": {"g": {"recipe": "r", "baseline": "a", "teacher": "t", "students": {"a": {}}}}}, "teacher is 't', but measure is perplexity"),
    ],
)
def test_what_makes_no_sense_is_refused(
    made: Path, tmp_path: Path, change: dict[str, object], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = yaml.safe_load((made / "ablation.yaml").read_text()) | change
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises((SystemExit, ValueError)) as refused:
        raise SystemExit(main(["ablation", "--config", str(tmp_path / "bad.yaml")]))
    assert refused.value.args[0] != 0 and words in capsys.readouterr().err
