"""What the kept entries cost an ideal coder that rebuilds the noise stream: the floor that a layout of them is held against.

The stream gives the decoder every threshold tau_i = c min_r(E_ir / E_0r), and i is kept iff p_i > tau_i. So what is kept
is p itself, quantised above its threshold and silent below, and the stream (independent of p) says nothing more. A
decoder that believes entry i's probability has the distribution function F_i pays

    -log2 F_i(tau_i)                        for an entry that is not kept
    -log2 (F_i(top) - F_i(bottom))          for a kept one; bottom = max(tau_i, its code's lower edge), top its upper edge

`docs/measured.md` has the derivation. F is learned from other positions: `pooled` is one F for the whole vocabulary, `by frequency`
one for each class of entries by corpus frequency. Below that lies only a model of language; with the teacher itself the cost is zero.

Shapes: N positions measured, M positions learned from, V vocabulary, C frequency classes, Z bins of -ln p.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from noise import philox
from noise.compiled import compiled
from noise.sketch import Codec

BIN = 0.25  # nats
BINS = 160  # -ln p up to 40: past anything that can be kept; the last bin takes all the rest
PRIOR = 16.0  # observations that a class borrows from the pooled distribution
CLASS_EDGES = (16, 64, 256, 1024, 4096, 16384)  # ranks by corpus frequency


@dataclass(frozen=True)
class Beliefs:
    """Distributions of -ln p, linear within bins."""

    below_CZ: Tensor
    """float64 [C, BINS + 1]: share of entries with -ln p below each edge, 0 to 1"""
    class_V: Tensor
    """int64: each entry's class"""

    @classmethod
    def learn(cls, log_probs_MV: Tensor, class_V: Tensor) -> Beliefs:
        """Counted at M positions; a class without much data leans on all of them together."""
        classes = int(class_V.max()) + 1
        count_CZ = torch.zeros(classes * BINS, dtype=torch.float64)
        for log_probs_mV in log_probs_MV.split(32):
            bin_mV = (-log_probs_mV / BIN).clamp(0, BINS - 1).long()
            count_CZ += torch.bincount((class_V * BINS + bin_mV).flatten(), minlength=classes * BINS)
        count_CZ = count_CZ.view(classes, BINS)
        pooled_Z = count_CZ.sum(0) + 0.5
        count_CZ = count_CZ + PRIOR * pooled_Z / pooled_Z.sum()
        share_CZ = count_CZ / count_CZ.sum(1, keepdim=True)
        return cls(torch.cat([torch.zeros(classes, 1, dtype=torch.float64), share_CZ.cumsum(1)], 1), class_V)

    def below(self, nats: Tensor, entry: Tensor) -> Tensor:
        """Believed probability that -ln p of the entries is below `nats`; the two broadcast."""
        at = (nats / BIN).clamp(0, BINS - 1e-6)
        edge = at.long()
        class_ = self.class_V[entry]
        left, right = self.below_CZ[class_, edge], self.below_CZ[class_, edge + 1]
        return left + (right - left) * (at - edge)


def frequency_classes(unigram_V: Tensor) -> Tensor:
    """int64 [V]: entries of like corpus frequency, by rank."""
    rank_V = torch.empty_like(unigram_V, dtype=torch.int64)
    rank_V[unigram_V.argsort(descending=True, stable=True)] = torch.arange(len(unigram_V))
    return torch.bucketize(rank_V, torch.tensor(CLASS_EDGES), right=True)


@compiled
def least_ratio(rows_N5: Tensor, vocab_size: int) -> Tensor:
    """E_i / E_0 of one draw, float32 [N, V]."""
    return philox.exponential(philox.words(rows_N5, vocab_size)) / philox.winner_exponential(rows_N5)[:, None]


def thresholds(rows_N5: Tensor, codec: Codec) -> Tensor:
    """-ln tau, float64 [N, V]: an entry is kept iff its -ln p is below."""
    ratio_NV = least_ratio(rows_N5, codec.vocab_size)
    for draw in range(1, codec.draws):
        ratio_NV = torch.minimum(ratio_NV, least_ratio(philox.with_draw(rows_N5, draw), codec.vocab_size))
    return -(ratio_NV.double() * codec.c).log()


def bits(log_probs_NV: Tensor, token_N: Tensor, nats_NV: Tensor, codec: Codec, beliefs: Beliefs) -> tuple[float, float]:
    """(bits that say which entries are kept, bits of their codes) over all N positions, for an ideal coder with these beliefs.

    `nats_NV` are the positions' `thresholds`.
    """
    position_N = torch.arange(len(token_N))
    entry_V = torch.arange(log_probs_NV.shape[1])
    kept_NV = -log_probs_NV < nats_NV
    kept_NV[position_N, token_N] = False
    chance_NV = beliefs.below(nats_NV, entry_V[None, :])
    silent_NV = -torch.log1p(-chance_NV.clamp_max(1 - 1e-12))
    silent_NV[position_N, token_N] = 0.0
    silent_NV[kept_NV] = 0.0
    owner_K, index_K = kept_NV.nonzero(as_tuple=True)
    limit_K, chance_K = nats_NV[owner_K, index_K], chance_NV[owner_K, index_K]
    code_K = (-log_probs_NV[owner_K, index_K].double() / codec.step).floor()
    upper_K = torch.minimum((code_K + 1) * codec.step, limit_K)
    exact_K = beliefs.below(upper_K, index_K) - beliefs.below(code_K * codec.step, index_K)
    which = float(silent_NV.sum() - chance_K.log().sum())
    codes = float((chance_K.log() - exact_K.log()).sum())
    return which / math.log(2), codes / math.log(2)
