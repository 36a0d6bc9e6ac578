"""The order of samples: a function of (seed, sample number) alone, for one dataset in windows of shards, and for several by weight.

Contract: sample n of a run is the same row, whatever the processes, the batch sizes, and where the run was stopped.

    one dataset   epoch n // rows. Its shards are permuted, `window` of them at a time make a window, and the rows of a
                  window are permuted: a global shuffle where one window holds every shard
    several       sample numbers come in blocks of 65,536; each block has its whole-number share of every dataset, permuted.
                  A dataset's samples are taken in its own order, so each has epochs of its own

A permutation is never stored: its value at a place is computed (a Feistel network whose round keys are words of the
noise stream, walked along its cycle until it is in range), so an order costs no memory and no time to start, at any size.
Shapes: B samples, S shards, W windows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from noise import philox

Array = npt.NDArray[Any]
_ORDER_DRAW = 195  # of the stream that the train seed names; no dataset and no sampler uses it
_ROUNDS = 12
_MIX = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))
BLOCK = 2**16
"""Samples of a mixture in which every dataset has exactly its share."""


@dataclass
class Place:
    """Where in the data a run stands: all the loader's state. Of several datasets, which have epochs of their own, `consumed` counts all samples."""

    epoch: int = 0
    consumed: int = 0


