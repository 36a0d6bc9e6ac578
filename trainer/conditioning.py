"""Noise at the masked positions of a student: at its input, between its layers, at its output; and at known ones, by option.

    input    softmax(g [+ log unigram]) through a V x H projection (its own, the tied embedding, or of low rank) replaces the
             mask embedding, or is added to it (the paper)
    drafts   after a named layer, softmax(logits + scale g) is re-embedded and added, so that a position sees what its
             neighbours are about to choose; each draft has its own small cross-entropy
    readout  scale g is added to the output logits: argmax then has the teacher's own form, argmax(log p + g)
    known    a known token's noise, through the input's projection and a learned scale a channel, is added to its embedding, wherever it is
             shown. Token and noise together say what the teacher may have thought of the tokens before: with them, argmax(log p + g) was this one

The scale of drafts and readout is softplus of a linear function of the hidden state: a position whose context is known
trusts its noise, one whose context is still open does not. Without noise a draft is softmax(logits) alone.
Noise comes as a tensor, or unmade (`noise.decode`); then it passes by in chunks (`streamed`). Callers give Gumbel noise
always; g above is what the student sees of it (`given`): itself, or with noise.kind gaussian or uniform its image (`marginal`).
Shapes: N masked positions, V vocabulary, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from noise.decode import Noise
from trainer import streamed
from trainer.config import NoiseConfig
from trainer.marginal import MAPPED, Mapped, seen


@dataclass(frozen=True)
class KnownNoise:
    """Of known tokens: the noise under which each was chosen. Those that are not named have none."""

    where_K: Tensor
    """int64: flat places b L + t, each once"""
    g_KV: Tensor | Noise
    """Gumbel noise, made or unmade"""

    def shown(self, shown_BM: Tensor, position_BM: Tensor, length: int) -> ShownNoise:
        """At the slots that show a known token: bool [B, M], and the position of the row of `length` that each slot holds, int64 [B, M]."""
        number_F = torch.full((len(shown_BM) * length,), -1, device=shown_BM.device)
        number_F[self.where_K] = torch.arange(len(self.where_K), device=shown_BM.device)
        number_BM = number_F.view(-1, length).gather(1, position_BM).masked_fill(~shown_BM, -1)
        slot_P = (number_BM.flatten() >= 0).nonzero()[:, 0]
        return ShownNoise(slot_P, number_BM.flatten()[slot_P], self.g_KV)

    def and_of(self, other: KnownNoise | None) -> KnownNoise:
        """With that of other tokens of the same rows."""
        if other is None:
            return self
        assert isinstance(self.g_KV, Tensor) and isinstance(other.g_KV, Tensor)
        return KnownNoise(torch.cat((self.where_K, other.where_K)), torch.cat((self.g_KV, other.g_KV)))

    def within(self, number_B: Tensor, length: int, first: int, start: int, stop: int) -> KnownNoise:
        """Of rows of `length` with a number, int64 [B] (-1: none), from position `start` on, at places in the window from `first` to `stop`."""
        assert isinstance(self.g_KV, Tensor)
        number_K, position_K = number_B[self.where_K // length], self.where_K % length
        at_K = ((number_K >= 0) & (start <= position_K) & (position_K < stop)).nonzero()[:, 0]
        return KnownNoise(number_K[at_K] * (stop - first) + position_K[at_K] - first, self.g_KV[at_K])

    def cut(self, length: int, end_B: Tensor) -> KnownNoise:
        """The same for rows that end before end_B int64 [B], of which the widest is as wide as what is left."""
        row_K, position_K = self.where_K // length, self.where_K % length
        at_K = (position_K < end_B[row_K]).nonzero()[:, 0]
        assert isinstance(self.g_KV, Tensor)
        return KnownNoise(row_K[at_K] * int(end_B.max()) + position_K[at_K], self.g_KV[at_K])


@dataclass(frozen=True)
class ShownNoise:
    """Known tokens' noise at the slots of a student's input; a token that stands in several slots has it in each."""

    slot_P: Tensor
    """int64: flat slots b M + m, each once"""
    of_P: Tensor
    """int64: which of the noises stands there"""
    g_KV: Tensor | Noise


def check(noise: NoiseConfig, layers: int) -> None:
    """Raises ValueError for options that would be ignored, or name a layer that is not there."""
    if noise.kind == "none" and (noise.input != "none" or noise.readout or noise.stream):
        raise ValueError(
            f"student.noise.kind is none, so student.noise.input ({noise.input}), readout ({noise.readout}) and stream ({noise.stream}) "
            "would be ignored; set student.noise.kind, or drop them"
        )
    if noise.kind != "none" and noise.input == "none" and not noise.readout and not noise.drafts:
        raise ValueError(
            f"student.noise.kind is {noise.kind}, but no input, readout or draft uses it; name the one that does, or student.noise.kind alone for all"
        )
    if noise.input == "none" and (noise.projection != "own" or noise.prior != "none" or noise.known):
        raise ValueError(
            f"student.noise.input is none, so student.noise.projection ({noise.projection}), prior ({noise.prior}) and known ({noise.known}) "
            "would be ignored; set student.noise.input, or drop them"
        )
    if (noise.rank > 0) != (noise.projection == "low_rank") or noise.rank < 0:
        raise ValueError(
            f"student.noise.rank is {noise.rank} and student.noise.projection {noise.projection}; low_rank needs a rank of 1 or more, the others none"
        )
    if noise.stream and not noise.readout and not noise.drafts:
        raise ValueError("student.noise.stream is set, but no readout or draft reads the noise, and the input streams it always; drop it")
    if noise.draft_restart and not noise.drafts:
        raise ValueError("student.noise.draft_restart is set, but student.noise.drafts names no layer; name one, or drop it")
    if noise.draft_weight != NoiseConfig.draft_weight and not noise.drafts:
        raise ValueError(f"student.noise.draft_weight is {noise.draft_weight}, but student.noise.drafts names no layer; name one, or drop it")
    if not 0 <= noise.draft_weight < float("inf"):
        raise ValueError(f"student.noise.draft_weight is {noise.draft_weight}; it must be at least 0")
    if len(set(noise.drafts)) < len(noise.drafts) or any(not 1 <= layer <= layers for layer in noise.drafts):
        raise ValueError(f"student.noise.drafts is {noise.drafts}; name each layer once, of 1..{layers}")


def given(noise: NoiseConfig, g_NV: Tensor | Noise | None) -> Tensor | Noise | None:
    """Gumbel noise as a student with these options sees it: a student calls this once, before anything reads the noise.

    Unmade noise is made here where a readout or draft reads it and it is not streamed.
    """
    g_NV = None if g_NV is None else mapped(noise, g_NV)
    return g_NV.dense() if isinstance(g_NV, Noise) and (noise.drafts or noise.readout) and not noise.stream else g_NV


def mapped(noise: NoiseConfig, g_NV: Tensor | Noise) -> Tensor | Noise:
    """`given`, of noise that the input alone reads: unmade noise stays so."""
    if not isinstance(g_NV, Noise):
        return seen(g_NV, noise.kind)
    return Mapped.of(g_NV, noise.kind) if noise.kind in MAPPED else g_NV


class NoiseInput(nn.Module):
    """softmax(g) through a V x H projection."""

    log_unigram_V: Tensor

    def __init__(self, config: NoiseConfig, vocab_size: int, hidden: int):
        super().__init__()
        self.config = config
        if config.rank >= hidden:
            raise ValueError(f"student.noise.rank is {config.rank}, but the student is {hidden} wide; take a lower rank, or projection own")
        self.projection = nn.Linear(vocab_size, config.rank or hidden, bias=False) if config.projection != "tied" else None
        self.widen = nn.Linear(config.rank, hidden, bias=False) if config.rank else None
        if self.projection is not None:
            nn.init.normal_(self.projection.weight, std=0.02)
        if self.widen is not None:
            nn.init.normal_(self.widen.weight, std=config.rank**-0.5)  # their product starts as large as an own projection
        if config.prior == "unigram":
            self.register_buffer("log_unigram_V", torch.zeros(vocab_size))
        self.known_scale = nn.Parameter(torch.zeros(hidden)) if config.known else None

    def forward(self, mask_H: Tensor, g_NV: Tensor | Noise, embedding_VH: Tensor) -> Tensor:
        """What stands at the masked positions, [N, H]."""
        seen_NH = self.project(g_NV, embedding_VH)
        return seen_NH if self.config.input == "replace" else seen_NH + mask_H

    def beside(self, known: ShownNoise, x_BMH: Tensor, embedding_VH: Tensor) -> Tensor:
        """Embeddings with what known tokens' noise adds to them, [B, M, H]."""
        assert self.known_scale is not None
        added_KH = self.known_scale * self.project(mapped(self.config, known.g_KV), embedding_VH)
        return x_BMH.flatten(0, 1).index_add(0, known.slot_P, added_KH.to(x_BMH.dtype)[known.of_P]).view_as(x_BMH)

    def project(self, g_NV: Tensor | Noise, embedding_VH: Tensor) -> Tensor:
        """[N, H]."""
        weight_VH = self.projection.weight.T if self.projection is not None else embedding_VH
        log_prior_V = self.log_unigram_V if self.config.prior == "unigram" else None
        if isinstance(g_NV, Noise):
            seen_NH = streamed.project(g_NV, weight_VH, log_prior_V)
        else:
            seen_NH = (g_NV if log_prior_V is None else g_NV + log_prior_V).softmax(-1) @ weight_VH
        return seen_NH if self.widen is None else self.widen(seen_NH)


