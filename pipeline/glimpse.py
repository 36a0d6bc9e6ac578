"""A look into a dataset: a few record batches of at most SHARDS shards, however many there are.

What is seen is not checked against hashes (`verify` does that), but its structure is, as always. Shapes: B rows, L block length.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from noise.dataset import Manifest
from noise.folder import Folder
from noise.shard import Rows
from noise.storage import DatasetError

SHARDS = 3
BATCHES = 2
"""Of each shard: its first and its middle one."""
CHARACTERS = 240
"""Of a row's text."""
BARS = " ▁▂▃▄▅▆▇█"


@dataclass
class Glimpse:
    """What was seen."""

    extraction: str
    shards: list[int]
    kept_L: np.ndarray
    """Entries at each position, summed over the rows seen."""
    noisy_L: np.ndarray
    """Rows with noise there."""
    rows: list[tuple[int, int, Rows]] = field(default_factory=list)
    """(shard, row, the row) of some."""

    def kept_by_position(self) -> list[float | None]:
        """Mean of kept entries at each position; None where no row seen has noise."""
        return [float(kept / noisy) if noisy else None for kept, noisy in zip(self.kept_L, self.noisy_L, strict=True)]


def look(folder: Folder, manifest: Manifest, rows: int) -> Glimpse:
    """At evenly spaced shards, and about `rows` rows of them. Raises DatasetError where one is damaged."""
    extraction, length = manifest.identity["extraction"], manifest.identity["block_length"]
    filled = [receipt for receipt in manifest.receipts if receipt.rows]
    chosen = [filled[at] for at in sorted(set(np.linspace(0, len(filled) - 1, min(SHARDS, len(filled))).astype(int).tolist()))] if filled else []
    seen = Glimpse(extraction, [receipt.shard for receipt in chosen], np.zeros(length, np.int64), np.zeros(length, np.int64))
    for number, receipt in enumerate(chosen):
        reader = manifest.open(folder, receipt, check_hash=False)
        for batch in sorted({0, reader.batches // 2}) if reader.batches else []:
            part = reader.batch(batch)
            seen.kept_L += part.kept.sum(0, dtype=np.int64)
            seen.noisy_L += part.has_noise(extraction).sum(0)
            if not batch:
                wanted = min(rows // len(chosen) + (number < rows % len(chosen)), len(part))
                seen.rows += [(receipt.shard, row, part[row : row + 1]) for row in range(wanted)]
    return seen


def rows_in_words(seen: Glimpse, folder: Folder) -> list[dict[str, Any]]:
    """The rows as JSON: where they are, what a position costs, and their text."""
    return [about(shard, row, rows, seen.extraction) | text_of(folder, rows) for shard, row, rows in seen.rows]


def about(shard: int, row: int, rows: Rows, extraction: str) -> dict[str, Any]:
    tokens = int(rows.has_noise(extraction).sum())
    value = {"shard": shard, "row": row, "sequence_id": str(int(rows.sequence_id[0])), "length": int(rows.length[0]), "positions_with_noise": tokens}
    return value | ({"nll": -float(rows.log_prob.sum(dtype=np.float64)) / tokens, "kept": int(rows.kept.sum()) / tokens} if tokens else {})


def text_of(folder: Folder, rows: Rows) -> dict[str, Any]:
    """The first characters of a row, by the dataset's own tokenizer; its first ids where that cannot be read."""
    ids = [int(token) for token in rows.input_ids[0, : int(rows.length[0])]]
    try:
        from pipeline.tokenizer import Tokenizer

        text = Tokenizer(folder.fetched("tokenizer")).decode(ids[: 4 * CHARACTERS])
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a tokenizer from anywhere can fail in any way, and its library's panics are no Exceptions
        return {"ids": ids[:32], "text_unreadable": f"{type(error).__name__}: {error}"[:200]}
    return {"text": text[:CHARACTERS] + ("..." if len(text) > CHARACTERS or len(ids) > 4 * CHARACTERS else "")}


def bars(values: list[float | None], width: int = 64) -> str:
    """One character for each of at most `width` groups of positions; the highest is the largest mean."""
    groups = [[value for value in group if value is not None] for group in np.array_split(np.array(values, object), min(width, len(values)))]
    means = [sum(group) / len(group) if group else 0.0 for group in groups]
    top = max([*means, 1e-9])
    return "".join(BARS[-(-int(1000 * mean / top) * (len(BARS) - 1) // 1000)] for mean in means)


def draw(seen: Glimpse, bound: float, path: Path) -> None:
    """Kept entries by position, as a picture. Raises DatasetError where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise DatasetError("--plot needs matplotlib: install it, or leave --plot out") from None
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.add_subplot()
    values = [float("nan") if value is None else value for value in seen.kept_by_position()]
    axes.step(range(len(values)), values, where="mid", label=f"{int(seen.noisy_L.sum()):,} positions of {len(seen.shards)} shards")
    axes.axhline(bound, linestyle="--", color="grey", label=f"bound on the mean, R / c = {bound:.2f}")
    axes.set(xlabel="position in the row", ylabel="kept entries", ylim=(0, None))
    axes.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_figure(str(path), dpi=120, format=path.suffix.lstrip(".") or "png")
