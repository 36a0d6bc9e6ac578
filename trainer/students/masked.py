"""What the masked students share: noise at the masked positions on the way through the layers, and the weighted loss there.

A student says what stands where, who sees whom, and with which weight each masked token counts; the rest is here, once.
Shapes: B rows, M slots of a row's input, N masked slots, row-major, V vocabulary, H hidden.
"""

from __future__ import annotations

import functools
from abc import abstractmethod

from torch import Tensor, nn

from noise.decode import Noise
from trainer import objectives
from trainer.attention import Cache, Mask
from trainer.chance import Chance
from trainer.conditioning import Draft, KnownNoise, NoiseInput, Readout, ShownNoise, check, given
from trainer.config import StudentConfig
from trainer.data import Batch
from trainer.dit import transformer
from trainer.students.base import Base


class Masked(Base):
    """Backbone, noise input, drafts and readout. The mask id is V, and no logit is ever made for it."""

    mask_id: int

    def __init__(self, config: StudentConfig, vocab_size: int, block_length: int):
        super().__init__()
        noise = config.noise
        self.config, self.noise = config, noise
        self.vocab_size, self.mask_id, self.block_length = vocab_size, vocab_size, block_length
        self.shift = int(config.shift)
        self.model = transformer(config, vocab_size + 1)
        check(noise, config.layers)
        objectives.check(config.objective, noise)
        noisy = noise.kind != "none"
        self.input = NoiseInput(noise, vocab_size, config.hidden) if noise.input != "none" else None
        self.drafts = nn.ModuleDict({str(layer): Draft(config.hidden, noisy, noise.draft_restart) for layer in sorted(noise.drafts)})
        self.readout = Readout(config.hidden) if noise.readout else None

    @property
    def figure_names(self) -> list[str]:
        return ["nelbo", *(["token_kd"] if self.config.objective.token_kd else []), *(f"draft_{layer}" for layer in self.drafts)]

    @abstractmethod
    def logits(self, ids_BL: Tensor, g_NV: Tensor | None = None, length_B: Tensor | None = None, *, known: KnownNoise | None = None) -> Tensor:
        """float32 [N, V] at the positions where ids int64 [B, L] hold the mask id, which a sampler asks for.

        g_NV: their Gumbel noise, float32, None with noise.kind none. length_B: tokens of rows that are padded; None: none is.
        known: the noise of known tokens, read with noise.known.
        """

    def through(
        self,
        ids_BM: Tensor,
        where_N: Tensor,
        g_NV: Tensor | Noise | None,
        rotary: tuple[Tensor, Tensor],
        mask: Mask | None,
        cache: Cache | None = None,
        known: ShownNoise | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Output logits at the flat slots where_N and each draft's there, [N, V], given their Gumbel noise, made or unmade, and known tokens'.

        With `shift` a slot's token is predicted at the slot before it. With a cache, keys and values of what it holds are seen too.
        """
        g_NV = given(self.noise, g_NV)
        model = self.model
        embedding_VH = model.embed_tokens.weight[: self.vocab_size]
        x_BMH = model.embed_tokens(ids_BM)
        if self.input is not None and known is not None:
            x_BMH = self.input.beside(known, x_BMH, embedding_VH)
        known_BMH = x_BMH
        if self.input is not None:
            seen_NH = self.input(model.embed_tokens.weight[self.mask_id], g_NV, embedding_VH)
            x_BMH = x_BMH.flatten(0, 1).index_copy(0, where_N, seen_NH.to(x_BMH.dtype)).view_as(x_BMH)
        drafts: list[Tensor] = []
        for number, layer in enumerate(model.layers, start=1):
            x_BMH = layer(x_BMH, *rotary, False, mask, functools.partial(cache.join, number - 1) if cache is not None else None)
            if str(number) in self.drafts:
                at_NH = x_BMH.flatten(0, 1)[where_N - self.shift]
                draft = self.drafts[str(number)]
                draft_NV, added_NH = draft(model.head(at_NH, self.vocab_size), at_NH, g_NV, embedding_VH)
                drafts.append(draft_NV)
                if draft.carry is None:
                    x_BMH = x_BMH.flatten(0, 1).index_add(0, where_N, added_NH.to(x_BMH.dtype)).view_as(x_BMH)
                else:
                    x_BMH = known_BMH.flatten(0, 1).index_copy(0, where_N, added_NH.to(x_BMH.dtype)).view_as(x_BMH) + draft.carry * x_BMH
        at_NH = x_BMH.flatten(0, 1)[where_N - self.shift]
        logits_NV = model.head(at_NH, self.vocab_size)
        if self.readout is not None:
            logits_NV = self.readout(logits_NV, at_NH, g_NV)
        return logits_NV, drafts

    def _known(self, batch: Batch, chance: Chance, known_BL: Tensor, noise_of: Batch | None) -> KnownNoise | None:
        """In training: the noise of the tokens at known_BL, bool [B, L]; None where it is not read."""
        where_K = known_BL.flatten().nonzero()[:, 0]
        g_KV = self._noise(batch, chance, where_K, noise_of) if self.noise.known else None
        return None if g_KV is None else KnownNoise(where_K, g_KV)

    def _shown(self, known: KnownNoise | None, ids_BM: Tensor, position_M: Tensor, length: int) -> ShownNoise | None:
        """Known tokens' noise at the slots that hold these positions, int64 [M], and no mask."""
        return None if known is None else known.shown(ids_BM != self.mask_id, position_M.expand_as(ids_BM), length)

    def weighted(self, batch: Batch, where_N: Tensor, weight_N: Tensor, logits_NV: Tensor, drafts: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss summed over rows, nats, and the terms [N] of every figure; where_N: flat places b L + t in the batch."""
        token_N = batch.input_ids_BL.flatten()[where_N]
        loss_N, parts = objectives.losses(self.config.objective, logits_NV, token_N, batch, where_N)
        loss = (weight_N * loss_N).sum()
        terms = {name: weight_N * part_N for name, part_N in parts.items()}
        for number, draft_NV in zip(self.drafts, drafts, strict=True):
            draft_N, parts = objectives.losses(self.config.objective, draft_NV, token_N, batch, where_N)
            loss = loss + self.noise.draft_weight * (weight_N * draft_N).sum()
            terms[f"draft_{number}"] = weight_N * parts["nelbo"]
        return loss, terms