class Readout(nn.Module):
    """logits + scale(h) g."""

    def __init__(self, hidden: int):
        super().__init__()
        self.scale = nn.Linear(hidden, 1)
        nn.init.zeros_(self.scale.weight)
        nn.init.zeros_(self.scale.bias)

    def forward(self, logits_NV: Tensor, hidden_NH: Tensor, g_NV: Tensor | Noise) -> Tensor:
        scale_N1 = F.softplus(self.scale(hidden_NH)).float()
        return streamed.add(logits_NV, scale_N1, g_NV) if isinstance(g_NV, Noise) else logits_NV + scale_N1 * g_NV


class Draft(nn.Module):
    """softmax(logits + scale g), re-embedded."""

    def __init__(self, hidden: int, noisy: bool, restart: bool):
        super().__init__()
        self.readout = Readout(hidden) if noisy else None
        self.carry = nn.Parameter(torch.zeros(hidden)) if restart else None
        self.embed = nn.Linear(hidden, hidden, bias=False)
        nn.init.eye_(self.embed.weight)

    def forward(self, logits_NV: Tensor, hidden_NH: Tensor, g_NV: Tensor | Noise | None, embedding_VH: Tensor) -> tuple[Tensor, Tensor]:
        """The draft's logits [N, V] and what it adds at the masked positions [N, H]."""
        if self.readout is not None and g_NV is not None:
            logits_NV = self.readout(logits_NV, hidden_NH, g_NV)
        return logits_NV, self.embed(logits_NV.softmax(-1).to(embedding_VH.dtype) @ embedding_VH)
