"""Masked diffusion (MDLM, arXiv 2406.07524), with noise at the masked positions, and by option (`noise.known`) at the known ones.

Log-linear schedule: at time t every token is masked with probability t, and the continuous-time bound is

    NELBO = E_t [ 1/t  sum over masked positions of  -log softmax(logits)[x] ]

No time conditioning. Training may draw t from a part of [0, 1] (`clip`), evaluation never does. The token at position 0 (BOS) is given.
Shapes as in the package; N masked positions, row-major.
"""

from __future__ import annotations

import torch
from torch import Tensor

from noise.decode import Noise
from trainer import clip
from trainer.attention import RowCache
from trainer.chance import SMALLEST_TIME, Chance
from trainer.conditioning import KnownNoise
from trainer.config import StudentConfig
from trainer.data import Batch
from trainer.students.masked import Masked


class MDLM(Masked):
    def __init__(self, config: StudentConfig, vocab_size: int, block_length: int):
        clip.check(config.clip)
        super().__init__(config, vocab_size, block_length)

    def logits(self, ids_BL: Tensor, g_NV: Tensor | None = None, length_B: Tensor | None = None, known: KnownNoise | None = None) -> Tensor:
        """float32 [N, V] at the positions where ids int64 [B, L] hold the mask id, given their noise float32 [N, V], and that of known tokens."""
        return self.predict(ids_BL, g_NV, length_B, known)[0]

    def row_cache(self) -> RowCache:
        """For rows of at most the student's block length."""
        return RowCache(self.config.layers, self.block_length)

    def logits_from(
        self,
        start_B: Tensor,
        ids_BL: Tensor,
        g_NV: Tensor | None,
        cache: RowCache,
        length_B: Tensor | None = None,
        known: KnownNoise | None = None,
    ) -> Tensor:
        """`logits`, computed from position start_B of each row on, in front of all its masks; what stands before is in the cache.

        The cache is as the last call over these positions left it, so its tokens have not seen what was written since: approximate
        for more than one layer, and `logits` itself where start_B is 0. With `shift` the token before the first mask is read too.
        """
        length = ids_BL.shape[1]
        width = length - start_B if length_B is None else length_B - start_B
        position_BQ = start_B[:, None] + torch.arange(int(width.max()), device=ids_BL.device)
        at_BQ = position_BQ.clamp_max(length - 1)
        ids_BQ = ids_BL.gather(1, at_BQ).masked_fill(position_BQ >= length, 0)
        where_N = (ids_BQ.flatten() == self.mask_id).nonzero()[:, 0]
        cos_LD, sin_LD = self.model.rotary(length)
        cache.place(position_BQ, length)
        rotary = cos_LD[at_BQ][:, None], sin_LD[at_BQ][:, None]
        shown = None if known is None else known.shown((ids_BQ != self.mask_id) & (position_BQ < length), at_BQ, length)
        return self.through(ids_BQ, where_N, g_NV, rotary, self._within(ids_BL, length_B), cache, shown)[0]

    def predict(
        self, ids_BL: Tensor, g_NV: Tensor | Noise | None, length_B: Tensor | None = None, known: KnownNoise | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Output logits [N, V] and each draft's, [N, V], given Gumbel noise, made or unmade."""
        length = ids_BL.shape[1]
        where_N = (ids_BL.flatten() == self.mask_id).nonzero()[:, 0]
        shown = self._shown(known, ids_BL, torch.arange(length, device=ids_BL.device), length)
        return self.through(ids_BL, where_N, g_NV, self.model.rotary(length), self._within(ids_BL, length_B), known=shown)

    def _within(self, ids_BL: Tensor, length_B: Tensor | None) -> Tensor | None:
        """Who may be seen, bool [B, 1, 1, L]; None where all may."""
        return None if length_B is None else (torch.arange(ids_BL.shape[1], device=ids_BL.device) < length_B[:, None])[:, None, None, :]

    def rates(self) -> tuple[float, float]:
        """The interval of t: all of it in evaluation, what is clipped in training."""
        low, high = self.config.clip if self.training else (0.0, 1.0)
        return max(low, SMALLEST_TIME), high

    def forward(self, batch: Batch, chance: Chance, noise_of: Batch | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss summed over rows, nats, and figures (sums) to log. `noise_of` gives each row the noise of another batch's row: the probe."""
        t_B = chance.rates(batch.place_B, 1, *self.rates())[:, 0]
        masked_BL = chance.masked(batch.sequence_id_B, t_B, batch.input_ids_BL.shape[1]) & batch.valid_BL
        where_N = masked_BL.flatten().nonzero()[:, 0]
        logits_NV, drafts = self.predict(
            batch.input_ids_BL.masked_fill(masked_BL, self.mask_id),
            self._noise(batch, chance, where_N, noise_of),
            batch.length_B if batch.padded else None,
            self._known(batch, chance, batch.valid_BL & ~masked_BL, noise_of),
        )
        weight_N = (1.0 / t_B)[where_N // batch.input_ids_BL.shape[1]]
        loss, terms = self.weighted(batch, where_N, weight_N, logits_NV, drafts)
        return loss, {name: term_N.sum() for name, term_N in terms.items()}
