"""Rows at addresses of mapped files -> whole arrays: a batch costs a few calls, whatever its rows and wherever they lie.

Contract: machine code (trainer/native.py) and the plain copies (trainer/plain.py), which serve until numba is loaded (0.5 to 1 s, in a
thread of its own) and where there is none, give the same arrays.
Whoever found the addresses checked that they, and the counts beside them, lie inside what is mapped; `Located` keeps it mapped.
Shapes: B rows, L block length, X values a row, K values of all rows, C columns.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from noise.shard import Rows
from trainer import plain

Array = npt.NDArray[Any]
IDS, LOG_PROB, KEPT, LENGTH, SEQUENCE_ID, OFFSET, ENTRIES, CODES, COLUMNS = range(9)
"""Columns of addresses; CODES is 0 where entries are packed."""
_FIXED = slice(OFFSET)
_WIDE = dict.fromkeys(("ids", "kept", "index", "code"), torch.int64)


@dataclass(frozen=True)
class Widths:
    """Types of a shard's columns; they follow from its format version and codec."""

    input_ids: str
    kept: str
    entries: tuple[str, ...]
    """(index, code), or one packed type"""
    block_length: int

    @classmethod
    def of(cls, rows: Rows) -> Widths:
        return cls(rows.input_ids.dtype.str, rows.kept.dtype.str, tuple(column.dtype.str for column in rows.entries), rows.input_ids.shape[1])

    def strides(self) -> Array:
        """Bytes between rows, int64 [C]; the entries' columns begin where their record batch does."""
        length = self.block_length
        found = np.zeros(COLUMNS, np.int64)
        found[:ENTRIES] = (length * np.dtype(self.input_ids).itemsize, length * 4, length * np.dtype(self.kept).itemsize, 4, 8, 8)
        return found


def addresses(rows: Rows) -> Array:
    """Where a record batch's columns begin in memory, int64 [C]."""
    columns = (rows.input_ids, rows.log_prob, rows.kept, rows.length, rows.sequence_id, rows.offset, rows.entries[0], rows.entries[-1])
    assert all(column.flags.c_contiguous for column in columns)
    found = np.array([column.__array_interface__["data"][0] for column in columns], np.int64)
    found[CODES] *= len(rows.entries) == 2
    return found


@dataclass(frozen=True)
class Located:
    """Where the rows of a batch are."""

    address_BC: Array
    """int64"""
    seed_B: Array
    """int64 bit patterns of each row's shard's seed"""
    widths: list[Widths]
    widths_B: Array
    """which of `widths` each row has"""
    keep: Sequence[object]
    """what must stay alive while the addresses are used"""

    @staticmethod
    def join(parts: Sequence[tuple[Array, Located]]) -> Located:
        """Rows of several datasets as one batch; each part comes with the places of its rows in it."""
        count = sum(len(at_B) for at_B, _ in parts)
        address_BC, seed_B, widths_B = np.empty((count, COLUMNS), np.int64), np.empty(count, np.int64), np.empty(count, np.int64)
        widths: list[Widths] = []
        for at_B, part in parts:
            address_BC[at_B], seed_B[at_B], widths_B[at_B] = part.address_BC, part.seed_B, part.widths_B + len(widths)
            widths += part.widths
        return Located(address_BC, seed_B, widths, widths_B, [part.keep for _, part in parts])


@dataclass(frozen=True)
class Columns:
    """A batch's columns as tensors, in int64 and float32, or in the widths of the shards."""

    input_ids_BL: Tensor
    length_B: Tensor
    sequence_id_B: Tensor
    log_prob_N: Tensor
    kept_N: Tensor
    index_K: Tensor
    code_K: Tensor


def columns(located: Located, narrow: bool = False, pin: bool = False) -> Columns:
    """Copy the rows. `narrow`: ids, counts and entries as they are stored; `pin`: into pinned memory, for copies to a GPU."""
    copies: Any = native() if _loaded.is_set() else plain
    address_CB, count = np.ascontiguousarray(located.address_BC.T), len(located.address_BC)
    kinds = np.unique(located.widths_B).tolist() if len(located.widths) > 1 else [0]
    present = [located.widths[kind] for kind in kinds]
    length = present[0].block_length
    type_of = _narrow_types(present) if narrow else _WIDE

    def empty(type_: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=type_, pin_memory=pin)

    spans = np.empty((3, count), np.int64)
    total = copies.spans(address_CB[OFFSET], *spans)
    found = Columns(
        empty(type_of["ids"], count, length), empty(torch.int64, count), empty(torch.int64, count), empty(torch.float32, count * length),
        empty(type_of["kept"], count * length), empty(type_of["index"], total), empty(type_of["code"], total),
    )  # fmt: skip
    index_K, code_K = found.index_K.numpy(), found.code_K.numpy()
    fixed = (
        found.input_ids_BL.numpy(), found.log_prob_N.numpy().reshape(count, length), found.kept_N.numpy().reshape(count, length),
        found.length_B.numpy(), found.sequence_id_B.numpy(),
    )  # fmt: skip
    for kind, widths in zip(kinds, present, strict=True):
        at_B, here_CB, spans_3B = np.arange(count), address_CB, spans
        if len(kinds) > 1:
            at_B = np.flatnonzero(located.widths_B == kind)
            here_CB, spans_3B = np.ascontiguousarray(address_CB[:, at_B]), np.ascontiguousarray(spans[:, at_B])
        ids, kept, *entries = _likes(widths)
        copies.rows(*here_CB[_FIXED], at_B, ids, kept, *fixed)
        if len(entries) == 1:
            copies.packed(here_CB[ENTRIES], *spans_3B, index_K, code_K)
        else:
            copies.lists(here_CB[ENTRIES], *spans_3B, entries[0], index_K)
            copies.lists(here_CB[CODES], *spans_3B, entries[1], code_K)
    return found


@functools.cache
def _likes(widths: Widths) -> list[Array]:
    """Empty arrays of what is stored: ids, counts, and the columns of entries."""
    return [np.empty(0, stored) for stored in (widths.input_ids, widths.kept, *widths.entries)]


def _narrow_types(present: Sequence[Widths]) -> dict[str, torch.dtype]:
    """The least types that hold what is stored."""
    ids = torch.uint16 if all(np.dtype(widths.input_ids).itemsize == 2 for widths in present) else torch.int32
    kept = torch.uint8 if all(np.dtype(widths.kept).itemsize == 1 for widths in present) else torch.int32
    index = torch.uint16 if all(np.dtype(widths.entries[0]).itemsize == 2 for widths in present) else torch.int32
    code = torch.uint8 if all(len(widths.entries) == 1 or np.dtype(widths.entries[1]).itemsize == 1 for widths in present) else torch.int32
    return {"ids": ids, "kept": kept, "index": index, "code": code}


_loaded = threading.Event()


@functools.cache
def native() -> Any:
    """trainer.native, or None where numba is not installed."""
    try:
        from trainer import native
    except ImportError:
        return None
    return native


@functools.cache
def warm() -> threading.Thread:
    """Load the machine code in a thread; copies are plain ones until it is there."""

    def load() -> None:
        if (fast := native()) is not None:
            fast.load()
            _loaded.set()

    thread = threading.Thread(target=load, name="loader's machine code")
    thread.start()
    return thread
