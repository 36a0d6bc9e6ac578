"""docs/paper.md says what the estimate command says, and names every recipe; those that train nothing parse."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from trainer.__main__ import parse
from trainer.estimate import Where, estimate

ROOT = Path(__file__).parents[1]
DOCS = (ROOT / "docs" / "paper.md").read_text()
PAPER = sorted((ROOT / "recipes/paper").glob("*.yaml"))
TRAINED = [path for path in PAPER if not path.stem.endswith(("_generate", "_report"))]


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.stem)
def test_the_page_has_the_figures_of_the_command(path: Path) -> None:
    found = estimate(parse(["--config", str(path)]), 50_257, 128 if path.stem.startswith("lm1b") else 1024, Where())
    cells = [f"{found.steps:,}", f"{found.parameters / 1e6:,.1f} M", f"{found.total_memory / 1e9:,.1f} GB", f"{found.gpu_hours:,.0f}"]
    link = f"[{path.stem}](../{path.relative_to(ROOT)})"
    assert re.search(rf"^\|[^|]*\| {re.escape(link)} \| {re.escape(' | '.join(cells))} \|", DOCS, re.MULTILINE), cells


def test_the_page_names_every_recipe_and_no_other() -> None:
    named = set(re.findall(r"\(\.\./(recipes/[\w/.]+)\)", DOCS))
    assert {str(path.relative_to(ROOT)) for path in PAPER} <= named
    assert all((ROOT / name).exists() for name in named)


def test_its_datasets_and_reports_parse() -> None:
    from eval.__main__ import parse as parse_eval
    from pipeline.__main__ import parse as parse_pipeline

    commands = [shlex.split(line.strip(), comments=True) for line in DOCS.splitlines() if line.startswith("    python -m")]
    outputs = [yaml.safe_load(path.read_text())["output"] for path in TRAINED]
    assert {(command[2], command[3]) for command in commands} == {
        ("pipeline", "extract"),
        ("pipeline", "generate"),
        ("eval", "report"),
        ("trainer", "estimate"),
    }
    for command in commands:
        if command[2] == "pipeline":
            assert parse_pipeline(command[3:])[1].output.startswith(("runs/lm1b_gpt2/", "runs/owt_gpt2/"))
        elif command[2] == "eval":
            config = parse_eval(command[3:])[1]
            students = {system.student for system in config.systems.values()}
            assert students == {output for output in outputs if Path(output).parts[1] == Path(config.output).parts[1] and "stage1" not in output}
