"""Shards -> batches: whole arrays from memory-mapped record batches, in an order that is a function of (seed, epoch).

Contract: the sequence of global batches depends on the dataset, the seed and the global batch size alone. The state is
two integers (epoch, samples consumed in it), so resume is exact, on another number of processes too; a batch may
straddle two epochs. Each rank takes its contiguous share of every global batch.
Shapes: B rows, L block length, N = B x L positions, K kept entries.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from noise import philox
from noise.dataset import Manifest
from noise.decode import Noise
from noise.shard import ROWS_PER_BATCH, Rows, ShardReader
from noise.sketch import Codec, Sketch, select
from noise.storage import DatasetError

_ORDER_DRAW = 195
_ROW_TENSORS = ("input_ids_BL", "length_B", "sequence_id_B", "seed_B", "draw_B", "place_B")


@dataclass(frozen=True)
class Batch:
    """Rows of a dataset on the training device."""

    input_ids_BL: Tensor
    """int64"""
    length_B: Tensor
    """int64; what follows is padding"""
    sequence_id_B: Tensor
    """int64 bit patterns"""
    seed_B: Tensor
    """int64 bit patterns: the seed of each row's shard"""
    draw_B: Tensor
    """int64: which draw of noise to use"""
    place_B: Tensor
    """int64: where in the global batch each row stands"""
    sketch: Sketch
    """of all N positions"""
    extraction: str
    codec: Codec
    padded: bool
    """whether any row is shorter than the block"""

    def to(self, device: torch.device) -> Batch:
        sketch = Sketch(*(tensor.to(device, non_blocking=True) for tensor in self.sketch.tensors()))
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in _ROW_TENSORS}, sketch=sketch)

    @property
    def valid_BL(self) -> Tensor:
        """bool: the positions that count, 1..length-1; of text that a teacher wrote, those that it wrote: prompts are given, as BOS is."""
        position_L = torch.arange(self.input_ids_BL.shape[1], device=self.length_B.device)
        valid_BL = (position_L > 0) & (position_L < self.length_B[:, None])
        return valid_BL & (self.sketch.log_prob_N.view_as(valid_BL) < 0) if self.extraction == "sequential" else valid_BL

    def tokens(self) -> int:
        """How many positions count."""
        return int(self.valid_BL.sum())

    def split(self, rows: int) -> list[Batch]:
        """Consecutive parts of at most `rows` rows."""
        count, length = self.input_ids_BL.shape
        if count <= rows:
            return [self]
        parts = []
        for start in range(0, count, rows):
            at = slice(start, start + rows)
            sketch = select(self.sketch, torch.arange(start * length, min(start + rows, count) * length))
            parts.append(replace(self, **{name: getattr(self, name)[at] for name in _ROW_TENSORS}, sketch=sketch))
        return parts

    def noise_at(self, where_N: Tensor) -> Tensor:
        """`lazy_noise_at`, made: g, float32 [N, V]."""
        return self.lazy_noise_at(where_N).dense()

    def lazy_noise_at(self, where_N: Tensor) -> Noise:
        """Noise at flat positions b * L + t, int64 [N]: the posterior's, or the prior draw that wrote a sequential dataset's text.

        Raises DatasetError where there is none.
        """
        if self.extraction == "none":
            raise DatasetError("the dataset has tokens but no noise (extraction: none); set student.noise.kind to none or extract with a teacher")
        row_N, position_N = where_N // self.input_ids_BL.shape[1], where_N % self.input_ids_BL.shape[1]
        rows_N5 = philox.rows(self.seed_B[row_N], self.sequence_id_B[row_N], position_N, self.draw_B[row_N])
        if self.extraction == "sequential":
            return Noise.prior(rows_N5, self.codec.vocab_size)
        return Noise.posterior(select(self.sketch, where_N), self.input_ids_BL.flatten()[where_N], rows_N5, self.codec)


class NoiseDataset:
    """Random access to the rows of a finished dataset, at most `open_shards` shards mapped at a time."""

    def __init__(self, folder: str | Path, check_hashes: bool = True, open_shards: int = 64):
        self.folder, self._check_hashes, self._limit = Path(folder), check_hashes, open_shards
        self.manifest = Manifest.read(self.folder)
        identity = self.manifest.identity
        self.extraction: str = identity["extraction"]
        self.block_length: int = identity["block_length"]
        self.codec = Codec(identity["vocab_size"], identity["epsilon"], identity["draws"])
        self._starts = np.cumsum([0] + [receipt.rows for receipt in self.manifest.receipts])
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._checked: set[int] = set()
        if not len(self):
            raise DatasetError(f"{self.folder} has no rows")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _shard(self, number: int) -> _OpenShard:
        if number in self._open:
            self._open.move_to_end(number)
        else:
            receipt = self.manifest.receipts[number]
            reader = self.manifest.open(self.folder, receipt, self._check_hashes and number not in self._checked)
            self._checked.add(number)
            self._open[number] = _OpenShard(reader)
            if len(self._open) > self._limit:
                self._open.popitem(last=False)
        return self._open[number]

    def batch(self, row_B: np.ndarray, draw_B: np.ndarray | int = 0, place_B: np.ndarray | None = None) -> Batch:
        """The rows int64 [B] of the dataset, in that order."""
        shard_B = np.searchsorted(self._starts, row_B, side="right") - 1
        seed_of = {int(number): self._shard(int(number)).seed for number in np.unique(shard_B)}
        rows = gather([self._shard(int(shard)).row(int(row - self._starts[shard])) for row, shard in zip(row_B, shard_B, strict=True)])
        if rows.input_ids.max(initial=0) >= self.codec.vocab_size or rows.input_ids.min(initial=0) < 0:
            raise DatasetError(f"{self.folder}: rows {row_B.min()}..{row_B.max()} hold token ids outside [0, {self.codec.vocab_size})")
        sketch = Sketch(
            torch.from_numpy(rows.log_prob.astype(np.float32).reshape(-1)),
            torch.from_numpy(rows.kept.astype(np.int64).reshape(-1)),
            torch.from_numpy(rows.index.astype(np.int64)),
            torch.from_numpy(rows.code.astype(np.int64)),
        )
        return Batch(
            input_ids_BL=torch.from_numpy(rows.input_ids.astype(np.int64)),
            length_B=torch.from_numpy(rows.length.astype(np.int64)),
            sequence_id_B=torch.from_numpy(rows.sequence_id.view(np.int64).copy()),
            seed_B=torch.tensor([seed_of[int(shard)] for shard in shard_B]),
            draw_B=torch.from_numpy(np.broadcast_to(np.asarray(draw_B, np.int64), len(row_B)).copy()),
            place_B=torch.from_numpy(place_B if place_B is not None else np.arange(len(row_B))),
            sketch=sketch,
            extraction=self.extraction,
            codec=self.codec,
            padded=bool((rows.length < self.block_length).any()),
        )


