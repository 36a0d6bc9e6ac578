"""Copies from addresses as machine code, by numba, without the interpreter's lock: what trainer/plain.py does; used through trainer/gather.py.

The code is kept beside this file (or where numba keeps its own), so only the first run on a machine compiles, for some seconds.
Shapes: B rows, X values a row, K values of all rows.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba.core import cgutils, types
from numba.extending import intrinsic

Array = npt.NDArray[Any]


def _inttoptr(_: Any, address: Any) -> Any:
    """An address as a pointer."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


_pointer: Any = intrinsic(_inttoptr)


@numba.njit(nogil=True, cache=True)
def spans(address_B: Array, first_B: Array, count_B: Array, start_B: Array) -> int:
    """From each row's offset and the next one's (int64): the first, their difference, and the sum of the differences before; returns that of all."""
    total = 0
    for b in range(len(address_B)):
        offset_2 = numba.carray(_pointer(address_B[b]), 2, np.int64)
        first_B[b], count_B[b], start_B[b] = offset_2[0], offset_2[1] - offset_2[0], total
        total += count_B[b]
    return total


@numba.njit(nogil=True, cache=True)
def rows(
    ids_B: Array, log_prob_B: Array, kept_B: Array, length_B: Array, sequence_id_B: Array, at_B: Array, ids_like: Array, kept_like: Array,
    to_ids_BL: Array, to_log_prob_BL: Array, to_kept_BL: Array, to_length_B: Array, to_sequence_id_B: Array,
) -> None:  # fmt: skip
    """Fill row at_B[b] of every output from the addresses of its columns; ids and counts are of like's types there."""
    length = to_ids_BL.shape[1]
    for b in range(len(at_B)):
        at = at_B[b]
        ids_L, to_ids_L = numba.carray(_pointer(ids_B[b]), length, ids_like.dtype), to_ids_BL[at]
        for t in range(length):
            to_ids_L[t] = ids_L[t]
        log_prob_L, to_log_prob_L = numba.carray(_pointer(log_prob_B[b]), length, np.float32), to_log_prob_BL[at]
        for t in range(length):
            to_log_prob_L[t] = log_prob_L[t]
        kept_L, to_kept_L = numba.carray(_pointer(kept_B[b]), length, kept_like.dtype), to_kept_BL[at]
        for t in range(length):
            to_kept_L[t] = kept_L[t]
        to_length_B[at] = numba.carray(_pointer(length_B[b]), 1, np.int32)[0]
        to_sequence_id_B[at] = numba.carray(_pointer(sequence_id_B[b]), 1, np.int64)[0]


@numba.njit(nogil=True, cache=True)
def lists(address_B: Array, first_B: Array, count_B: Array, start_B: Array, like: Array, out_K: Array) -> None:
    """Fill out_K[start : start + count] of each row with the values first .. first + count - 1 of like's type at its address."""
    for b in range(len(address_B)):
        source_K = numba.carray(_pointer(address_B[b]), first_B[b] + count_B[b], like.dtype)
        out_k = out_K[start_B[b] : start_B[b] + count_B[b]]
        source_k = source_K[first_B[b] :]
        for k in range(count_B[b]):
            out_k[k] = source_k[k]


@numba.njit(nogil=True, cache=True)
def packed(address_B: Array, first_B: Array, count_B: Array, start_B: Array, index_K: Array, code_K: Array) -> None:
    """As `lists`, of uint32 entries `index << 8 | code`, taken apart."""
    for b in range(len(address_B)):
        source_K = numba.carray(_pointer(address_B[b]), first_B[b] + count_B[b], np.uint32)
        for k in range(count_B[b]):
            entry = source_K[first_B[b] + k]
            index_K[start_B[b] + k] = entry >> 8
            code_K[start_B[b] + k] = entry & 255


def load() -> None:
    """Have numba ready; what is compiled for other types is loaded when they come, in milliseconds."""
    spans(*np.empty((4, 0), np.int64))
