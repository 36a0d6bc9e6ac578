"""The stream's words and the search for candidates as CPU machine code, by numba; used through noise/compiled.py where numba is there.

LLVM turns the loop over blocks into vector code: about one cycle a word with AVX-512 (`python -m benchmarks.encode`).
Words and uniforms are bit-equal to noise/philox.py's. The first call compiles, for about two seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
F = TypeVar("F", bound=Callable[..., Any])

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)
_HALF = np.uint64(32)
_F32: Any = np.float32
_TWO32, _LARGEST_UNIFORM, _ONE_HALF = np.float32(2.0**-32), np.float32(1 - 2**-24), np.float32(0.5)
_TILE = 4096  # entries at a time: 16 KB of words stay in the first cache
_ROOM = 64  # candidates a position that there is room for at first


def _machine_code(function: F) -> F:
    return cast(F, numba.njit(nogil=True)(function))


def find(logits_NV: Array, normaliser_N: Array, rows_N5: Array, scale: float, offset_N: Array) -> tuple[Array, Array, Array]:
    """(owner, index, word), int64 [K], row-major; see noise/candidates.py. float32 logits, normaliser and offset; int64 rows.

    One thread: torch's own spin for a while after a forward, and threads beside them made this three times slower.
    """
    room = _ROOM * len(logits_NV)
    while True:
        found_3K = np.empty((3, room), np.int64)
        total = _search(logits_NV, normaliser_N, rows_N5, _F32(scale), offset_N, found_3K)
        if total <= room:
            return found_3K[0, :total], found_3K[1, :total], found_3K[2, :total]
        room = total


@_machine_code
def words(row_5: Array, first: int, count: int, word_T: Array) -> None:
    """The words of blocks first .. first + count - 1, into uint32 word_T[: 4 count]."""
    for j in range(count):
        c0, c1, c2, c3 = np.uint32(first + j), np.uint32(row_5[2]), np.uint32(row_5[3]), np.uint32(row_5[4])
        k0, k1 = np.uint32(row_5[0]), np.uint32(row_5[1])
        for _ in range(10):
            product0, product1 = np.uint64(c0) * _M0, np.uint64(c2) * _M1
            c0, c1 = np.uint32(product1 >> _HALF) ^ c1 ^ k0, np.uint32(product1)
            c2, c3 = np.uint32(product0 >> _HALF) ^ c3 ^ k1, np.uint32(product0)
            k0, k1 = np.uint32(k0 + _W0), np.uint32(k1 + _W1)
        word_T[4 * j], word_T[4 * j + 1], word_T[4 * j + 2], word_T[4 * j + 3] = c0, c1, c2, c3


@_machine_code
def _compare(bits_T: Array, logit_T: Array, normaliser: float, scale: float, offset: float, hit_T: Array) -> None:
    for i in range(len(logit_T)):
        hit_T[i] = np.float32(bits_T[i]) <= (logit_T[i] - normaliser) * scale + offset


@_machine_code
def _search(logits_NV: Array, normaliser_N: Array, rows_N5: Array, scale: float, offset_N: Array, found_3K: Array) -> int:
    """Fill found_3K as far as it reaches; returns how many candidates there are."""
    vocab_size = logits_NV.shape[1]
    word_T = np.zeros(_TILE, np.uint32)
    float_T = np.zeros(_TILE, np.float32)
    hit_T = np.zeros(_TILE, np.uint8)
    bits_T, eight_T = float_T.view(np.int32), hit_T.view(np.uint64)
    total = 0
    for n in range(len(logits_NV)):
        for start in range(0, vocab_size, _TILE):
            count = min(_TILE, vocab_size - start)
            words(rows_N5[n], start // 4, (count + 3) // 4, word_T)
            for i in range(_TILE):
                float_T[i] = np.float32(word_T[i])
            _compare(bits_T, logits_NV[n, start : start + count], normaliser_N[n], scale, offset_N[n], hit_T)
            hit_T[count:] = 0
            for group in range((count + 7) // 8):
                if eight_T[group]:
                    for i in range(8 * group, 8 * group + 8):
                        if hit_T[i]:
                            if total < found_3K.shape[1]:
                                found_3K[0, total], found_3K[1, total], found_3K[2, total] = n, start + i, word_T[i]
                            total += 1
    return total


@_machine_code
def uniform(rows_N5: Array, first: int, v_NV: Array) -> None:
    """Fill float32 v_NV with the stream's uniforms from block `first` on; see noise/philox.py."""
    word_T = np.zeros(_TILE, np.uint32)
    for n in range(len(rows_N5)):
        for start in range(0, v_NV.shape[1], _TILE):
            count = min(_TILE, v_NV.shape[1] - start)
            words(rows_N5[n], first + start // 4, (count + 3) // 4, word_T)
            v_T = v_NV[n, start : start + count]
            for i in range(count):
                v_T[i] = min((np.float32(word_T[i]) + _ONE_HALF) * _TWO32, _LARGEST_UNIFORM)
