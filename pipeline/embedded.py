"""The default corpus: the English prose that every Python carries.

One document per standard library module (its docstrings, in source order) and one per language-reference topic
(`pydoc_data.topics`). Docstrings are dedented, their paragraphs unwrapped; doctests, tables and code are left out, and
a paragraph that has been seen before is dropped, so nothing is in the corpus twice. Takes about 5 seconds on a slow core.

Deterministic for one Python; nearly the same text on every CPython >= 3.11, also from a virtual environment.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

SKIPPED = {
    "__pycache__", "config", "dist-packages", "distutils", "ensurepip", "idlelib", "lib-dynload", "lib2to3", "pydoc_data",
    "site-packages", "test", "tests", "turtledemo",
}  # fmt: skip
SHORTEST_DOCUMENT = 200  # characters; a module with one line of prose is no document
PROSE = re.compile(r"[A-Za-z ,.;:'()]")
MARKUP = re.compile(r"\*\*|``|(?<!\w)\*(?=\w)|(?<=\w)\*(?!\w)|:[a-z]+:(?=`)|`")


@functools.cache
def documents() -> tuple[str, ...]:
    """All documents in a fixed order, no paragraph twice."""
    seen: set[str] = set()
    found: list[str] = []
    for paragraphs in _sources():
        fresh = []
        for paragraph in paragraphs:
            key = paragraph.casefold()
            if key not in seen:
                seen.add(key)
                fresh.append(paragraph)
        text = "\n\n".join(fresh)
        if len(text) >= SHORTEST_DOCUMENT:
            found.append(text + "\n")
    return tuple(found)


def _sources() -> Iterator[list[str]]:
    """Paragraphs of each document before anything is dropped: topics first, since modules quote them."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield prose(topics[name])
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
        if not SKIPPED.intersection(path.relative_to(root).parts[:-1]) and not path.name.startswith(("test_", "_sysconfigdata")):
            yield [paragraph for docstring in docstrings(path) for paragraph in prose(docstring)]


def docstrings(path: Path) -> list[str]:
    """Docstrings of a module and everything in it, in source order; none if it does not parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = sorted((node for node in ast.walk(tree) if isinstance(node, kinds)), key=lambda node: getattr(node, "lineno", 0))
    return [docstring for node in nodes if (docstring := ast.get_docstring(node, clean=False))]


def prose(text: str) -> list[str]:
    """Paragraphs of running English, each on one line, without markup."""
    found = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        line = MARKUP.sub("", " ".join(paragraph.split()))
        if is_prose(line):
            found.append(line)
    return found


def is_prose(line: str) -> bool:
    """At least six words, nearly all of it letters and plain punctuation, no doctest, table or signature."""
    words = line.split()
    if len(words) < 6 or any(mark in line for mark in (">>>", "---", "===", "::=", "+--", "__(", "->")) or not line.isascii():
        return False
    return len(PROSE.findall(line)) >= 0.95 * len(line) and sum(word.strip(".,;:'()").isalpha() for word in words) >= 0.7 * len(words)
