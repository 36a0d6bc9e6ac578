"""Rows to lay out, for `benchmarks/layout.py`: a record batch drawn from the simulated teacher, or a dataset's own.

A simulated row's tokens and kept entries are drawn from the sketch's own law, without a noise stream: given E_0, entry i
is kept with probability 1 - exp(-p_i E_0 / c), independently, which is that it occurs at all among Poisson(E_0 / c)
samples of p. With several draws E_0 is their sum. So a position costs a few samples, and 65,000 of them a minute.
Shapes: B rows, L block length, N positions, V vocabulary, K kept entries.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import teachers
from noise.dataset import Manifest, open_shard
from noise.shard import ROWS_PER_BATCH, Rows
from noise.sketch import Codec
from noise.storage import DatasetError

Array = npt.NDArray[Any]
CHUNK = 64  # distributions at a time


def simulated(codec: Codec, block_length: int, distributions: int, seed: int) -> Rows:
    """One record batch whose positions share that many distributions at random; sequence ids are 0, 1, ..."""
    random = np.random.default_rng(seed)
    noisy = block_length - 1
    total = ROWS_PER_BATCH * noisy
    which_N = np.sort(random.integers(distributions, size=total))
    token_N, log_prob_N, kept_N = np.empty(total, np.int64), np.empty(total, np.float32), np.empty(total, np.int64)
    index: list[Array] = []
    code: list[Array] = []
    for first in range(0, distributions, CHUNK):
        source = teachers.simulated(codec.vocab_size, CHUNK, 1, seed + 1 + first)
        start, stop = np.searchsorted(which_N, [first, first + CHUNK])
        for n in range(start, stop):
            log_p_V = source.log_probs_NV[which_N[n] - first].numpy()
            if n == start or which_N[n] != which_N[n - 1]:
                upto_V = np.cumsum(np.exp(log_p_V.astype(np.float64)))
            e0 = random.standard_gamma(codec.draws)  # the sum of the draws' E_0
            draws = np.searchsorted(upto_V, random.random(1 + random.poisson(e0 / codec.c)) * upto_V[-1])
            kept_K = np.setdiff1d(draws[1:], draws[:1])
            token_N[n], log_prob_N[n], kept_N[n] = draws[0], log_p_V[draws[0]], len(kept_K)
            index.append(kept_K)
            code.append(np.floor(-log_p_V[kept_K].astype(np.float64) / codec.step))
    order_N = random.permutation(total)

    def column(values_N: Array, kind: str) -> Array:
        return np.pad(values_N[order_N].reshape(-1, noisy), ((0, 0), (1, 0))).astype(kind)

    kept_BL = column(kept_N, "uint16")
    return Rows(
        np.arange(ROWS_PER_BATCH, dtype=np.uint64),
        column(token_N, "int32"),
        np.full(ROWS_PER_BATCH, block_length, np.int32),
        column(log_prob_N, "float32"),
        kept_BL,
        (
            np.concatenate([index[n] for n in order_N]).astype(f"uint{8 * codec.index_bytes}"),
            np.concatenate([code[n] for n in order_N]).astype(f"uint{8 * codec.code_bytes}"),
        ),
        np.concatenate([[0], np.cumsum(kept_BL.sum(1, dtype=np.int64))]),
    )


def of_dataset(folder: Path) -> tuple[Rows, Codec]:
    """The first whole record batches of a dataset, about 64 x 1,024 positions of them."""
    manifest = Manifest.read(folder)
    codec = Codec(manifest.identity["vocab_size"], manifest.identity["epsilon"], manifest.identity["draws"])
    wanted = max(ROWS_PER_BATCH, 65536 // manifest.identity["block_length"])
    parts: list[Rows] = []
    for receipt in manifest.receipts:
        for rows in open_shard(folder, receipt, manifest.identity):
            if len(rows) == ROWS_PER_BATCH and sum(map(len, parts)) < wanted:
                parts.append(rows)
    if not parts:
        raise DatasetError(f"{folder} has no full record batch of {ROWS_PER_BATCH} rows")
    return Rows.concatenate(parts), codec
