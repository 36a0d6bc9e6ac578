"""Points of a frontier that are placed where it is read, of systems and of the teacher."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from eval import plot, study
from eval.page import interval
from tests.eval.reports import recipe, run
from tests.eval.world import write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "out"
    assert run(recipe(world, output)) == 0
    return output


def test_a_point_of_every_frontier_is_placed_at_the_entropy_of_real_text(finished: Path, world: Path, tmp_path: Path) -> None:
    assert run(recipe(world, tmp_path / "coarse"), "--refine", "0") == 0 and run(recipe(world, tmp_path / "fine"), "--refine", "4") == 0
    reports = [json.loads((folder / "report.json").read_text()) for folder in (tmp_path / "coarse", finished, tmp_path / "fine")]
    wanted, inside = reports[0]["real"]["entropy"]["value"], 0
    for name in ("plain", "noisy", "blind"):
        for nfe in ("1", "3"):
            at = [report["systems"][name]["nfe"][nfe] for report in reports]
            assert [len(one["points"]) for one in at[:2]] == [3, 4] and at[1]["points"][:3] == at[0]["points"] == at[2]["points"][:3]
            if at[0]["matched"]["position"] == "inside":
                inside += 1
                entropies = [[point["entropy"]["value"] for point in one["points"]] for one in at]
                below, above = max(e for e in entropies[0] if e <= wanted), min(e for e in entropies[0] if e > wanted)
                assert below < entropies[1][3] < above and min(abs(e - wanted) for e in entropies[2]) < 0.01
    assert inside >= 2
    assert reports[0]["teacher"]["matched"] is None and len(reports[0]["teacher"]["points"]) == 1
    teacher = reports[2]["teacher"]
    assert teacher["points"][0]["temperature"] == 1
    assert teacher["points"][0]["perplexity"] == teacher["perplexity"] == reports[0]["teacher"]["perplexity"]
    gaps = [abs(point["entropy"]["value"] - wanted) for point in teacher["points"]]
    assert gaps[1] < gaps[0] and min(gaps[2:]) < 0.02 and teacher["matched"]["position"] == "inside"
    coarse, fine = ((tmp_path / name / "report.md").read_text() for name in ("coarse", "fine"))
    said = f"; at the entropy of real text perplexity {interval(teacher['matched']['perplexity'])}."
    assert said in fine and "at the entropy of real text perplexity" not in coarse
    assert "4 of each frontier are placed there" in fine and "placed there" not in coarse
    assert plot._line(reports[2], "teacher") == (teacher["matched"], "the teacher, a forward a token")
    assert plot._line(reports[0], "teacher")[0] == reports[0]["teacher"] and "as they are (3.01 nats)" in plot._line(reports[0], "teacher")[1]


def test_a_figure_is_read_beside_the_point_that_was_placed_for_it(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    at = report["systems"]["plain"]["nfe"]["1"]
    wanted, points = report["real"]["entropy"]["value"], sorted((p["entropy"]["value"], p["perplexity"]["value"]) for p in at["points"])
    x, y = zip(*points, strict=True)
    assert at["matched"]["perplexity"]["value"] == pytest.approx(np.exp(np.interp(wanted, x, np.log(y))))


def test_the_count_of_work_ends_where_the_work_does(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    monkeypatch.setattr(study.Progress, "close", lambda progress: counts.append((progress._done, progress._total)))
    for refine in ("0", "2"):
        assert run(recipe(world, tmp_path / "out"), "--refine", refine) == 0
    assert len(counts) == 2 and all(done == total for done, total in counts) and counts[0] < counts[1]
