"""What the terminal shows at the end: a table, the verdicts, and where the picture is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from eval.page import columns, interval, matched_row, teacher_matched


def show_report(report: dict[str, Any], folder: Path) -> None:
    console = _console()
    table = Table(title="Generative perplexity at the entropy of real text (95% interval)")
    table.add_column("system")
    for head in columns(report):
        table.add_column(head, justify="right")
    for name in report["systems"]:
        table.add_row(*matched_row(report, name))
    console.print(table)
    for name, label in (("teacher", "the teacher's own samples"), ("real", "real text")):
        if report[name] is not None:
            as_it_is = f"{label}: perplexity {interval(report[name]['perplexity'])}, entropy {interval(report[name]['entropy'], 3)}"
            console.print(as_it_is + (teacher_matched(report[name]) if name == "teacher" else ""), highlight=False, soft_wrap=True)
    for line in report["comparisons"]:
        console.print(Text(line["sentence"], style="green" if line["below_one"] else ""), soft_wrap=True)
    show_notes(report["warnings"])
    console.print(f"report: {folder / 'report.html'}, {folder / 'report.md'}\npicture: {folder / 'report.png'}", highlight=False, soft_wrap=True)


def show_notes(notes: list[str]) -> None:
    for note in notes:
        _console().print(Text(f"note: {note}", style="yellow"), soft_wrap=True)


def _console() -> Console:
    """As wide as the terminal; wide enough for the table where there is none (a log, a pipe)."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def show_figures(rows: dict[str, str]) -> None:
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    _console().print(table)


def show_texts(texts: list[str]) -> None:
    for number, text in enumerate(texts):
        Console().print(Text(f"[{number}] {text}"), soft_wrap=True)