class _OpenShard:
    """A mapped shard whose record batches are looked at once and then kept as views."""

    def __init__(self, reader: ShardReader):
        self._reader = reader
        self._batches: dict[int, Rows] = {}
        seed = int(reader.metadata.seed)
        self.seed = seed - 2**64 if seed >= 2**63 else seed

    def row(self, number: int) -> tuple[Rows, int]:
        """The record batch that holds the row, and where in it."""
        at, within = divmod(number, ROWS_PER_BATCH)
        if at not in self._batches:
            self._batches[at] = self._reader.batch(at)
        return self._batches[at], within


def gather(at: list[tuple[Rows, int]]) -> Rows:
    """Chosen rows of record batches as new arrays, a column at a time: twice as fast as slicing and concatenating Rows."""
    spans = [(rows.entries, int(rows.offset[i]), int(rows.offset[i + 1])) for rows, i in at]
    return Rows(
        np.array([rows.sequence_id[i] for rows, i in at]),
        np.stack([rows.input_ids[i] for rows, i in at]),
        np.array([rows.length[i] for rows, i in at]),
        np.stack([rows.log_prob[i] for rows, i in at]),
        np.stack([rows.kept[i] for rows, i in at]),
        tuple(np.concatenate([entries[column][start:stop] for entries, start, stop in spans]) for column in range(len(spans[0][0]))),
        np.cumsum([0] + [stop - start for _, start, stop in spans]),
    )


def unigram(dataset: NoiseDataset, rows: int = 4096) -> Tensor:
    """Log unigram of the corpus, float32 [V], add-one smoothed, from rows spread evenly over the dataset."""
    batch = dataset.batch(np.linspace(0, len(dataset) - 1, min(rows, len(dataset))).astype(np.int64))
    count_V = torch.bincount(batch.input_ids_BL[batch.valid_BL], minlength=dataset.codec.vocab_size).to(torch.float64) + 1.0
    return (count_V / count_V.sum()).log().to(torch.float32)


def epoch_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of all rows, int64, from the stream: a function of (seed, epoch) on every machine."""
    place = torch.arange(rows)
    k0, k1, c1, c2, c3 = philox.rows(seed, place, torch.zeros_like(place), _ORDER_DRAW).unbind(-1)
    words = philox.philox(torch.full_like(c1, epoch), c1, c2, c3, k0, k1)
    return np.argsort((words[0] << 31 ^ words[1]).numpy(), kind="stable")


@dataclass
class Place:
    """Where in the data a run stands: all the loader's state."""

    epoch: int = 0
    consumed: int = 0


def batches(dataset: NoiseDataset, seed: int, global_batch: int, place: Place, rank: int = 0, world: int = 1) -> Iterator[tuple[Batch, Place]]:
    """This rank's share of every global batch from `place` on, for ever, each with the place after it; one is made ahead."""
    share = global_batch // world

    def one(rows: np.ndarray, epochs: np.ndarray) -> Batch:
        at = slice(rank * share, (rank + 1) * share)
        return dataset.batch(rows[at], epochs[at] % dataset.codec.draws, np.arange(global_batch)[at])

    with ThreadPoolExecutor(1) as ahead:
        waiting = None
        for rows, epochs, after in _global_batches(len(dataset), seed, global_batch, place):
            made = ahead.submit(one, rows, epochs), after
            if waiting:
                yield waiting[0].result(), waiting[1]
            waiting = made


def _global_batches(rows: int, seed: int, global_batch: int, place: Place) -> Iterator[tuple[np.ndarray, np.ndarray, Place]]:
    epoch, consumed = place.epoch, place.consumed
    order = epoch_order(rows, seed, epoch)
    while True:
        taken: list[np.ndarray] = []
        epochs: list[np.ndarray] = []
        while (missing := global_batch - sum(len(part) for part in taken)) > 0:
            if consumed == rows:
                epoch, consumed = epoch + 1, 0
                order = epoch_order(rows, seed, epoch)
            taken.append(order[consumed : consumed + missing])
            epochs.append(np.full(len(taken[-1]), epoch))
            consumed += len(taken[-1])
        yield np.concatenate(taken), np.concatenate(epochs), Place(epoch, consumed)
