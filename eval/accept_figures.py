"""Columns of `accept` -> its figures with bootstrap intervals over sequences, and their table.

Of a system's drafts, `head` is which drafted token was judged at a position (0: none was), `stands` whether it stood, `offered` how many
drafts had a k-th token. So with k from 1:

    tokens_per_call         tokens written / teacher calls: 1 is plain sampling
    accepted_per_call       drafted tokens that stood / teacher calls
    heads[k].acceptance     k-th tokens that stood / drafts that had one
    heads[k].conditional    k-th tokens that stood / k-th tokens that were judged: those whose predecessors stood
    positions[t]            share of the rows whose token at t was drafted; and of the tokens drafted and judged there, the share that stood
    speed                   seconds of plain sampling / seconds of this system, on the same rows

Shapes: S sequences, L positions, K tokens of a draft, R replicates + 1.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from eval.metrics import Array, Interval
from eval.page import interval
from noise.storage import DatasetError

Figures = dict[str, Any]
_GROUPS = 8
"""Columns of positions in the table."""


def figures(labels: list[tuple[str, str]], columns: dict[str, Array], weights_RS: Array, dtype: str, tolerance: float | None) -> Figures:
    """accept.json but for its settings. Raises DatasetError where a text differs by more than `tolerance` (None: nothing is too much)."""
    systems = []
    for at, (name, rule) in enumerate(labels, start=1):
        own = {column.split("/", 1)[1]: values for column, values in columns.items() if column.startswith(f"{at}/")}
        found = _system(own, columns, weights_RS)
        if "differs_at" in own:
            found["divergence"] = _divergence(f"{name}, {rule}", own, columns, dtype, tolerance)
        systems.append({"name": name, "rule": rule, **found})
    report: Figures = {"systems": systems, "seconds_a_sequence_plain": float(columns["seconds"].mean())}
    if "is_text" in columns:
        report["rows_that_are_the_datasets_text"] = int(columns["is_text"].sum())
    return report


def _system(own: dict[str, Array], columns: dict[str, Array], weights_RS: Array) -> Figures:
    head_SL, stands_SL, calls_S = own["head"], own["stands"].astype(bool), own["calls"]
    position_L = np.arange(head_SL.shape[1])
    written_SL = (position_L >= columns["given"][:, None]) & (position_L < columns["length"][:, None])

    def ratio(over_S: Array, under_S: Array) -> dict[str, float]:
        return asdict(_ratio(over_S, under_S, weights_RS))

    heads = []
    for k in range(1, own["offered"].shape[1] + 1):
        offered_S, judged_SL = own["offered"][:, k - 1], head_SL == k
        if offered_S.any():
            stood_S = (judged_SL & stands_SL).sum(1)
            heads.append({"offered": int(offered_S.sum()), "acceptance": ratio(stood_S, offered_S), "conditional": ratio(stood_S, judged_SL.sum(1))})
    positions = []
    for t in position_L[written_SL.any(0)]:
        line = {"position": int(t), "rows": int(written_SL[:, t].sum()), "drafted": ratio(stands_SL[:, t], written_SL[:, t])}
        positions.append({**line, "judged": int((head_SL[:, t] > 0).sum()), "stood_of_judged": ratio(stands_SL[:, t], head_SL[:, t] > 0)})
    return {
        "tokens_per_call": ratio(columns["tokens"], calls_S),
        "accepted_per_call": ratio(stands_SL.sum(1), calls_S),
        "drafter_calls_per_call": ratio(own["drafter_calls"], calls_S),
        "speed": ratio(columns["seconds"], own["seconds"]),
        "heads": heads,
        "positions": positions,
    }


def _ratio(over_S: Array, under_S: Array, weights_RS: Array) -> Interval:
    """Sum over sum, 0 where nothing is divided."""
    under_R = weights_RS.astype(np.float64) @ under_S.astype(np.float64)
    return Interval.of((weights_RS.astype(np.float64) @ over_S.astype(np.float64)) / np.where(under_R > 0, under_R, 1.0))


def _divergence(label: str, own: dict[str, Array], columns: dict[str, Array], dtype: str, tolerance: float | None) -> Figures:
    """Rows whose text is not plain sampling's: how many, and where they leave it."""
    rows = np.flatnonzero(own["differs_at"])
    lines = [f"sequence {row}, position {own['differs_at'][row]}: {own['gap'][row]:.1e} apart in log p + g" for row in rows]
    if tolerance is not None:
        for row, line in zip(rows, lines, strict=True):
            if not own["gap"][row] < tolerance:
                raise DatasetError(f"{label}: {line}, which is no near tie in {dtype}: the teacher's cached and whole forwards do not agree")
    same = np.where(own["differs_at"] > 0, own["differs_at"] + 1, columns["length"]) - columns["given"]
    return {"rows": len(rows), "of": len(own["differs_at"]), "a_token": len(rows) / max(1, int(same.sum())), "near_ties": lines if tolerance else []}


def show(report: Figures) -> None:
    """Print the tables."""
    console = Console()
    console = console if console.is_terminal else Console(width=160)
    settings = report["settings"]
    title = f"{settings['sequences']} sequences of {settings['length']} positions, drafts of at most {settings['block']} tokens (95% interval)"
    table = Table("drafter", "rule", "tokens a teacher call", "drafted tokens that stand, a call", "drafter calls", "times as fast", title=title)
    heads = Table("drafter", "rule", *(f"token {k}" for k in range(1, 1 + max(len(system["heads"]) for system in report["systems"]))),
                  title="How often the k-th drafted token stands, where those before it did")  # fmt: skip
    groups = _groups([line["position"] for line in report["systems"][0]["positions"]])
    places = Table(
        "drafter",
        "rule",
        *(f"{first}–{last}" if first < last else str(first) for first, last in groups),
        title="Share of drafted tokens, by position",
    )
    for system in report["systems"]:
        label = (system["name"], system["rule"])
        table.add_row(*label, *(interval(system[name], 2) for name in ("tokens_per_call", "accepted_per_call", "drafter_calls_per_call", "speed")))
        heads.add_row(*label, *(interval(head["conditional"], 3) for head in system["heads"]))
        places.add_row(*label, *(f"{_pooled(system['positions'], *group):.3f}" for group in groups))
    for part in (table, heads, places):
        console.print(part)
    for system in report["systems"]:
        if divergence := system.get("divergence"):
            differ = f"{divergence['rows']} of {divergence['of']} rows differ from plain sampling in {settings['dtype']}"
            console.print(f"{system['name']}: {differ}" + (", all near ties" if divergence["near_ties"] else ""), highlight=False, soft_wrap=True)
    if "rows_that_are_the_datasets_text" in report:
        console.print(f"{report['rows_that_are_the_datasets_text']} of {settings['sequences']} rows come out as the dataset's text", highlight=False)


def _groups(positions: list[int]) -> list[tuple[int, int]]:
    parts = np.array_split(np.array(positions), min(_GROUPS, len(positions)))
    return [(int(part[0]), int(part[-1])) for part in parts]


def _pooled(positions: list[Figures], first: int, last: int) -> float:
    inside = [line for line in positions if first <= line["position"] <= last]
    return float(sum(line["rows"] * line["drafted"]["value"] for line in inside) / max(1, sum(line["rows"] for line in inside)))