def permuted(place_B: Array, size: int, key: tuple[int, int, int, int]) -> Array:
    """Values at places int64 [B] of a permutation of 0..size-1 that the key (seed, purpose, number, number) names, int64 [B]."""
    bits = max(1, (size - 1).bit_length())
    low = np.uint64(bits // 2)
    mask_low, mask_high = np.uint64((1 << (bits // 2)) - 1), np.uint64((1 << (bits - bits // 2)) - 1)
    keys = _round_keys(*key)

    def step(value: Array) -> Array:
        left, right = value >> low, value & mask_low
        for at in range(0, _ROUNDS, 2):
            left ^= _mixed(right + keys[at]) & mask_high
            right ^= _mixed(left + keys[at + 1]) & mask_low
        return left << low | right

    value_B = step(place_B.astype(np.uint64))
    while len(outside := np.flatnonzero(value_B >= size)):
        value_B[outside] = step(value_B[outside])
    return value_B.astype(np.int64)


@functools.lru_cache(64)
def _round_keys(seed: int, purpose: int, epoch: int, part: int) -> Array:
    """uint64 [rounds] from the stream."""
    block = torch.arange(_ROUNDS // 2)
    k0, k1, c1, c2, c3 = philox.rows(seed, torch.tensor([part]), torch.tensor([purpose]), _ORDER_DRAW).unbind(-1)
    words = torch.stack(philox.philox(block + (epoch * _ROUNDS), c1, c2, c3, k0, k1), -1).numpy().astype(np.uint64)
    return (words[:, ::2] << np.uint64(32) | words[:, 1::2]).reshape(-1)


def _mixed(x: Array) -> Array:
    """A 64-bit mixer (Stafford's variant 13 of the finaliser of MurmurHash3), in place: every bit of the result depends on every bit of x."""
    for shift, factor in _MIX:
        x ^= x >> shift
        x *= factor
    x ^= x >> np.uint64(31)
    return x


_SHARDS, _ROWS, _MIXTURE = 0, 1, 2


class Order:
    """Epoch after epoch of one dataset whose shards have `rows_S` rows; `window` shards are shuffled together, 0: all."""

    def __init__(self, rows_S: Array, seed: int, window: int = 0):
        self._seed, self._rows_S = seed, np.asarray(rows_S, np.int64)
        self._first_S = np.cumsum(self._rows_S) - self._rows_S
        self.window = min(window or len(rows_S), len(rows_S))
        self.rows = int(self._rows_S.sum())
        self._epoch: tuple[int, Array, Array] | None = None

    def _windows(self, epoch: int) -> tuple[Array, Array]:
        """(the epoch's shards in order, where each window begins and the last ends, int64 [W + 1])."""
        if self._epoch is None or self._epoch[0] != epoch:
            count = len(self._rows_S)
            order_S = np.arange(count)
            if self.window < count:
                order_S = permuted(order_S, count, (self._seed, _SHARDS, epoch, 0))
            start_W = np.append(np.add.reduceat(self._rows_S[order_S], np.arange(0, count, self.window)).cumsum()[::-1], 0)[::-1]
            self._epoch = (epoch, order_S, start_W)
        return self._epoch[1], self._epoch[2]

    def at(self, start: int, stop: int) -> tuple[Array, Array]:
        """(rows of the dataset, their epochs) of samples start..stop-1, int64 [B] each."""
        rows, epochs = [], []
        while start < stop:
            epoch, consumed = divmod(start, self.rows)
            end = min(self.rows, consumed + stop - start)
            rows.append(self.of_epoch(epoch, consumed, end))
            epochs.append(np.full(end - consumed, epoch))
            start += end - consumed
        return np.concatenate(rows), np.concatenate(epochs)

    def of_epoch(self, epoch: int, start: int, stop: int) -> Array:
        """Rows at places start..stop-1 of one epoch, int64."""
        order_S, start_W = self._windows(epoch)
        parts = []
        for number in range(*np.searchsorted(start_W, [start, stop - 1], side="right") - [1, 0]):
            first, end = max(start, start_W[number]), min(stop, start_W[number + 1])
            place_B = permuted(
                np.arange(first, end) - start_W[number], int(start_W[number + 1] - start_W[number]), (self._seed, _ROWS, epoch, number)
            )
            shards = order_S[number * self.window : (number + 1) * self.window]
            upto = np.cumsum(self._rows_S[shards])
            which_B = np.searchsorted(upto, place_B, side="right")
            parts.append(place_B - (upto - self._rows_S[shards])[which_B] + self._first_S[shards[which_B]])
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def place(self, sample: int) -> Place:
        return Place(*divmod(sample, self.rows))

    def sample(self, place: Place) -> int:
        return place.epoch * self.rows + place.consumed

    def window_of(self, sample: int) -> tuple[int, int]:
        """(epoch, window) that the sample lies in: what to hold in a cache."""
        epoch, consumed = divmod(sample, self.rows)
        return epoch, int(np.searchsorted(self._windows(epoch)[1], consumed, side="right")) - 1

    def after(self, epoch: int, number: int) -> tuple[int, int]:
        """The window that follows."""
        return (epoch, number + 1) if number + 2 < len(self._windows(epoch)[1]) else (epoch + 1, 0)

    def shards_of(self, epoch: int, number: int, consumed: int = 0) -> Array:
        """Shards that a window still needs when that many rows of its epoch are behind it, int64, ascending."""
        order_S, start_W = self._windows(epoch)
        if consumed <= start_W[number]:
            return np.sort(order_S[number * self.window : (number + 1) * self.window])
        left = self.of_epoch(epoch, consumed, int(start_W[number + 1]))
        return np.unique(np.searchsorted(self._first_S, left, side="right") - 1)


class MixtureOrder:
    """Which dataset each sample of a mixture comes from, and which of that dataset's own samples it is."""

    def __init__(self, weights: Sequence[float], seed: int):
        self._seed = seed
        self.quota_D = quotas(weights)
        self._block: tuple[int, Array, Array] | None = None

    def at(self, start: int, stop: int) -> tuple[Array, Array]:
        """(dataset, its own sample number) of samples start..stop-1, int64 [B] each."""
        parts = []
        for block in range(start // BLOCK, -(-stop // BLOCK)):
            which, number = self._of_block(block)
            within = slice(max(start - block * BLOCK, 0), min(stop - block * BLOCK, BLOCK))
            parts.append((which[within], number[within]))
        return np.concatenate([which for which, _ in parts]), np.concatenate([number for _, number in parts])

    def before(self, sample: int, dataset: int) -> int:
        """How many of the samples before this one are of that dataset."""
        block, within = divmod(sample, BLOCK)
        return block * int(self.quota_D[dataset]) + int((self._of_block(block)[0][:within] == dataset).sum())

    def _of_block(self, block: int) -> tuple[Array, Array]:
        if self._block is None or self._block[0] != block:
            slot = permuted(np.arange(BLOCK), BLOCK, (self._seed, _MIXTURE, 0, block))
            which = np.searchsorted(np.cumsum(self.quota_D), slot, side="right")
            number = np.empty(BLOCK, np.int64)
            for dataset, quota in enumerate(self.quota_D):
                number[which == dataset] = block * quota + np.arange(quota)
            self._block = (block, which, number)
        return self._block[1], self._block[2]


def quotas(weights: Sequence[float]) -> Array:
    """Samples of a block that each dataset has, int64 [D]: its share of the weights, rounded so that the sum is exact, at least one."""
    share_D = np.asarray(weights, np.float64) / np.sum(weights) * BLOCK
    quota_D = np.maximum(1, np.floor(share_D)).astype(np.int64)
    for at in np.argsort(quota_D - share_D, kind="stable")[: max(0, BLOCK - int(quota_D.sum()))]:
        quota_D[at] += 1
    quota_D[np.argmax(quota_D)] -= quota_D.sum() - BLOCK
    return quota_D


def epoch_order(rows: int, seed: int, epoch: int) -> Array:
    """The permutation of all rows in which one window that holds every shard is read, int64."""
    return Order(np.array([rows]), seed).of_epoch(epoch, 0, rows)
