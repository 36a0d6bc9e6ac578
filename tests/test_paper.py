"""docs/paper.md says what the estimate command says, and names every recipe; those that train nothing parse."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from trainer.__main__ import parse
from trainer.estimate import Where, estimate
from trainer.estimate_command import row

ROOT = Path(__file__).parents[1]
DOCS = (ROOT / "docs" / "paper.md").read_text()
PAPER = sorted((ROOT / "recipes/paper").glob("*.yaml"))
MEDUSA = sorted((ROOT / "recipes").glob("medusa_*.yaml"))
TRAINED = [path for path in PAPER if not path.stem.endswith(("_generate", "_report"))]


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", [*TRAINED, *MEDUSA], ids=lambda path: path.stem)
def test_the_page_has_the_figures_of_the_command(path: Path) -> None:
    vocab_size, block_length = (32_000, 512) if "vicuna" in path.stem else (50_257, 128 if path.stem.startswith("lm1b") else 1024)
    found = estimate(parse(["--config", str(path)]), vocab_size, block_length, Where())
    line = row(f"[{path.stem}](../{path.relative_to(ROOT)})", found)
    assert re.search(rf"^\|[^|]*{re.escape(line)}", DOCS, re.MULTILINE), line


def test_the_page_names_every_recipe_and_no_other() -> None:
    named = set(re.findall(r"\(\.\./(recipes/[\w/.]+)\)", DOCS))
    assert {str(path.relative_to(ROOT)) for path in [*PAPER, *MEDUSA]} <= named
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
