"""Noise to text: with every token masked and the posterior noise of held-out rows given, how much comes back?

The direct measure of the method: the noise determines the text under the teacher, so a student that had learnt the map
would return all of it in one call. The output is the student's most likely token. Noise that says nothing, or a student
that ignores it, scores what the unigram allows. Rows shorter than the block are left out; prompts stay as they are given.
Shapes: B rows, L positions, M masked positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import torch

from eval.metrics import Array
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


@torch.inference_mode()
def reconstruct(
    student: MaskedStudent,
    dataset: NoiseDataset,
    rows: int,
    nfe: int,
    order: Literal["random", "confidence"],
    seed: int,
    device: str = "cpu",
    done: Callable[[int], None] = lambda rows: None,
) -> Array:
    """Share of each row's tokens that come back, float64 [S]. Raises DatasetError where the dataset has no noise."""  # fmt: skip
    if dataset.extraction == "none":
        raise DatasetError(
            f"{dataset.folder} has tokens but no noise (extraction: none); reconstruction needs held-out rows extracted with the teacher"
        )
    decoding = Decoding(nfe=nfe, output="argmax", order=order)
    shares = []
    for batch in batches(dataset, rows):
        batch = batch.to(torch.device(device))
        valid_BL = batch.valid_BL
        ids_BL = batch.input_ids_BL.masked_fill(valid_BL, student.mask_id)
        where_M = (ids_BL == student.mask_id).flatten().nonzero()[:, 0]
        g_MV = batch.noise_at(where_M) if student.noise.kind != "none" else None
        returned_BL = sample(student, ids_BL, batch.sequence_id_B, seed, decoding, g_MV)
        shares.append((((returned_BL == batch.input_ids_BL) & valid_BL).sum(1).double() / valid_BL.sum(1)).cpu().numpy())
        done(len(ids_BL))
    return np.concatenate(shares)
