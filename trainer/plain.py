"""Copies from addresses in numpy: what trainer/native.py does, where numba is not loaded yet or not there; used through trainer/gather.py.

Shapes: B rows, L block length, K values of all rows.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def spans(address_B: Array, first_B: Array, count_B: Array, start_B: Array) -> int:
    """As in native."""
    for b, address in enumerate(address_B.tolist()):
        first_B[b], stop = _view(address, 2, np.dtype(np.int64))
        count_B[b] = stop - first_B[b]
    start_B[:] = np.cumsum(count_B) - count_B
    return int(count_B.sum())


def rows(
    ids_B: Array, log_prob_B: Array, kept_B: Array, length_B: Array, sequence_id_B: Array, at_B: Array, ids_like: Array, kept_like: Array,
    to_ids_BL: Array, to_log_prob_BL: Array, to_kept_BL: Array, to_length_B: Array, to_sequence_id_B: Array,
) -> None:  # fmt: skip
    """As in native."""
    at, length, single = at_B.tolist(), to_ids_BL.shape[1], np.dtype(np.float32)
    for source_B, kind, out_BL in ((ids_B, ids_like.dtype, to_ids_BL), (log_prob_B, single, to_log_prob_BL), (kept_B, kept_like.dtype, to_kept_BL)):
        for b, address in zip(at, source_B.tolist(), strict=True):
            out_BL[b] = _view(address, length, kind)
    for source_B, kind, out_B in ((length_B, np.dtype(np.int32), to_length_B), (sequence_id_B, np.dtype(np.int64), to_sequence_id_B)):
        for b, address in zip(at, source_B.tolist(), strict=True):
            out_B[b] = _view(address, 1, kind)[0]


def lists(address_B: Array, first_B: Array, count_B: Array, start_B: Array, like: Array, out_K: Array) -> None:
    """As in native."""
    for address, first, count, start in zip(*(part.tolist() for part in (address_B, first_B, count_B, start_B)), strict=True):
        out_K[start : start + count] = _view(address + first * like.itemsize, count, like.dtype)


def packed(address_B: Array, first_B: Array, count_B: Array, start_B: Array, index_K: Array, code_K: Array) -> None:
    """As in native."""
    for address, first, count, start in zip(*(part.tolist() for part in (address_B, first_B, count_B, start_B)), strict=True):
        entry_k = _view(address + first * 4, count, np.dtype(np.uint32))
        index_K[start : start + count], code_K[start : start + count] = entry_k >> 8, entry_k & 255


def _view(address: int, count: int, kind: np.dtype[Any]) -> Array:
    content: Any = (ctypes.c_char * (count * kind.itemsize)).from_address(address)
    return np.frombuffer(content, kind) if count else np.empty(0, kind)
