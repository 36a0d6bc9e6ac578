"""Copies from addresses as machine code, by numba, without the interpreter's lock; used through trainer/gather.py.

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
def fixed(address_B: Array, like: Array, out_BX: Array) -> None:
    """Fill out_BX with the X values of like's type at each address, in out's type."""
    for b in range(len(address_B)):
        source_X = numba.carray(_pointer(address_B[b]), out_BX.shape[1], like.dtype)
        for x in range(out_BX.shape[1]):
            out_BX[b, x] = source_X[x]


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
    """Have numba ready; each type that is copied later is loaded when it comes, in milliseconds."""
    fixed(np.empty(0, np.int64), np.empty(0, np.int64), np.empty((0, 2), np.int64))
