"""A Markov chain as an exact teacher, what is true of it, and the best that a student without noise could do on it.

Token 0 is BOS, tokens 1..S are the states. Each state has a few possible successors, whose probabilities are Dirichlet(1);
every other transition is impossible (log-prob -inf). The first state is drawn from the stationary distribution, so every
position has the same unigram and every adjacent pair the same joint: what samples should look like is computed, not estimated.

The chain itself comes from the noise stream's sampling draw 131, which no dataset and no sampler uses.
Shapes: B rows, L positions, V = S + 1 vocabulary, N positions.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from eval.exact import ExactTeacher
from noise import philox
from trainer.config import NoiseConfig

CHAIN_DRAW = philox.SAMPLING_DRAW + 3


@dataclass(frozen=True)
class MarkovTeacher(ExactTeacher):
    """An order-1 chain: what it has read is its last token. Raises ValueError for a chain that cannot be."""

    states: int = 64
    """States S; the vocabulary is one wider, for BOS."""
    successors: int = 4
    """Possible successors of each state."""
    seed: int = 1
    """Names the chain."""

    def __post_init__(self) -> None:
        if not 2 <= self.successors <= self.states:
            raise ValueError(f"chain.successors is {self.successors}; it must be in 2..chain.states = {self.states}")

    @property
    def vocab_size(self) -> int:
        return self.states + 1

    @functools.cached_property
    def transition(self) -> Tensor:
        """P(next | last), float64; row 0 is the distribution of the first state, column 0 is impossible."""
        state_S = torch.arange(self.states)
        drawn_SV = philox.exponential(philox.words(philox.rows(self.seed, state_S, torch.zeros_like(state_S), CHAIN_DRAW), self.states)).double()
        # the successors are the smallest exponentials, and fresh exponentials, divided by their sum, are Dirichlet(1)
        chosen = drawn_SV.topk(self.successors, dim=1, largest=False).indices
        fresh = philox.rows(self.seed, state_S, torch.ones_like(state_S), CHAIN_DRAW)
        weight = philox.exponential(philox.words(fresh, self.successors)).double()
        p_VV = torch.zeros(self.vocab_size, self.vocab_size, dtype=torch.float64)
        p_VV[1:, 1:].scatter_(1, chosen, weight / weight.sum(1, keepdim=True))
        stationary_S = torch.linalg.matrix_power(p_VV[1:, 1:], 2**14).mean(0)
        p_VV[0, 1:] = stationary_S / stationary_S.sum()
        return p_VV

    @functools.cached_property
    def next_state(self) -> Tensor:
        return torch.arange(self.vocab_size).expand(self.vocab_size, -1)

    @property
    def joint(self) -> Tensor:
        """True joint of two adjacent tokens after BOS, float64."""
        return self.transition[0][:, None] * self.transition

    @property
    def entropy(self) -> float:
        """True entropy of a token, nats."""
        return float(torch.special.entr(self.transition[0]).sum())

    @property
    def entropy_rate(self) -> float:
        """True entropy of a token given the one before, nats."""
        return float((self.transition[0] * torch.special.entr(self.transition).sum(1)).sum())

    def identity(self) -> dict[str, Any]:
        """What a dataset's identity says of its teacher."""
        digest = hashlib.sha256(self.log_p.numpy().tobytes()).hexdigest()
        return {"kind": "exact Markov chain", **asdict(self), "log_probs_sha256": digest, "temperature": 1.0}


class ExactMarginals:
    """What a student without noise becomes however large it is and however long it trains: the exact distribution given what is known.

    It minimises the loss of a masked student; that the tokens of one call are drawn independently is all that is wrong with it.
    Where earlier calls wrote neighbours that the chain cannot join, no distribution is right, and the left one is followed.
    """

    def __init__(self, teacher: MarkovTeacher, length: int):
        self.vocab_size, self.mask_id, self.block_length, self.ahead = teacher.vocab_size, teacher.vocab_size, length, 0
        self.noise = NoiseConfig()
        powers = [torch.eye(self.vocab_size, dtype=torch.float64)]
        for _ in range(length):
            powers.append(powers[-1] @ teacher.transition)
        self.power_DVV = torch.stack(powers)

    def logits(self, ids_BL: Tensor, g_NV: Tensor | None) -> Tensor:
        """log P(x | nearest known token on the left and on the right), up to a constant: float32 [N, V]."""
        position_L, known_BL = torch.arange(ids_BL.shape[1]), ids_BL != self.mask_id
        left_BL = torch.where(known_BL, position_L, 0).cummax(1).values
        right_BL = torch.where(known_BL, position_L, len(position_L)).flip(1).cummin(1).values.flip(1)
        row_N, at_N = (~known_BL).nonzero(as_tuple=True)
        left_N, right_N = left_BL[row_N, at_N], right_BL[row_N, at_N]
        p_NV = self.power_DVV[at_N - left_N, ids_BL[row_N, left_N]]
        open_N = right_N == len(position_L)  # nothing known on the right
        token_N = torch.where(open_N, 0, ids_BL[row_N, right_N.clamp_max(len(position_L) - 1)])
        after_NV = self.power_DVV[torch.where(open_N, 0, right_N - at_N), :, token_N]
        both_NV = p_NV * torch.where(open_N[:, None], 1.0, after_NV)
        return torch.where(both_NV.sum(1, keepdim=True) > 0, both_NV, p_NV).log().float()
