"""A sample set on disk: sampled once, resumed where it was interrupted, never sampled again.

The request names everything that decides the tokens (weights, decoding, seed, BOS, length, how many) and nothing else;
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


def obtain(path: Path, request: Request, sequences: int, batch: int, draw: Draw, done: Callable[[int], None] = lambda rows: None) -> Array:
    """Tokens int32 [S, L] of sequence ids 0..S-1, from `path` or drawn in batches; `done` hears of rows as they are there."""
    if path.exists():
        done(sequences)
        return tables.read(path)[0]["input_ids"]
    parts = path.with_suffix(".parts")
    drawn: list[Array] = []
    start = 0
    while start < sequences:
        part = parts / f"{start:08d}.arrow"
        if part.exists():
            drawn.append(tables.read(part)[0]["input_ids"])
        else:
            sequence_id_B = torch.arange(start, min(start + batch, sequences))
            drawn.append(draw(sequence_id_B).cpu().numpy().astype(np.int32))
            if len(drawn[-1]) < sequences:
                tables.write(part, {"sequence_id": sequence_id_B.numpy().astype(np.uint64), "input_ids": drawn[-1]}, request)
        start += len(drawn[-1])
        done(len(drawn[-1]))
    ids_SL = np.concatenate(drawn)
    tables.write(path, {"sequence_id": np.arange(sequences, dtype=np.uint64), "input_ids": ids_SL}, request)
    shutil.rmtree(parts, ignore_errors=True)
    return ids_SL
