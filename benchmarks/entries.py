"""Ways to store the kept entries of a record batch, for `benchmarks/layout.py`: each is a pair of functions, store and load.

    columns    index and code, a list each: what a reader slices without looking at it
    packed     index << 8 | code in one uint32
    segments   index mod 65,536 and code; `kept` counts the entries of each 65,536 of the vocabulary apart
    bits       index and code in just as many bits as the vocabulary and the largest code need; every row begins at a byte
    deltas     the gaps between a position's ascending entries, seven bits a byte, and code

Ranks by E (an entry's place among its position's words in ascending order, instead of its index) are measured, not
stored: a reader would have to order all V words of every position that it decodes.
Shapes: B rows, L block length, N positions, V vocabulary, K kept entries, Y bytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.teachers import Distributions
from noise import philox
from noise.shard import Rows
from noise.sketch import Codec, encode

Array = npt.NDArray[Any]
Lists = dict[str, tuple[Array, Array]]
"""(values, where each row's begin and the last one's end) of each stored list."""
Store = Callable[[Rows, Codec], tuple[Array, Lists]]
"""(kept [B, L] or [B, L, segments], lists) of a record batch."""
Load = Callable[[Array, Lists, Codec], tuple[Array, Array, Array]]
"""(kept [B, L], index [K], code [K]) int64 of gathered rows."""


def store_columns(rows: Rows, codec: Codec) -> tuple[Array, Lists]:
    return rows.kept, {"index": (rows.index, rows.offset), "code": (rows.code, rows.offset)}


def load_columns(kept_BL: Array, lists: Lists, codec: Codec) -> tuple[Array, Array, Array]:
    return kept_BL.astype(np.int64), lists["index"][0].astype(np.int64), lists["code"][0].astype(np.int64)


def store_packed(rows: Rows, codec: Codec) -> tuple[Array, Lists]:
    return rows.kept, {"entry": (rows.index.astype(np.uint32) << 8 | rows.code, rows.offset)}


def load_packed(kept_BL: Array, lists: Lists, codec: Codec) -> tuple[Array, Array, Array]:
    entry_K = lists["entry"][0]
    return kept_BL.astype(np.int64), (entry_K >> 8).astype(np.int64), (entry_K & 255).astype(np.int64)


def store_segments(rows: Rows, codec: Codec) -> tuple[Array, Lists]:
    segments = -(-codec.vocab_size // 65536)
    owner_K = np.repeat(np.arange(rows.kept.size), rows.kept.reshape(-1))
    kept = np.bincount(owner_K * segments + (rows.index >> 16), minlength=rows.kept.size * segments)
    lists = {"index": (rows.index.astype(np.uint16), rows.offset), "code": (rows.code, rows.offset)}
    return kept.reshape(*rows.kept.shape, segments), lists


def load_segments(kept_BX: Array, lists: Lists, codec: Codec) -> tuple[Array, Array, Array]:
    segments = -(-codec.vocab_size // 65536)
    kept_BLS = kept_BX.reshape(len(kept_BX), -1, segments).astype(np.int64)
    high_K = np.repeat(np.broadcast_to(np.arange(segments) << 16, kept_BLS.shape).reshape(-1), kept_BLS.reshape(-1))
    return kept_BLS.sum(2), lists["index"][0] + high_K, lists["code"][0].astype(np.int64)


def bit_widths(codec: Codec) -> tuple[int, int]:
    """(bits of an index, bits of a code): the largest code that can be kept is -ln(c 2^-33 / (24 ln 2)) / step."""
    largest = math.floor((33 * math.log(2) + math.log(24 * math.log(2) / codec.c)) / codec.step)
    return (codec.vocab_size - 1).bit_length(), largest.bit_length()


def store_bits(rows: Rows, codec: Codec) -> tuple[Array, Lists]:
    width = sum(bit_widths(codec))
    entry_K = rows.index.astype(np.uint64) << np.uint64(bit_widths(codec)[1]) | rows.code
    parts = []
    for start, stop in zip(rows.offset[:-1], rows.offset[1:], strict=True):
        bits = (entry_K[start:stop, None] >> np.arange(width, dtype=np.uint64)) & np.uint64(1)
        parts.append(np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little"))
    return rows.kept, {"bits": (np.concatenate(parts), np.cumsum([0] + [len(part) for part in parts]))}


def load_bits(kept_BL: Array, lists: Lists, codec: Codec) -> tuple[Array, Array, Array]:
    index_bits, code_bits = bit_widths(codec)
    kept_BL = kept_BL.astype(np.int64)
    values, offset = lists["bits"]
    count_B = kept_BL.sum(1)
    within_K = np.arange(count_B.sum()) - np.repeat(np.cumsum(count_B) - count_B, count_B)
    bit_K = np.repeat(8 * offset[:-1], count_B) + within_K * (index_bits + code_bits)
    byte_K, shift_K = bit_K >> 3, bit_K & 7
    padded = np.pad(values, (0, 8)).astype(np.int64)
    entry_K = sum(padded[byte_K + byte] << (8 * byte) for byte in range((index_bits + code_bits + 14) // 8)) >> shift_K
    return kept_BL, entry_K >> code_bits & (1 << index_bits) - 1, entry_K & (1 << code_bits) - 1


def varints(value_K: Array) -> tuple[Array, Array]:
    """(bytes [Y] of the values, seven bits each, the high bit says that more follow; how many each value takes [K])."""
    size_K = 1 + sum((value_K >= 1 << 7 * more).astype(np.int64) for more in range(1, 5))
    within_Y = np.arange(size_K.sum()) - np.repeat(np.cumsum(size_K) - size_K, size_K)
    more_Y = within_Y < np.repeat(size_K, size_K) - 1
    return (np.repeat(value_K, size_K) >> 7 * within_Y & 127 | more_Y << 7).astype(np.uint8), size_K


def from_varints(byte_Y: Array) -> Array:
    ends_Y = byte_Y < 128
    if not len(byte_Y):
        return np.zeros(0, np.int64)
    start_K = np.concatenate([[0], np.flatnonzero(ends_Y)[:-1] + 1])
    within_Y = np.arange(len(byte_Y)) - np.repeat(start_K, np.diff(start_K, append=len(byte_Y)))
    return np.add.reduceat((byte_Y & 127).astype(np.int64) << 7 * within_Y, start_K)


def gaps(value_K: Array, kept_N: Array) -> Array:
    """Of ascending values within each position: the first, then each one's distance from the one before, less one."""
    gap_K = np.diff(value_K.astype(np.int64), prepend=0) - 1
    first_K = (np.cumsum(kept_N) - kept_N)[kept_N > 0]
    gap_K[first_K] = value_K[first_K]
    return gap_K


