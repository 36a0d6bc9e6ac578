"""The tables of docs/ablation.md and docs/results.md, made from the JSON in benchmarks/results.

    python -m benchmarks.pages             rewrites every region between `<!-- table NAME -->` and `<!-- end NAME -->` of both pages
    python -m benchmarks.pages --check     writes nothing; names page, table and first line that differ, and exits with 1 if any does

Contract: after the first, the second finds nothing, and nothing outside the regions has changed. Every table of page_tables stands on its page once.
A few seconds, nearly all of them imports.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Collection
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from benchmarks.page_tables import PAGES
from noise.storage import DatasetError, read_json, write_text

ROOT = Path(__file__).parents[1]
_MARKER = re.compile(r"<!-- (table|end) (\S+) -->")


@dataclass(frozen=True)
class Region:
    """A table on a page: its lines are lines[first:last] of the page."""

    name: str
    first: int
    last: int


def made(page: str, results: Path) -> dict[str, str]:
    """Every table of a page by name, as the JSON in `results` has it. Raises DatasetError for a missing file, ValueError for a missing figure."""
    read = functools.cache(lambda name: read_json(results / f"{name}.json"))
    found = {}
    for name, table in PAGES[page].items():
        try:
            found[name] = table(read)
        except KeyError as error:
            raise ValueError(f"{page}, table {name}: its JSON has no {error}; make the JSON anew, or change benchmarks/page_tables.py") from error
    return found


def regions(page: str, lines: list[str], names: Collection[str]) -> list[Region]:
    """The tables of a page, which must be `names`, each once. Raises ValueError that names the page, the line and the marker."""
    found: list[Region] = []
    opened: tuple[str, int] | None = None
    for at, line in enumerate(lines):
        if not (marker := _MARKER.fullmatch(line)):
            continue
        kind, name = marker.groups()
        if kind == "end":
            if opened is None or opened[0] != name:
                raise ValueError(f"{page}:{at + 1}: {line} ends no table that is open; begin it with <!-- table {name} -->")
            found.append(Region(name, opened[1], at))
        elif opened is not None:
            raise ValueError(f"{page}:{opened[1]}: table {opened[0]} has no <!-- end {opened[0]} --> before the next table")
        elif name not in names or name in (region.name for region in found):
            raise ValueError(f"{page}:{at + 1}: table {name} is {'here twice' if name in names else 'none of ' + ', '.join(names)}")
        opened = (name, at + 1) if kind == "table" else None
    if opened is not None:
        raise ValueError(f"{page}:{opened[1]}: table {opened[0]} has no <!-- end {opened[0]} -->")
    if absent := [name for name in names if name not in (region.name for region in found)]:
        raise ValueError(f"{page} has no table {', '.join(absent)}; put <!-- table {absent[0]} --> and <!-- end {absent[0]} --> where it belongs")
    return found


def rewritten(page: str, text: str, tables: dict[str, str]) -> str:
    """The page with these tables in its regions."""
    lines = text.split("\n")
    for region in reversed(regions(page, lines, tables)):
        lines[region.first : region.last] = tables[region.name].split("\n")
    return "\n".join(lines)


def differences(page: str, text: str, tables: dict[str, str]) -> list[str]:
    """For each table that is not the JSON's: where, and its first line that differs."""
    lines, found = text.split("\n"), []
    for region in regions(page, lines, tables):
        pairs = zip_longest(lines[region.first : region.last], tables[region.name].split("\n"))
        for at, (here, there) in enumerate(pairs, start=region.first + 1):
            if here != there:
                shown = ["nothing" if line is None else line for line in (here, there)]
                found.append(f"{page}:{at}: table {region.name} differs from the JSON\n  page: {shown[0]}\n  JSON: {shown[1]}")
                break
    return found


def main(arguments: list[str] | None = None, checkout: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pages", description="The tables of docs/ablation.md and docs/results.md.")
    parser.add_argument("--check", action="store_true", help="Write nothing; say what differs.")
    check, found = parser.parse_args(arguments).check, []
    try:
        for page in PAGES:
            text, tables = (checkout / page).read_text(), made(page, checkout / "benchmarks" / "results")
            found += differences(page, text, tables)
            if not check:
                write_text(checkout / page, rewritten(page, text, tables))
    except (DatasetError, ValueError) as error:
        print(f"benchmarks.pages: {error}", file=sys.stderr)
        return 1
    if check and found:
        print(*found, "`python -m benchmarks.pages` rewrites them", sep="\n", file=sys.stderr)
        return 1
    print(*found, f"{len(found)} tables rewritten" if found else "every table is the JSON's", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
