"""A teacher that is known exactly: a Markov chain, its texts, its noise datasets, and what is true of it.

Token 0 is BOS, tokens 1..S are the states. Each state has a few possible successors, whose probabilities are Dirichlet(1);
every other transition is impossible (log-prob -inf). The first state is drawn from the stationary distribution, so every
position has the same unigram and every adjacent pair the same joint: what samples should look like is computed, not estimated.

Chain and texts come from the noise stream's sampling draws 131 and 132, which no dataset and no sampler uses.
Shapes: B rows, L positions, V = S + 1 vocabulary, N positions.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.sampler import NOISE_DRAW, stream_uniform
from noise import philox
from noise.commit import commit_shard
from noise.dataset import Manifest, Plan
from noise.identity import default_seed
from noise.receipt import committed
from noise.shard import FORMAT_VERSION
from pipeline.extract import rows_with_noise
from trainer.config import NoiseConfig

CHAIN_DRAW, TEXT_DRAW = philox.SAMPLING_DRAW + 3, philox.SAMPLING_DRAW + 4
ROWS_PER_SHARD = 4096
BOS = 0


@dataclass(frozen=True)
class MarkovTeacher:
    """An order-1 chain. Raises ValueError for a chain that cannot be."""

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
    def log_p(self) -> Tensor:
        """The teacher's log-probs, float32, exactly as the datasets are made with."""
        return self.transition.log().float()

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

    def scores(self, input_ids_BL: Tensor, at_N: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Log-probs of the token after each flat position: the interface that extraction has for every teacher."""
        yield slice(0, len(at_N)), self.log_p[input_ids_BL.flatten()[at_N]]

    def texts(self, count: int, block_length: int, seed: int, first_sequence: int = 0) -> Tensor:
        """Rows int64 [B, L] of the chain, from the stream: the inverse distribution function at one uniform a position."""
        cumulative_VV = self.transition.cumsum(1)
        ids_BL = torch.full((count, block_length), BOS)
        sequence_id_B = torch.arange(first_sequence, first_sequence + count)
        for position in range(1, block_length):
            u_B = stream_uniform(philox.rows(seed, sequence_id_B, torch.full_like(sequence_id_B, position), TEXT_DRAW))
            at_BV = cumulative_VV[ids_BL[:, position - 1]]
            ids_BL[:, position] = (at_BV <= u_B[:, None] * at_BV[:, -1:]).sum(1)
        return ids_BL

    def rollout(self, sequence_id_B: Tensor, block_length: int, seed: int) -> Tensor:
        """Rows int64 [B, L] that the teacher writes from the noise a student is given: token t is argmax(log p + g_t)."""
        ids_BL = torch.full((len(sequence_id_B), block_length), BOS)
        for position in range(1, block_length):
            rows_B5 = philox.rows(seed, sequence_id_B, torch.full_like(sequence_id_B, position), NOISE_DRAW)
            ids_BL[:, position] = (self.log_p[ids_BL[:, position - 1]] + philox.gumbel(rows_B5, self.vocab_size)).argmax(1)
        return ids_BL

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
        self.vocab_size, self.mask_id, self.block_length = teacher.vocab_size, teacher.vocab_size, length
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


def write_dataset(folder: Path, teacher: MarkovTeacher, rows: int, block_length: int, text_seed: int, draws: int = 1) -> Manifest:
    """A finished noise dataset (parallel extraction) of the chain's texts; continues where it stopped, and refuses another's folder."""
    identity = {
        "format_version": FORMAT_VERSION, "vocab_size": teacher.vocab_size, "block_length": block_length, "extraction": "parallel",
        "epsilon": 0.125, "draws": draws, "teacher": teacher.identity(), "text": {"rows": rows, "seed": str(text_seed)},
        "rows_per_shard": ROWS_PER_SHARD,
    }  # fmt: skip
    identity["seed"] = str(default_seed(identity))
    plan = Plan(identity, {}, [[start, min(start + ROWS_PER_SHARD, rows)] for start in range(0, rows, ROWS_PER_SHARD)])
    plan.write(folder)
    if (folder / "manifest.json").exists():
        return Manifest.read(folder)
    there = committed(folder)
    for shard, (start, stop) in enumerate(plan.shards):
        if shard not in there:
            metadata, count = plan.metadata(shard), stop - start
            ids_BL = teacher.texts(count, block_length, text_seed, start).numpy().astype(np.int32)
            sequence_id_B = np.arange(count, dtype=np.uint64) + np.uint64(shard << 32)
            length_B = np.full(count, block_length, np.int32)
            commit_shard(folder, metadata, [rows_with_noise(metadata, sequence_id_B, ids_BL, length_B, teacher)], characters_in=0)
            print(f"{folder}: {stop} of {rows} rows", file=sys.stderr, flush=True)
    return Manifest.write(folder, plan)
