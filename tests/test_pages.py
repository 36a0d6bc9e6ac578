"""The tables of docs/ablation.md and docs/results.md are those that the committed JSON makes, and the command says where one is not."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks.page_tables import PAGES
from benchmarks.pages import ROOT, differences, made, main, regions, rewritten

RESULTS = ROOT / "benchmarks" / "results"
PAGE = "docs/results.md"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the pages and of the JSON."""
    shutil.copytree(RESULTS, tmp_path / "benchmarks" / "results")
    (tmp_path / "docs").mkdir()
    for page in PAGES:
        shutil.copy(ROOT / page, tmp_path / page)
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_the_committed_page_has_the_figures_of_the_committed_json(page: str) -> None:
    found = differences(page, (ROOT / page).read_text(), made(page, RESULTS))
    assert not found, "\n".join([*found, "python -m benchmarks.pages"])


@pytest.mark.parametrize(("page", "name"), [(page, name) for page, tables in PAGES.items() for name in tables])
def test_a_changed_figure_is_found_and_named(page: str, name: str) -> None:
    text, tables = (ROOT / page).read_text(), made(page, RESULTS)
    lines = text.split("\n")
    region = next(region for region in regions(page, lines, tables) if region.name == name)
    wrong = re.sub(r"\d(?=\D*$)", lambda digit: str((int(digit[0]) + 1) % 10), lines[region.last - 1])
    right, lines[region.last - 1] = lines[region.last - 1], wrong
    says = f"{page}:{region.last}: table {name} differs from the JSON\n  page: {wrong}\n  JSON: {right}"
    assert differences(page, "\n".join(lines), tables) == [says]
    assert rewritten(page, "\n".join(lines), tables) == text


def test_rows_that_are_missing_or_too_many_are_found() -> None:
    text, tables = (ROOT / PAGE).read_text(), made(PAGE, RESULTS)
    row = tables["heads"].splitlines()[-1]
    for other, says in ((text.replace(row + "\n", ""), "page: nothing"), (text.replace(row, f"{row}\n{row}"), "JSON: nothing")):
        (found,) = differences(PAGE, other, tables)
        assert "table heads differs" in found and says in found
        assert rewritten(PAGE, other, tables) == text


def test_json_made_anew_makes_the_page_stale_until_it_is_rewritten(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"], checkout) == 0
    path, before = checkout / "benchmarks" / "results" / "quality.json", (checkout / PAGE).read_text()
    report = json.loads(path.read_text())
    report["systems"]["mdlm"]["nfe"]["1"]["matched"] |= {"perplexity": {"value": 987.6, "low": 900.0, "high": 999.9}, "position": "above"}
    path.write_text(json.dumps(report))
    assert main(["--check"], checkout) == 1
    said = capsys.readouterr().err
    assert f"{PAGE}:" in said and "table perplexity differs" in said and "| mdlm | 987.6 (900.0–999.9) † |" in said
    assert (checkout / PAGE).read_text() == before
    assert main([], checkout) == 0 and "987.6 (900.0–999.9) †" in (checkout / PAGE).read_text()
    assert main(["--check"], checkout) == 0


def test_rewriting_again_changes_nothing(checkout: Path) -> None:
    before = {page: (checkout / page).read_text() for page in PAGES}
    for _ in range(2):
        assert main([], checkout) == 0
        assert {page: (checkout / page).read_text() for page in PAGES} == before


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("<!-- end heads -->", "", "table heads has no <!-- end heads -->"),
        ("<!-- end sampling -->", "", "table sampling has no <!-- end sampling -->"),
        ("<!-- table heads -->", "", "<!-- end heads --> ends no table that is open"),
        ("<!-- table heads -->", "<!-- table haeds -->", "table haeds is none of parts, heads"),
        ("<!-- table heads -->", "<!-- table parts -->", "table parts is here twice"),
        ("<!-- end heads -->", "<!-- end parts -->", "<!-- end parts --> ends no table that is open"),
        ("heads -->", "heads-->", "has no table heads"),
    ],
)
def test_a_marker_that_is_missing_or_unknown_is_an_error_that_names_it(
    old: str, new: str, says: str, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkout / PAGE).write_text((checkout / PAGE).read_text().replace(old, new))
    before = (checkout / PAGE).read_text()
    for arguments in (["--check"], []):
        assert main(arguments, checkout) == 1
        said = capsys.readouterr().err
        assert PAGE in said and says in said
    assert (checkout / PAGE).read_text() == before


def test_a_system_that_the_json_lacks_is_named_with_its_table(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkout / "benchmarks" / "results" / "quality.json"
    report = json.loads(path.read_text())
    del report["systems"]["mtp-gumbel"]
    path.write_text(json.dumps(report))
    assert main(["--check"], checkout) == 1
    assert "docs/results.md, table perplexity: its JSON has no 'mtp-gumbel'" in capsys.readouterr().err


def test_a_student_that_the_recipe_lacks_is_not_left_out_in_silence(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkout / "benchmarks" / "results" / "few_calls.json"
    report = json.loads(path.read_text())
    report["groups"]["mdlm"]["students"]["renamed"] = report["groups"]["mdlm"]["students"].pop("all")
    path.write_text(json.dumps(report))
    assert main(["--check"], checkout) == 1
    assert "few_calls.json has renamed in mdlm, which recipes/demo_few_calls.yaml does not have" in capsys.readouterr().err