def store_deltas(rows: Rows, codec: Codec) -> tuple[Array, Lists]:
    byte_Y, size_K = varints(gaps(rows.index, rows.kept.reshape(-1).astype(np.int64)))
    return rows.kept, {"gap": (byte_Y, np.concatenate([[0], np.cumsum(size_K)])[rows.offset]), "code": (rows.code, rows.offset)}


def load_deltas(kept_BL: Array, lists: Lists, codec: Codec) -> tuple[Array, Array, Array]:
    kept_N = kept_BL.reshape(-1).astype(np.int64)
    upto_K = np.cumsum(from_varints(lists["gap"][0]) + 1)
    start_N = np.cumsum(kept_N) - kept_N
    before_N = np.where(start_N > 0, upto_K[start_N - 1], 0) if len(upto_K) else start_N
    return kept_BL.astype(np.int64), upto_K - np.repeat(before_N, kept_N) - 1, lists["code"][0].astype(np.int64)


STORE: dict[str, Store] = {
    "columns": store_columns, "packed": store_packed, "segments": store_segments, "bits": store_bits, "deltas": store_deltas,
}  # fmt: skip
LOAD: dict[str, Load] = {
    "columns": load_columns, "packed": load_packed, "segments": load_segments, "bits": load_bits, "deltas": load_deltas,
}  # fmt: skip


def ranks(source: Distributions, places_N5: torch.Tensor, codec: Codec) -> dict[str, float]:
    """Bytes a token of the entries' ranks by E and of their indices, both as ascending gaps in seven-bit bytes; cost of ordering words."""
    taken = {"rank_bytes": 0, "index_bytes": 0}
    seconds = {"words": 0.0, "order": 0.0}
    for part in (slice(start, start + 32) for start in range(0, len(source.token_N), 32)):
        sketch = encode(source.log_probs_NV[part], source.token_N[part], places_N5[part], codec)
        began = time.perf_counter()
        word_nV = philox.gumbel(places_N5[part], codec.vocab_size)
        between = time.perf_counter()
        order_nV = (-word_nV).argsort(1)
        if part.start:  # the first round warms up
            seconds["words"] += between - began
            seconds["order"] += time.perf_counter() - between
        rank_nV = torch.empty_like(order_nV).scatter_(1, order_nV, torch.arange(codec.vocab_size).expand_as(order_nV))
        owner_K = torch.repeat_interleave(torch.arange(len(rank_nV)), sketch.kept_N)
        rank_K = rank_nV[owner_K, sketch.index_K]
        rank_K = rank_K[(owner_K * codec.vocab_size + rank_K).argsort()]
        for name, value_K in (("rank_bytes", rank_K), ("index_bytes", sketch.index_K)):
            taken[name] += len(varints(gaps(value_K.numpy(), sketch.kept_N.numpy()))[0])
    figures = {name: count / len(source.token_N) for name, count in taken.items()}
    return figures | {"rank_cost": seconds["order"] / seconds["words"] if seconds["words"] else 0.0}
