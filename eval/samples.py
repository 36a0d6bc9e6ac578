"""A sample set on disk: sampled once, resumed where it was interrupted, never sampled again.

The request names everything that decides the tokens (weights, decoding, seed, what is given, how many) and nothing else;
the batch size is not part of it. Finished batches wait in `NAME.parts/`, become one Arrow file at the end, and go.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from eval import tables
from eval.metrics import Array
from eval.tables import Request

FORMAT_VERSION = 1

Draw = Callable[[Tensor], Tensor]
"""int64 sequence ids [B] -> int64 tokens [B, L]"""
DrawColumns = Callable[[Tensor], dict[str, Array]]
"""int64 sequence ids [B] -> columns [B] or [B, L] by name"""


def obtain(path: Path, request: Request, sequences: int, batch: int, draw: Draw, done: Callable[[int], None] = lambda rows: None) -> Array:
    """Tokens int32 [S, L] of sequence ids 0..S-1, from `path` or drawn in batches; `done` hears of rows as they are there."""

    def columns(sequence_id_B: Tensor) -> dict[str, Array]:
        return {"input_ids": draw(sequence_id_B).cpu().numpy().astype(np.int32)}

    return obtain_columns(path, request, sequences, batch, columns, done)["input_ids"]


def obtain_columns(
    path: Path, request: Request, sequences: int, batch: int, draw: DrawColumns, done: Callable[[int], None] = lambda rows: None
) -> dict[str, Array]:
    """`obtain` for sets that say more of each sequence than its tokens: columns [S] or [S, L] by name, sequence_id among them."""
    if path.exists():
        done(sequences)
        return tables.read(path)[0]
    parts = path.with_suffix(".parts")
    drawn: list[dict[str, Array]] = []
    start = 0
    while start < sequences:
        part = parts / f"{start:08d}.arrow"
        if part.exists():
            drawn.append(tables.read(part)[0])
        else:
            sequence_id_B = torch.arange(start, min(start + batch, sequences))
            drawn.append({"sequence_id": sequence_id_B.numpy().astype(np.uint64), **draw(sequence_id_B)})
            if len(sequence_id_B) < sequences:
                tables.write(part, drawn[-1], request)
        start += len(drawn[-1]["sequence_id"])
        done(len(drawn[-1]["sequence_id"]))
    columns = {name: np.concatenate([part[name] for part in drawn]) for name in drawn[0]}
    tables.write(path, columns, request)
    shutil.rmtree(parts, ignore_errors=True)
    return columns
