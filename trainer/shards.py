"""A finished dataset's rows at random: shards are mapped when they are needed, record batches looked at once, rows found by address.

At most `open_shards` shards are mapped, or as many as one batch touches. A shard's sha256 is checked when it is first opened,
a record batch's structure when it is first read from a mapped shard. At a URI, shards come through a cache on this machine
(trainer/cache.py), and those of the windows ahead are fetched before they are needed.
Shapes: B rows, S shards, C columns of addresses.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from noise.dataset import Manifest
from noise.folder import Folder
from noise.local import LocalFolder
from noise.shard import ROWS_PER_BATCH, Rows, ShardReader
from noise.sketch import Codec, Sketch
from noise.storage import DatasetError
from trainer import gather
from trainer.batch import Batch
from trainer.cache import CACHE_BYTES, ShardCache
from trainer.gather import Located, Widths
from trainer.order import Order

Array = npt.NDArray[Any]
OPEN_SHARDS = 256
"""Enough for a window, and far from the 1,024 open files that systems allow a process."""
WINDOW, WINDOW_AT_URI = 256, 16
"""Shards that are shuffled together where nothing else is asked for."""
_OPENERS = 8
"""Shards that are opened, hashed and fetched at the same time."""


class NoiseDataset:
    """Random access to the rows of a finished dataset in a folder or at a URI."""

    def __init__(
        self,
        folder: str | Path,
        check_hashes: bool = True,
        open_shards: int = OPEN_SHARDS,
        window: int = 0,
        cache: str | Path = "",
        cache_bytes: int = CACHE_BYTES,
    ):
        self._where = where = Folder.of(folder)
        self.folder, self.address = Path(folder), str(where)
        self.manifest = Manifest.read(where)
        identity = self.manifest.identity
        self.extraction: str = identity["extraction"]
        self.block_length: int = identity["block_length"]
        self.codec = Codec(identity["vocab_size"], identity["epsilon"], identity["draws"])
        self._rows_S = np.array([receipt.rows for receipt in self.manifest.receipts], np.int64)
        self._starts = np.append(0, np.cumsum(self._rows_S))
        if not len(self):
            raise DatasetError(f"{self.address} has no rows")
        self.window = min(window or (WINDOW if isinstance(where, LocalFolder) else WINDOW_AT_URI), len(self._rows_S))
        self._cache = None
        if not isinstance(where, LocalFolder):
            self._cache = ShardCache(where, self.manifest.receipts, cache, cache_bytes, check_hashes)
        self._source: Folder = self._cache or where
        self._check_hashes = check_hashes and self._cache is None
        self._mapped = _Mapped(self._rows_S, open_shards, self._reader)
        self._checked: set[int] = set()
        self._held: tuple[tuple[int, int], ...] = ()

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer's folder on this machine, if the dataset has one."""
        return self._where.fetched("tokenizer") if self._where.sizes("tokenizer") else None

    @property
    def order_name(self) -> str:
        """What the order of rows depends on besides the data and the seed, in words."""
        return f"permutations walked, {self.window} of {len(self._rows_S)} shards together"

    def _reader(self, shard: int) -> ShardReader:
        reader = self.manifest.open(self._source, self.manifest.receipts[shard], self._check_hashes and shard not in self._checked)
        self._checked.add(shard)
        return reader

    def open_count(self) -> int:
        """How many shards are mapped."""
        return self._mapped.open_count()

    def locate(self, row_B: Array) -> Located:
        """Where the rows int64 [B] are; their shards are opened, and fetched where they are at a URI."""
        shard_B = np.searchsorted(self._starts, row_B, side="right") - 1
        return self._mapped.locate(shard_B, row_B - self._starts[shard_B])

    def batch(self, row_B: Array, draw_B: Array | int = 0, place_B: Array | None = None, narrow: bool = False, pin: bool = False) -> Batch:
        """The rows int64 [B] of the dataset, in that order; see `gather.columns` for `narrow` and `pin`."""
        return assemble(self, self.locate(row_B), self.extraction == "sequential", draw_B, place_B, narrow, pin)

    def spread(self, count: int) -> Array:
        """At most that many rows, spread evenly; at a URI over a few shards only, int64."""
        if self._cache is None:
            return np.linspace(0, len(self) - 1, min(count, len(self))).astype(np.int64)
        shards = np.unique(np.linspace(0, len(self._rows_S) - 1, min(self.window, 4)).astype(np.int64))
        upto = np.cumsum(self._rows_S[shards])
        place = np.linspace(0, upto[-1] - 1, min(count, upto[-1])).astype(np.int64)
        which = np.searchsorted(upto, place, side="right")
        return place - (upto - self._rows_S[shards])[which] + self._starts[shards[which]]

    def order(self, seed: int) -> Order:
        return Order(self._rows_S, seed, self.window)

    def hold(self, order: Order, start: int, stop: int) -> None:
        """Have the windows of samples start..stop-1 fetched and the one after them too; let go of all others. Nothing for a folder."""
        if self._cache is None:
            return
        windows, last = [order.window_of(start)], order.window_of(stop - 1)
        while windows[-1] != last:
            windows.append(order.after(*windows[-1]))
        windows.append(order.after(*last))
        if tuple(windows) == self._held:
            return
        self._held = tuple(windows)
        consumed = start % order.rows
        wanted = [order.shards_of(*window, consumed if at == 0 else 0).tolist() for at, window in enumerate(windows)]
        self._mapped.keep({shard for shards in wanted for shard in shards})
        self._cache.prefetch([self.manifest.receipts[shard] for shards in wanted for shard in dict.fromkeys(shards)])

    @property
    def cache_bytes(self) -> int:
        return self._cache.limit if self._cache else 0

    def needed_bytes(self, span: int) -> int:
        """What the cache must hold, so that processes which are that many samples apart never wait for each other; 0 for a folder.

        Those samples lie in so many windows, each process has fetched the next one too, and the last window of an epoch can be small.
        """
        if self._cache is None:
            return 0
        smallest = max(1, int(np.sort(self._rows_S)[: self.window].sum()))
        windows = 2 + -(-span // smallest) + (1 + span // len(self)) * (len(self._rows_S) % self.window > 0)
        return sum(sorted((receipt.bytes for receipt in self.manifest.receipts), reverse=True)[: windows * self.window])

    def release(self) -> None:
        """Stop fetching ahead, and let go of what is in a cache, so that others have room. What is read later is opened again."""
        self._held = ()
        if self._cache is not None:
            self._cache.release()
            self._mapped.keep(())


class _Mapped:
    """The shards that are mapped, and a table of where their record batches begin."""

    def __init__(self, rows_S: Array, limit: int, reader: Any):
        self._limit, self._reader_of, self._rows_S = max(1, limit), reader, rows_S
        self._slot_S, self._used_S = np.full(len(rows_S), -1, np.int64), np.zeros(len(rows_S), np.int64)
        self._tick = 0
        self._lock = threading.Lock()
        self._widths: list[Widths] = []
        self._strides = np.zeros((0, gather.COLUMNS), np.int64)
        self._open: list[_OpenShard | None] = []
        self._seed = np.zeros(0, np.int64)
        self._address = np.zeros((0, 0, gather.COLUMNS), np.int64)
        self._widths_at = np.zeros((0, 0), np.int64)

    def _grow(self, slots: int, batches: int) -> None:
        """Room for so many shards, of so many record batches each."""
        self._open += [None] * (slots - len(self._open))
        self._seed = _grown(self._seed, (slots,))
        self._address = _grown(self._address, (slots, batches, gather.COLUMNS))
        self._widths_at = _grown(self._widths_at, (slots, batches))

    def locate(self, shard_B: Array, within_B: Array) -> Located:
        number_B, place_B = np.divmod(within_B, ROWS_PER_BATCH)
        with self._lock:
            shards = np.flatnonzero(np.bincount(shard_B, minlength=len(self._slot_S)))
            self._tick += 1
            self._used_S[shards] = self._tick
            self._map(shards[self._slot_S[shards] < 0])
            slot_B = self._slot_S[shard_B]
            unread_B = self._address[slot_B, number_B, gather.IDS] == 0
            if unread_B.any():
                for slot, number in dict.fromkeys(zip(slot_B[unread_B].tolist(), number_B[unread_B].tolist(), strict=True)):
                    self._read(slot, number)
            widths_B = self._widths_at[slot_B, number_B]
            address_BC = self._address[slot_B, number_B] + place_B[:, None] * self._strides[widths_B]
            keep = [self._open[slot] for slot in self._slot_S[shards].tolist()]
            return Located(address_BC, self._seed[slot_B], list(self._widths), widths_B, keep)

    def open_count(self) -> int:
        return int((self._slot_S >= 0).sum())

    def keep(self, shards: Iterable[int]) -> None:
        """Close all others."""
        wanted = set(shards)
        with self._lock:
            for shard in np.flatnonzero(self._slot_S >= 0).tolist():
                if shard not in wanted:
                    self._close(shard)

    def _map(self, missing: Array) -> None:
        """Open shards, several at a time, after closing those that were used longest ago."""
        if not len(missing):
            return
        open_S = np.flatnonzero(self._slot_S >= 0)
        spare = open_S[self._used_S[open_S] < self._tick]
        excess = max(0, len(open_S) + len(missing) - self._limit)
        for shard in spare[np.argsort(self._used_S[spare], kind="stable")][:excess].tolist():
            self._close(shard)
        if len(missing) == 1:
            readers = [self._reader_of(int(missing[0]))]
        else:
            with ThreadPoolExecutor(min(_OPENERS, len(missing), 2 * (os.cpu_count() or 1))) as pool:
                readers = list(pool.map(self._reader_of, missing.tolist()))
        free = [slot for slot, shard in enumerate(self._open) if shard is None]
        slots = len(self._open) + max(0, len(missing) - len(free))
        free += range(len(self._open), slots)
        self._grow(slots, max(self._widths_at.shape[1], *(reader.batches for reader in readers)))
        for shard, slot, reader in zip(missing.tolist(), free, readers, strict=False):
            self._open[slot] = _OpenShard(reader, int(self._rows_S[shard]))
            self._slot_S[shard], self._seed[slot] = slot, _signed(int(reader.metadata.seed))

    def _close(self, shard: int) -> None:
        slot = self._slot_S[shard]
        self._open[slot], self._slot_S[shard] = None, -1
        self._address[slot] = 0

    def _read(self, slot: int, number: int) -> None:
        shard = self._open[slot]
        assert shard is not None
        rows = shard.batch(number)
        widths = Widths.of(rows)
        if widths not in self._widths:
            self._widths.append(widths)
            self._strides = np.stack([found.strides() for found in self._widths])
        self._address[slot, number], self._widths_at[slot, number] = gather.addresses(rows), self._widths.index(widths)


class _OpenShard:
    """A mapped shard and the record batches that were read from it; addresses hold as long as it does."""

    def __init__(self, reader: ShardReader, rows: int):
        self._reader, self._rows = reader, rows
        self._batches: dict[int, Rows] = {}

    def batch(self, number: int) -> Rows:
        """Rows that were counted: addresses are formed from the receipt's number, and must not lead past them."""
        found, expected = self._reader.batch(number), min(ROWS_PER_BATCH, self._rows - number * ROWS_PER_BATCH)
        if len(found) != expected:
            raise DatasetError(f"{self._reader.path}: record batch {number} has {len(found)} rows, the receipt {expected}; fetch the shard again")
        self._batches[number] = found
        return found


def _grown(values: Array, shape: tuple[int, ...]) -> Array:
    """The values in the corner of an array of zeros; themselves where they fill it."""
    if values.shape == shape:
        return values
    found = np.zeros(shape, np.int64)
    found[tuple(map(slice, values.shape))] = values
    return found


def assemble(of: Any, located: Located, written_B: Array | bool, draw_B: Array | int, place_B: Array | None, narrow: bool, pin: bool) -> Batch:
    """Located rows as a batch of the dataset, or of the mixture, that they belong to."""
    found = gather.columns(located, narrow, pin)
    count = len(found.length_B)

    def tensor(values: Array) -> Tensor:
        made = torch.from_numpy(values)
        return made.pin_memory() if pin else made

    def each(values: Array | int) -> Array:
        return np.array(np.broadcast_to(values, count), np.int64)

    return Batch(
        input_ids_BL=found.input_ids_BL,
        length_B=found.length_B,
        sequence_id_B=found.sequence_id_B,
        seed_B=tensor(located.seed_B),
        draw_B=tensor(each(draw_B)),
        written_B=tensor(each(written_B)),
        place_B=tensor(np.arange(count) if place_B is None else np.array(place_B, np.int64)),
        sketch=Sketch(found.log_prob_N, found.kept_N, found.index_K, found.code_K),
        extraction=of.extraction,
        codec=of.codec,
        padded=int(found.length_B.numpy().min(initial=of.block_length)) < of.block_length,
    )


def _signed(seed: int) -> int:
    return seed - 2**64 if seed >= 2**63 else seed
