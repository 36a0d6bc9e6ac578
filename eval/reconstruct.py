"""Noise to text: with every token masked and the posterior noise of held-out rows given, how much comes back?

The direct measure of the method: the noise determines the text under the teacher, so a student that had learnt the map
would return all of it in one call. The output is the student's most likely token. Noise that says nothing, or a student
that ignores it, scores what the unigram allows. Rows shorter than the block are left out; prompts stay as they are given.
Shapes: B rows, L positions, M masked positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from eval.blocks import sample_blocks
from eval.decoding import OrderName
from eval.metrics import Array, Interval
from eval.sampler import Decoding, MaskedStudent, sample
from noise.storage import DatasetError
from trainer.data import Batch, NoiseDataset


def full_rows(dataset: NoiseDataset, wanted: int) -> Array:
    """Tokens int32 [S, L] of the first rows that fill their block; fewer than `wanted` where there are fewer."""
    parts = [batch.input_ids_BL.numpy().astype(np.int32) for batch in batches(dataset, wanted)]
    return np.concatenate(parts)


def batches(dataset: NoiseDataset, wanted: int, size: int = 256) -> Iterator[Batch]:
    """The first `wanted` rows that fill their block, in order. Raises DatasetError when none does."""
    found = 0
    for start in range(0, len(dataset), size):
        row_B = np.arange(start, min(start + size, len(dataset)))
        batch = dataset.batch(row_B)
        if batch.padded:
            row_B = row_B[(batch.length_B == dataset.block_length).numpy()]
        row_B = row_B[: wanted - found]
        if len(row_B):
            yield dataset.batch(row_B)
            found += len(row_B)
        if found == wanted:
            return
    if not found:
        raise DatasetError(f"{dataset.folder}: no row fills its block of {dataset.block_length} positions; the held-out text is too short")


def reconstruct(
    student: MaskedStudent,
    dataset: NoiseDataset,
    rows: int,
    nfe: int,
    order: OrderName,
    seed: int,
    device: str = "cpu",
    done: Callable[[int], None] = lambda rows: None,
) -> Array:
    """Share of each row's tokens that come back, float64 [S]. Raises DatasetError where the dataset has no noise."""  # fmt: skip
    return shares(returned(student, dataset, rows, nfe, order, seed, device, done))


@torch.inference_mode()
def returned(
    student: Any,
    dataset: NoiseDataset,
    rows: int,
    nfe: int,
    order: OrderName,
    seed: int,
    device: str = "cpu",
    done: Callable[[int], None] = lambda rows: None,
) -> Array:
    """Which tokens come back, int8 [S, L]: 1 or 0, -1 where a token is given.

    An mtp student writes from left to right and takes no other order. A bd3lm student spends its nfe evenly on its blocks, one after the other.
    Raises DatasetError where the dataset has no noise.
    """
    if dataset.extraction == "none":
        raise DatasetError(
            f"{dataset.folder} has tokens but no noise (extraction: none); reconstruction needs held-out rows extracted with the teacher"
        )
    found = []
    for batch in batches(dataset, rows):
        batch = batch.to(torch.device(device))
        valid_BL = batch.valid_BL
        ids_BL = batch.input_ids_BL.masked_fill(valid_BL, student.mask_id)
        where_M = (ids_BL == student.mask_id).flatten().nonzero()[:, 0]
        g_MV = batch.noise_at(where_M) if student.noise.kind != "none" else None
        if hasattr(student, "block_size"):
            decoding = Decoding(nfe=nfe // student.blocks, output="argmax", order=order)
            returned_BL = sample_blocks(student, ids_BL, batch.sequence_id_B, seed, decoding, g_MV).ids_BL
        else:
            returned_BL = sample(student, ids_BL, batch.sequence_id_B, seed, Decoding(nfe=nfe, output="argmax", order=order), g_MV)
        same_BL = (returned_BL == batch.input_ids_BL).to(torch.int8)
        found.append(same_BL.masked_fill(~valid_BL, -1).cpu().numpy())
        done(len(ids_BL))
    return np.concatenate(found)


def shares(same_SL: Array) -> Array:
    """Share of each row's tokens that came back, float64 [S]; 0 for a row in which all is given."""
    return np.asarray((same_SL == 1).sum(1) / np.maximum((same_SL >= 0).sum(1), 1))


def by_position(same_SL: Array, weights_RS: Array, most: int = 32) -> list[dict[str, Any]]:
    """[{first, last, share: interval}]: share of tokens that came back at each position or, in long rows, in runs of equal length."""
    length = same_SL.shape[1]
    width = -(-(length - 1) // most)
    parts = []
    for first in range(1, length, width):
        last = min(first + width, length) - 1
        part_SW = same_SL[:, first : last + 1]
        hits_R, all_R = (weights_RS.astype(np.float64) @ counted.sum(1) for counted in (part_SW == 1, part_SW >= 0))
        if all_R[0]:  # a resample may hold no such token
            parts.append({"first": first, "last": last, "share": asdict(Interval.of(hits_R / np.maximum(all_R, 1)))})
    return parts
