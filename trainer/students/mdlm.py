"""Masked diffusion (MDLM, arXiv 2406.07524), with noise at the masked positions.

Log-linear schedule: at time t every token is masked with probability t, and the continuous-time bound is

    NELBO = E_t [ 1/t  sum over masked positions of  -log softmax(logits)[x] ]

No time conditioning. The token at position 0 (BOS) is given. Shapes as in the package; N masked positions, row-major.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from noise.decode import Noise
from trainer.backbone import Backbone
from trainer.chance import Chance
from trainer.conditioning import Draft, NoiseInput, Readout, check
from trainer.config import StudentConfig
from trainer.data import Batch


class MDLM(nn.Module):
    def __init__(self, config: StudentConfig, vocab_size: int, block_length: int):
        super().__init__()
        noise = config.noise
        self.config, self.noise = config, noise
        self.vocab_size, self.mask_id, self.block_length = vocab_size, vocab_size, block_length
        self.shift = int(config.shift)
        self.model = Backbone(vocab_size + 1, config.layers, config.hidden, config.heads, config.mlp, config.dropout)
        check(noise, config.layers)
        noisy = noise.kind != "none"
        self.input = NoiseInput(noise, vocab_size, config.hidden) if noise.input != "none" else None
        self.drafts = nn.ModuleDict({str(layer): Draft(config.hidden, noisy, noise.draft_restart) for layer in sorted(noise.drafts)})
        self.readout = Readout(config.hidden) if noise.readout else None

    def logits(self, ids_BL: Tensor, g_NV: Tensor | None = None, length_B: Tensor | None = None) -> Tensor:
        """float32 [N, V] at the positions where ids int64 [B, L] hold the mask id, given their noise float32 [N, V]."""
        return self.predict(ids_BL, g_NV, length_B)[0]

    def predict(self, ids_BL: Tensor, g_NV: Tensor | Noise | None, length_B: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Output logits [N, V] and each draft's, [N, V].

        Unmade noise is made here, once, where a readout or draft reads it and it is not streamed.
        """
        if isinstance(g_NV, Noise) and not self.noise.stream and (self.drafts or self.readout is not None):
            g_NV = g_NV.dense()
        model, length = self.model, ids_BL.shape[1]
        where_N = (ids_BL.flatten() == self.mask_id).nonzero()[:, 0]
        keys = None
        if length_B is not None:
            keys = (torch.arange(length, device=ids_BL.device) < length_B[:, None])[:, None, None, :]
        embedding_VH = model.embed_tokens.weight[: self.vocab_size]
        x_BLH = known_BLH = model.embed_tokens(ids_BL)
        if self.input is not None:
            seen_NH = self.input(model.embed_tokens.weight[self.mask_id], g_NV, embedding_VH)
            x_BLH = x_BLH.flatten(0, 1).index_copy(0, where_N, seen_NH.to(x_BLH.dtype)).view_as(x_BLH)
        cos_LD, sin_LD = model.rotary(length)
        drafts: list[Tensor] = []
        for number, layer in enumerate(model.layers, start=1):
            x_BLH = layer(x_BLH, cos_LD, sin_LD, False, keys)
            if str(number) in self.drafts:
                at_NH = x_BLH.flatten(0, 1)[where_N - self.shift]
                draft = self.drafts[str(number)]
                draft_NV, added_NH = draft(model.head(at_NH, self.vocab_size), at_NH, g_NV, embedding_VH)
                drafts.append(draft_NV)
                if draft.carry is None:
                    x_BLH = x_BLH.flatten(0, 1).index_add(0, where_N, added_NH.to(x_BLH.dtype)).view_as(x_BLH)
                else:
                    x_BLH = known_BLH.flatten(0, 1).index_copy(0, where_N, added_NH.to(x_BLH.dtype)).view_as(x_BLH) + draft.carry * x_BLH
        at_NH = x_BLH.flatten(0, 1)[where_N - self.shift]
        logits_NV = model.head(at_NH, self.vocab_size)
        if self.readout is not None:
            logits_NV = self.readout(logits_NV, at_NH, g_NV)
        return logits_NV, drafts

    def forward(self, batch: Batch, chance: Chance, noise_of: Batch | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss summed over rows, nats, and figures (sums) to log. `noise_of` gives each row the noise of another batch's row: the probe."""
        t_B = chance.times(batch.place_B)
        masked_BL = chance.masked(batch.sequence_id_B, t_B, batch.input_ids_BL.shape[1]) & batch.valid_BL
        where_N = masked_BL.flatten().nonzero()[:, 0]
        logits_NV, drafts = self.predict(
            batch.input_ids_BL.masked_fill(masked_BL, self.mask_id),
            self._noise(batch, chance, where_N, noise_of),
            batch.length_B if batch.padded else None,
        )
        weight_N = (1.0 / t_B)[where_N // batch.input_ids_BL.shape[1]]
        token_N = batch.input_ids_BL.flatten()[where_N]

        def nelbo(logits: Tensor) -> Tensor:
            return (weight_N * F.cross_entropy(logits, token_N, reduction="none")).sum()

        loss = nelbo(logits_NV)
        figures = {"nelbo": loss.detach()}
        for number, draft_NV in zip(self.drafts, drafts, strict=True):
            draft = nelbo(draft_NV)
            loss = loss + self.noise.draft_weight * draft
            figures[f"draft_{number}"] = draft.detach()
        return loss, figures

    def _noise(self, batch: Batch, chance: Chance, where_N: Tensor, noise_of: Batch | None) -> Noise | None:
        length = batch.input_ids_BL.shape[1]
        if self.noise.kind == "none":
            return None
        if self.noise.kind == "independent":
            rows_N5 = chance.fresh_rows(batch.sequence_id_B[where_N // length], where_N % length)
            return Noise.prior(rows_N5, batch.codec.vocab_size)
        return (noise_of or batch).lazy_noise_at(where_N)
