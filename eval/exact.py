"""A teacher that is known exactly: a probabilistic automaton, its texts, its own samples, and its noise datasets.

What it has read so far is one of K states; a state has the log-prob of every next token, -inf where that is impossible, and says
where each token leads. A Markov chain is one whose state is the last token (markov), a finite language one whose state is the
prefix (languages). Token 0 is BOS, state 0 is what follows it. Texts come from the noise stream's sampling draw 132, which no
dataset and no sampler uses.
Shapes: B rows, L positions, V vocabulary, K states, N positions.
"""

from __future__ import annotations

import functools
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.stream import NOISE_DRAW, stream_uniform
from noise import philox
from noise.commit import commit_shard
from noise.dataset import Manifest, Plan
from noise.identity import default_seed
from noise.receipt import committed
from noise.shard import FORMAT_VERSION
from pipeline.extract import rows_with_noise

TEXT_DRAW = philox.SAMPLING_DRAW + 4
ROWS_PER_SHARD = 4096
BOS = 0


class ExactTeacher(ABC):
    """The automaton. A subclass has `vocab_size`, `transition`, `next_state` and `identity`."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """V, BOS included."""

    @property
    @abstractmethod
    def transition(self) -> Tensor:
        """P(next token | state), float64 [K, V]."""

    @property
    @abstractmethod
    def next_state(self) -> Tensor:
        """State after each token, int64 [K, V]; anything where the token is impossible."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What a dataset's identity says of its teacher."""

    @functools.cached_property
    def log_p(self) -> Tensor:
        """The teacher's log-probs, float32 [K, V], exactly as the datasets are made with."""
        return self.transition.log().float()

    def walk(self, ids_BL: Tensor) -> Tensor:
        """State after each position of rows that begin with BOS, int64 [B, L]."""
        state_B = torch.zeros(len(ids_BL), dtype=torch.int64)
        found = [state_B]
        for position in range(1, ids_BL.shape[1]):
            state_B = self.next_state[state_B, ids_BL[:, position]]
            found.append(state_B)
        return torch.stack(found, 1)

    def scores(self, input_ids_BL: Tensor, at_N: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Log-probs of the token after each flat position: the interface that extraction has for every teacher."""
        yield slice(0, len(at_N)), self.log_p[self.walk(input_ids_BL).flatten()[at_N]]

    def texts(self, count: int, block_length: int, seed: int, first_sequence: int = 0) -> Tensor:
        """Rows int64 [B, L] of the teacher, from the stream: the inverse distribution function at one uniform a position."""
        cumulative_KV = self.transition.cumsum(1)
        sequence_id_B = torch.arange(first_sequence, first_sequence + count)

        def draw(state_B: Tensor, position: int) -> Tensor:
            u_B = stream_uniform(philox.rows(seed, sequence_id_B, torch.full_like(sequence_id_B, position), TEXT_DRAW))
            at_BV = cumulative_KV[state_B]
            return (at_BV <= u_B[:, None] * at_BV[:, -1:]).sum(1)

        return self._write(count, block_length, draw)

    def rollout(self, sequence_id_B: Tensor, block_length: int, seed: int) -> Tensor:
        """Rows int64 [B, L] that the teacher writes from the noise a student is given: token t is argmax(log p + g_t)."""

        def draw(state_B: Tensor, position: int) -> Tensor:
            rows_B5 = philox.rows(seed, sequence_id_B, torch.full_like(sequence_id_B, position), NOISE_DRAW)
            return (self.log_p[state_B] + philox.gumbel(rows_B5, self.vocab_size)).argmax(1)

        return self._write(len(sequence_id_B), block_length, draw)

    def _write(self, count: int, block_length: int, draw: Any) -> Tensor:
        ids_BL = torch.full((count, block_length), BOS)
        state_B = torch.zeros(count, dtype=torch.int64)
        for position in range(1, block_length):
            ids_BL[:, position] = draw(state_B, position)
            state_B = self.next_state[state_B, ids_BL[:, position]]
        return ids_BL


def write_dataset(
    folder: Path, teacher: ExactTeacher, rows: int, block_length: int, text_seed: int, draws: int = 1, epsilon: float = 0.125
) -> Manifest:
    """A finished noise dataset (parallel extraction) of the teacher's texts; continues where it stopped, and refuses another's folder."""
    identity = {
        "format_version": FORMAT_VERSION, "vocab_size": teacher.vocab_size, "block_length": block_length, "extraction": "parallel",
        "epsilon": epsilon, "draws": draws, "teacher": teacher.identity(), "text": {"rows": rows, "seed": str(text_seed)},
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
