"""Reports of several datasets: each student stands where its rows are, and what fits nowhere is refused before anything is drawn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.eval.reports import recipe, run
from tests.eval.test_report import Page, status
from tests.eval.world import write_heldout, write_student, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def test_students_of_several_datasets_have_a_report_and_a_plot_each_and_a_page_of_all(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    students, long = tmp_path / "students", tmp_path / "long"
    for name in ("plain", "independent"):
        shutil.copytree(world / name, students / name)
    write_student(students / "longer", length=12)
    write_heldout(long, length=12)
    shutil.copytree(world / "heldout" / "tokenizer", long / "tokenizer")
    change = {
        "systems": {}, "students": str(students), "baseline": "", "control": "independent", "heldout": "",
        "datasets": [str(world / "heldout"), str(long)], "nfe": [1, 9], "sequences": 12, "reconstruction_rows": 0,
    }  # fmt: skip
    assert run(recipe(world, tmp_path / "out", **change)) == 0
    reports = {name: json.loads((tmp_path / "out" / name / "report.json").read_text()) for name in ("heldout", "long")}
    assert {name: list(report["systems"]) for name, report in reports.items()} == {"heldout": ["independent", "plain"], "long": ["longer"]}
    assert [list(report["systems"][name]["nfe"]) for report, name in zip(reports.values(), ("plain", "longer"), strict=True)] == [["1"], ["1", "9"]]
    assert [report["settings"]["control"] for report in reports.values()] == ["independent", ""]
    alone = recipe(world, tmp_path / "alone", **{**change, "heldout": str(long), "datasets": [], "control": ""})
    assert run(alone) == 0 and json.loads((tmp_path / "alone" / "report.json").read_text())["systems"] == reports["long"]["systems"]
    page, written = Page((tmp_path / "out" / "report.html").read_text()), (tmp_path / "out" / "report.md").read_text()
    assert not page.elsewhere and page.pictures == 2 and "heldout/report.html" in page.text and "long/report.html" in page.text
    assert "](heldout/report.png)" in written and "](long/report.png)" in written and (tmp_path / "out" / "long" / "report.png").exists()
    capsys.readouterr()
    cases: list[tuple[dict, str]] = [
        ({"heldout": str(long)}, "give one held-out dataset, or several as datasets"),
        ({"datasets": [str(long), str(long)]}, "datasets has 2 of the name 'long'"),
        ({"control": "nobody"}, "control is 'nobody', which is no student of the rows of"),
        ({"systems": {"other": {"student": str(world / "teacher")}}}, "fits the rows of none of"),
        ({"datasets": [str(long), str(tmp_path / "gone")]}, "is not a noise dataset"),
        ({"nfe": [1, 9], "judge": str(tmp_path / "gone")}, "does not exist"),
    ]
    for more, message in cases:
        assert status(recipe(world, tmp_path / "refused", **{**change, **more})) != 0
        assert message in capsys.readouterr().err and not list(tmp_path.glob("refused/*/samples"))
