"""Times, masks and fresh noise of training: functions of (train seed, step) and the place in the global batch, or sequence_id and position.

Nothing here has state, so a resumed run, another world size or another micro-batch sees the same numbers for the same
row. Block `step` of the stream that (train seed, sequence_id, position) names is used, at draws 192 to 195, which no dataset and no sampler uses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from noise import philox

_MASK_DRAW, _TIME_DRAW, _FRESH_DRAW = 192, 193, 194
SMALLEST_TIME = 1e-3


@dataclass(frozen=True)
class Chance:
    """The random choices of one optimizer step."""

    seed: int
    step: int
    global_batch: int

    def times(self, place_B: Tensor) -> Tensor:
        """Antithetic times in [0.001, 1), float32 [B], of rows at these places of the global batch (MDLM, section 3)."""
        zero = torch.zeros(1, dtype=torch.int64, device=place_B.device)
        offset = self._uniform(zero, zero, _TIME_DRAW)
        t_B = (offset + place_B.to(torch.float32) / self.global_batch) % 1.0
        return t_B * (1 - SMALLEST_TIME) + SMALLEST_TIME

    def rates(self, place_B: Tensor, blocks: int, low: float, high: float) -> Tensor:
        """Mask rates of every block, float32 [B, blocks], in [low, high): antithetic over the rows as `times` is, independent between blocks."""
        block_C = torch.arange(blocks, device=place_B.device)
        offset_C = self._uniform(torch.zeros_like(block_C), block_C, _TIME_DRAW)
        u_BC = (offset_C + (place_B.to(torch.float32) / self.global_batch)[:, None]) % 1.0
        return u_BC * (high - low) + low

    def masked(self, sequence_id_B: Tensor, t_B: Tensor, block_length: int) -> Tensor:
        """bool [B, L]: each position masked with probability t of its row [B], or of its own [B, L]."""
        position_L = torch.arange(block_length, device=t_B.device)
        u = self._uniform(sequence_id_B.repeat_interleave(block_length), position_L.repeat(len(t_B)), _MASK_DRAW)
        return u.view(len(t_B), block_length) < (t_B[:, None] if t_B.dim() == 1 else t_B)

    def fresh_rows(self, sequence_id_N: Tensor, position_N: Tensor) -> Tensor:
        """Stream rows for noise that knows nothing of the text, new in every step."""
        zero = torch.zeros(1, dtype=torch.int64)
        k0, k1 = (int(word) for word in self._words(zero, zero, _FRESH_DRAW)[:2])
        return philox.rows(k0 | k1 << 32, sequence_id_N, position_N, _FRESH_DRAW)

    def _words(self, sequence_id: Tensor, position: Tensor, draw: int) -> philox.Words:
        k0, k1, c1, c2, c3 = philox.rows(self.seed, sequence_id, position, draw).unbind(-1)
        return philox.philox(torch.full_like(c1, self.step), c1, c2, c3, k0, k1)

    def _uniform(self, sequence_id: Tensor, position: Tensor, draw: int) -> Tensor:
        return philox.uniform(self._words(sequence_id, position, draw)[0])
