"""A page of plain blocks as Markdown, or as one HTML file that needs nothing beside it: style and pictures are inside, and no link leaves it.

In text, `...` is code. Verbatim is text of a model, shown as it is.
"""

from __future__ import annotations

import base64
import html as escaping
import os
import re
from dataclasses import dataclass, field
from pathlib import Path


class Verbatim(str):
    """Not ours: nothing in it is markup."""


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Note:
    text: str


@dataclass(frozen=True)
class Bullets:
    items: list[str]


@dataclass(frozen=True)
class Picture:
    text: str
    """what is on it"""
    file: Path
    """a PNG"""


@dataclass(frozen=True)
class Table:
    head: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Details:
    """Long text that is folded away."""

    title: str
    text: str = field(repr=False)


Block = Heading | Paragraph | Note | Bullets | Picture | Table | Details


def markdown(blocks: list[Block], folder: Path) -> str:
    """`folder`: where the page will lie. What is folded away in HTML is left out: it is in the JSON."""
    return "\n\n".join(_markdown(block, folder) for block in blocks if not isinstance(block, Details)) + "\n"


def _markdown(block: Block, folder: Path) -> str:
    match block:
        case Heading(text, level):
            return "#" * level + " " + text
        case Note(text):
            return f"> **Note.** {text}"
        case Bullets(items):
            return "\n".join(f"- {item}" for item in items)
        case Picture(text, file):
            return f"![{text}]({os.path.relpath(file, folder)})"
        case Table(head, rows):
            lines = [head, ["---"] * len(head), *([_quoted(cell) if isinstance(cell, Verbatim) else cell for cell in row] for row in rows)]
            return "\n".join(("|---" * len(head) + "|") if line is lines[1] else "| " + " | ".join(line) + " |" for line in lines)
        case Paragraph(text):
            return text
    raise AssertionError(block)


def _quoted(text: str) -> str:
    """Text that stays text inside a Markdown table."""
    for special in "\\`*_{}[]<>#|~$":
        text = text.replace(special, "\\" + special)
    return text.replace("\r", " ").replace("\n", " ⏎ ")


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 78rem; margin: 2rem auto; padding: 0 1rem }
h1, h2, h3 { line-height: 1.2; margin: 2rem 0 0.6rem }
img { max-width: 100% }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid #ddd; padding: 0.25rem 0.7rem 0.25rem 0; text-align: left; vertical-align: top }
th { border-bottom: 2px solid #999 }
.text { white-space: pre-wrap; font-family: ui-monospace, monospace }
.note { background: #fff4d6; padding: 0.5rem 1rem }
pre { background: #f5f5f5; padding: 0.7rem; overflow-x: auto; font-size: 0.8rem }
"""


def html(blocks: list[Block]) -> str:
    """One file; the pictures are inside."""
    title = next(block.text for block in blocks if isinstance(block, Heading))
    body = "\n".join(map(_html, blocks))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escaping.escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{_inline(text)}</h{level}>"
        case Note(text):
            return f'<p class="note"><b>Note.</b> {_inline(text)}</p>'
        case Bullets(items):
            return "<ul>\n" + "\n".join(f"<li>{_inline(item)}</li>" for item in items) + "\n</ul>"
        case Picture(text, file):
            return f'<p><img alt="{escaping.escape(text)}" src="data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"></p>'
        case Table(head, rows):
            lines = ["".join(f"<th>{_inline(cell)}</th>" for cell in head), *("".join(map(_cell, row)) for row in rows)]
            return '<div class="wide"><table>\n' + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table></div>"
        case Details(title, text):
            return f"<details><summary>{_inline(title)}</summary><pre>{escaping.escape(text)}</pre></details>"
        case Paragraph(text):
            return f"<p>{_inline(text)}</p>"
    raise AssertionError(block)


def _cell(text: str) -> str:
    return f'<td class="text">{escaping.escape(text)}</td>' if isinstance(text, Verbatim) else f"<td>{_inline(text)}</td>"


def _inline(text: str) -> str:
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escaping.escape(text)).replace("  \n", "<br>\n")
