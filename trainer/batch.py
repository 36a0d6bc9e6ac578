"""A batch: rows of a dataset as whole arrays, and the noise of their positions.

On the host a batch may have the widths that shards store, in pinned memory: a sixth of the bytes to copy. `to` widens them
on the device, so students see int64 in every case.
Shapes: B rows, L block length, N = B x L positions, K kept entries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from noise import philox
from noise.decode import Noise
from noise.sketch import Codec, Sketch, select
from noise.storage import DatasetError

_ROW_TENSORS = ("input_ids_BL", "length_B", "sequence_id_B", "seed_B", "draw_B", "written_B", "place_B")


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
    written_B: Tensor
    """int64: 1 where a teacher wrote the row from its noise (extraction: sequential), else 0"""
    place_B: Tensor
    """int64: where in the global batch each row stands"""
    sketch: Sketch
    """of all N positions"""
    extraction: str
    """The dataset's; of a mixture: mixed where `written_B` is not one for all, none where some rows have no noise"""
    codec: Codec
    """of the rows that were extracted"""
    padded: bool
    """whether any row is shorter than the block"""

    def to(self, device: torch.device) -> Batch:
        """On the device and in int64; copies from pinned memory run beside the device's work."""
        sketch = Sketch(*(_wide(tensor.to(device, non_blocking=True)) for tensor in self.sketch.tensors()))
        rows: dict[str, Any] = {name: _wide(getattr(self, name).to(device, non_blocking=True)) for name in _ROW_TENSORS}
        return replace(self, **rows, sketch=sketch)

    @property
    def valid_BL(self) -> Tensor:
        """bool: the positions that count, 1..length-1; of text that a teacher wrote, those that it wrote: prompts are given, as BOS is."""
        position_L = torch.arange(self.input_ids_BL.shape[1], device=self.length_B.device)
        valid_BL = (position_L > 0) & (position_L < self.length_B[:, None])
        if self.extraction == "parallel":
            return valid_BL
        return valid_BL & ((self.sketch.log_prob_N.view_as(valid_BL) < 0) | (self.written_B == 0)[:, None])

    def tokens(self) -> int:
        """How many positions count."""
        return int(self.valid_BL.sum())

    def split(self, rows: int) -> list[Batch]:
        """Consecutive parts of at most `rows` rows: views of this batch."""
        count, length = self.input_ids_BL.shape
        if count <= rows:
            return [self]
        offset_B1 = [0, *self.sketch.kept_N.view(count, length).to(torch.int64).sum(1).cumsum(0).tolist()]
        parts = []
        for start in range(0, count, rows):
            stop = min(start + rows, count)
            at, positions, entries = slice(start, stop), slice(start * length, stop * length), slice(offset_B1[start], offset_B1[stop])
            kept = self.sketch
            sketch = Sketch(kept.log_prob_N[positions], kept.kept_N[positions], kept.index_K[entries], kept.code_K[entries])
            parts.append(replace(self, **{name: getattr(self, name)[at] for name in _ROW_TENSORS}, sketch=sketch))
        return parts

    def noise_at(self, where_N: Tensor) -> Tensor:
        """`lazy_noise_at`, made: g, float32 [N, V]."""
        return self.lazy_noise_at(where_N).dense()

    def lazy_noise_at(self, where_N: Tensor) -> Noise:
        """Noise at flat positions b * L + t, int64 [N]: the posterior's, or the prior draw that the teacher wrote the row from.

        Raises DatasetError where there is none.
        """
        if self.extraction == "none":
            raise DatasetError("the dataset has tokens but no noise (extraction: none); set student.noise.kind to none or extract with a teacher")
        row_N, position_N = where_N // self.input_ids_BL.shape[1], where_N % self.input_ids_BL.shape[1]
        rows_N5 = philox.rows(self.seed_B[row_N], self.sequence_id_B[row_N], position_N, self.draw_B[row_N])
        if self.extraction == "sequential":
            return Noise.prior(rows_N5, self.codec.vocab_size)
        noise = Noise.posterior(select(self.sketch, where_N), self.input_ids_BL.flatten()[where_N], rows_N5, self.codec)
        return noise.prior_where(self.written_B[row_N] == 1) if self.extraction == "mixed" else noise


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_floating_point() else tensor.to(torch.int64)
