"""Shards -> batches: whole arrays from memory-mapped record batches, in an order that is a function of the seed.

Contract: the sequence of global batches depends on the data, their windows, the seed and the global batch size alone. The
state is two integers (epoch, samples consumed in it), so resume is exact, on another number of processes too; a batch may
straddle epochs. Each rank takes its contiguous share of every global batch. Batches are made ahead, in a thread.

    order       sample number -> row, for one dataset and for several mixed by weight
    shards      row -> where it is in a mapped shard; mixture: several datasets read as one
    cache       shards of datasets at a URI, on this machine
    gather      addresses -> whole arrays; native: its machine code; ahead: its thread
    batch       those arrays, and their noise
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import chain, repeat
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from noise.storage import DatasetError
from trainer import gather
from trainer.ahead import Ahead
from trainer.batch import Batch
from trainer.config import DataConfig
from trainer.mixture import Mixture
from trainer.order import Place, epoch_order
from trainer.shards import NoiseDataset

__all__ = ["Batch", "Dataset", "Mixture", "NoiseDataset", "Place", "batches", "epoch_order", "open_data", "unigram"]

Array: TypeAlias = npt.NDArray[Any]
Dataset: TypeAlias = NoiseDataset | Mixture
AHEAD = 4
"""Batches that are made before they are asked for."""
ORDERED = 2048
"""Samples whose order is computed at once, where global batches are smaller and an epoch is larger."""


def open_data(data: DataConfig) -> Dataset:
    """The dataset, or the mixture, that a recipe trains on. Raises ValueError where it names both or neither."""
    if bool(data.path) == bool(data.mix):
        raise ValueError(f"data.path is {data.path!r} and data.mix has {len(data.mix)} datasets; name a dataset in one of the two")
    if not data.mix:
        return _open(data, data.path)
    return Mixture([_open(data, part.path) for part in data.mix], [part.weight for part in data.mix])


def _open(data: DataConfig, path: str) -> NoiseDataset:
    return NoiseDataset(path, data.check_hashes, data.open_shards, data.window, data.cache, data.cache_bytes)


def unigram(dataset: Dataset, rows: int = 4096) -> Tensor:
    """Log unigram of the corpus, float32 [V], add-one smoothed, from rows spread over the dataset."""
    batch = dataset.batch(dataset.spread(rows))
    count_V = torch.bincount(batch.input_ids_BL[batch.valid_BL], minlength=dataset.codec.vocab_size).to(torch.float64) + 1.0
    return (count_V / count_V.sum()).log().to(torch.float32)


def batches(
    dataset: Dataset,
    seed: int,
    global_batch: int,
    place: Place,
    rank: int = 0,
    world: int = 1,
    ahead: int = AHEAD,
    narrow: bool = False,
    pin: bool = False,
) -> Iterator[tuple[Batch, Place]]:
    """This rank's share of every global batch from `place` on, for ever, each with the place after it.

    At most `ahead` are made before they are asked for. For a GPU they are made in the shards' widths (`narrow`) and in pinned memory
    (`pin`); `Batch.to` widens them there.
    """
    needed = dataset.needed_bytes(global_batch * (ahead + 1))
    if needed > dataset.cache_bytes:
        raise DatasetError(
            f"data.cache_bytes is {dataset.cache_bytes:,}; reading {dataset.address} with {ahead} batches ahead needs up to {needed:,}: raise it, "
            "or lower data.window, data.ahead or optim.global_batch"
        )
    order: Any = dataset.order(seed)
    share = global_batch // world
    sample = order.sample(place)
    shares = _shares(order, sample, global_batch, min(ORDERED, len(dataset)), rank * share, share)

    def make(sample: int) -> Batch:
        dataset.hold(order, sample, sample + global_batch)
        row_B, epoch_B = next(shares)
        place_B = np.arange(rank * share, (rank + 1) * share)
        return dataset.batch(row_B, epoch_B % dataset.codec.draws, place_B, narrow=narrow, pin=pin)

    # handing over costs as much as making a small batch does, so they come half of `ahead` at a time; the first alone, since somebody waits for it
    together = max(1, ahead // 2)

    def in_turn(sample: int) -> Iterator[list[tuple[Batch, Place]]]:
        for count in chain([1], repeat(together)):
            starts = range(sample, sample + count * global_batch, global_batch)
            yield [(make(start), order.place(start + global_batch)) for start in starts]
            sample += count * global_batch

    made = Ahead(in_turn(sample), max(1, ahead // together), "batches ahead")
    try:
        while True:
            some = made.take()
            gather.warm()  # not before: it would hold the interpreter while the first batch is waited for
            yield from some
    finally:
        if not sys.is_finalizing():  # then the thread has ended, and the modules that these need are gone
            made.stop()
            dataset.release()


def _shares(order: Any, sample: int, global_batch: int, ordered: int, first: int, share: int) -> Iterator[tuple[Array, Array]]:
    """(rows, epochs) [share] of samples first .. first + share - 1 of every global batch from `sample` on.

    The order of many samples of an epoch costs hardly more than that of a few, so that of small batches is computed for `ordered` of them.
    """
    together = ordered // global_batch
    while together < 2:
        yield order.at(sample + first, sample + first + share)
        sample += global_batch
    while True:
        row_N, epoch_N = order.at(sample, sample + together * global_batch)
        for start in range(first, together * global_batch, global_batch):
            yield row_N[start : start + share], epoch_N[start : start + share]
        sample += together * global_batch
