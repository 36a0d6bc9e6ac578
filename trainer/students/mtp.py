"""The next n tokens of a row in one call: a prefix, then n masks with noise.

The prefix is read causally; a masked position sees the prefix and all other masked ones, so what is told by the noise of one
reaches the others. Loss, with n = `predict` and c the place of the first mask:

    (tokens of the row / n)  sum over j < n of  -log softmax(logits)[x_c+j]

c is where the last n tokens of the row begin, or is drawn (`context`); the weight makes it the mean over predicted tokens once the
loop has divided by all tokens. A row with fewer than n tokens predicts what it has. Shapes as in the package; N masked positions, row-major.
"""

from __future__ import annotations

import torch
from torch import Tensor

from noise.decode import Noise
from trainer.chance import SMALLEST_TIME, Chance
from trainer.conditioning import KnownNoise
from trainer.config import StudentConfig
from trainer.data import Batch
from trainer.students.masked import Masked


class MTP(Masked):
    def __init__(self, config: StudentConfig, vocab_size: int, block_length: int):
        if not 1 <= config.predict < block_length:
            raise ValueError(
                f"student.predict is {config.predict}; it must be in 1..{block_length - 1}, the dataset's block_length less its first token"
            )
        if config.noise.known and config.predict == block_length - 1:
            raise ValueError(
                f"student.noise.known is set, but student.predict is {config.predict}: all tokens are predicted, and none is known; drop it"
            )
        super().__init__(config, vocab_size, block_length)
        self.ahead = config.predict

    @property
    def figure_names(self) -> list[str]:
        """Cross-entropy (nats) and top-1 accuracy of a predicted token, and the other losses."""
        return ["cross_entropy", *super().figure_names[1:], "top1"]

    def logits(self, ids_BL: Tensor, g_NV: Tensor | None = None, length_B: Tensor | None = None, known: KnownNoise | None = None) -> Tensor:
        """float32 [N, V] at the positions where ids int64 [B, L] hold the mask id, given their noise float32 [N, V], and that of known tokens.

        What stands before a row's first mask is its prefix; what stands after its last is not seen, so length_B changes nothing.
        """
        return self.predict(ids_BL, g_NV, known)[0]

    def predict(self, ids_BL: Tensor, g_NV: Tensor | Noise | None, known: KnownNoise | None = None) -> tuple[Tensor, list[Tensor]]:
        """Output logits [N, V] and each draft's, [N, V], given Gumbel noise, made or unmade."""
        masked_BL = ids_BL == self.mask_id
        where_N = masked_BL.flatten().nonzero()[:, 0]
        length = ids_BL.shape[1]
        shown = self._shown(known, ids_BL, torch.arange(length, device=ids_BL.device), length)
        return self.through(ids_BL, where_N, g_NV, self.model.rotary(length), self._visible(masked_BL), known=shown)

    def _visible(self, masked_BL: Tensor) -> Tensor:
        """bool [B, 1, query, key]. With `shift` the token before the first mask predicts it, so it sees the masks too."""
        place_L = torch.arange(masked_BL.shape[1], device=masked_BL.device)
        first_B = torch.where(masked_BL, place_L, masked_BL.shape[1]).amin(1)
        predicts_BL = place_L >= (first_B - self.shift)[:, None]
        within_BL = masked_BL.flip(1).cumsum(1).flip(1) > 0  # no later than the last mask
        return ((place_L <= place_L[:, None]) | (predicts_BL[:, :, None] & within_BL[:, None, :]))[:, None]

    def forward(self, batch: Batch, chance: Chance, noise_of: Batch | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss summed over rows, nats, and figures (sums) to log. `noise_of`: as in the other students."""
        masked_BL = self._chosen(batch, chance)
        where_N = masked_BL.flatten().nonzero()[:, 0]
        logits_NV, drafts = self.predict(
            batch.input_ids_BL.masked_fill(masked_BL, self.mask_id),
            self._noise(batch, chance, where_N, noise_of),
            self._known(batch, chance, batch.valid_BL & ~masked_BL, noise_of),
        )
        weight_B = batch.valid_BL.sum(1) / masked_BL.sum(1).clamp_min(1)
        weight_N = weight_B[where_N // masked_BL.shape[1]]
        loss, terms = self.weighted(batch, where_N, weight_N, logits_NV, drafts)
        hit_N = logits_NV.detach().argmax(-1) == batch.input_ids_BL.flatten()[where_N]
        terms = {"cross_entropy": terms.pop("nelbo"), **terms, "top1": weight_N * hit_N}
        return loss, {name: term_N.sum() for name, term_N in terms.items()}

    def _chosen(self, batch: Batch, chance: Chance) -> Tensor:
        """bool [B, L]: the tokens to predict."""
        valid_BL, length = batch.valid_BL, batch.input_ids_BL.shape[1]
        place_L = torch.arange(length, device=valid_BL.device)
        first_B = torch.where(valid_BL, place_L, length).amin(1)
        last_start_B = torch.maximum(torch.where(valid_BL, place_L + 1, 0).amax(1) - self.config.predict, first_B)
        start_B = last_start_B
        if self.config.context == "drawn":
            u_B = (chance.times(batch.place_B) - SMALLEST_TIME) / (1 - SMALLEST_TIME)
            start_B = torch.minimum(first_B + (u_B * (last_start_B - first_B + 1)).long(), last_start_B)
        return valid_BL & (place_L >= start_B[:, None]) & (place_L < start_B[:, None] + self.config.predict)
