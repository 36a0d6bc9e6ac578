"""The tables of benchmarks.one_call in Markdown: what each student did, and what it read."""

from __future__ import annotations

from typing import Any

import numpy as np

Figures = dict[str, Any]


def markdown(figures: Figures) -> str:
    """Three tables: students, windows, positions."""
    return "\n\n".join(_table(*table(figures)) for table in (students, windows, positions))


def students(figures: Figures) -> tuple[list[str], list[list[str]]]:
    """Means over seeds; where there are several, lowest to highest of match."""
    head = ["factor", "student", "MFLOPs a row", "match", "prefix", "follows", "posterior", "match - posterior", "reach", "valid, 1 call", "2", "4"]
    rows = []
    for row in figures["students"]:
        every = list(row["seeds"].values())
        match = [each["match"]["mean"] for each in every]
        spread = f" ({min(match):.3f} to {max(match):.3f})" if len(every) > 1 else ""
        gap = np.mean([each["match"]["mean"] - each["posterior"]["mean"] for each in every])
        error = np.sqrt(sum(each[name]["error"] ** 2 for each in every for name in ("match", "posterior"))) / len(every)
        rows.append([
            row["factor"], row["name"], f"{every[0]['flops'] / 1e6:.1f}", f"{np.mean(match):.3f}{spread}",
            f"{np.mean([each['prefix']['mean'] for each in every]):.2f}", f"{np.mean([each['follows']['mean'] for each in every]):.3f}",
            f"{np.mean([each['posterior']['mean'] for each in every]):.3f}", f"{gap:+.4f} ± {1.96 * error:.4f}", f"{row['reach']:.1f}",
            *(f"{np.mean([each['valid'][nfe] for each in every]):.3f}" for nfe in every[0]["valid"]),
        ])  # fmt: skip
    return head, rows


def windows(figures: Figures) -> tuple[list[str], list[list[str]]]:
    """Match by the noises that a position sees, fresh noise elsewhere."""
    names = [window["shown"] for window in next(iter(figures["students"][0]["seeds"].values()))["windows"]]
    best = [f"{figures['ideal'][int(name)]:.3f}" if name.isdigit() else f"{figures['ideal'][-1]:.3f}" for name in names]
    rows = [["ideal reader", *best]]
    for row in figures["students"]:
        match_L = np.mean([[window["match"] for window in each["windows"]] for each in row["seeds"].values()], axis=0)
        rows.append([row["name"], *(f"{match:.3f}" for match in match_L)])
    return ["match, shown its own noise and", *(f"{name} before" if name.isdigit() else name for name in names)], rows


def positions(figures: Figures) -> tuple[list[str], list[list[str]]]:
    """Match at each position of the row."""
    rows = []
    for row in figures["students"]:
        share_L = np.mean([each["by_position"] for each in row["seeds"].values()], axis=0)
        rows.append([row["name"], *(f"{share:.2f}" for share in share_L)])
    return ["match at position", *(str(at + 1) for at in range(len(rows[0]) - 1))], rows


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))
