"""A student and a small causal LM whose distributions are known, and the law of every sampler by enumeration.

A law is the exact probability of each word. It is computed from what a sampler says of itself, step by step: which positions
are revealed with which probability, given what is known; each of them then draws its token alone from its conditional.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from scipy import stats

from trainer.config import NoiseConfig

ROWS = 20_000
State = tuple[int, ...]
Plan = Callable[[int, State], list[tuple[float, tuple[int, ...]]]]
"""(step, state) -> [(probability, positions that are revealed)]"""


class TableStudent:
    """Knows a joint distribution over M tokens exactly: logits are the log conditionals given the tokens that are known.

    With noise it adds g to them, as a perfect readout would. It remembers what it was asked.
    """

    def __init__(self, vocab_size: int = 3, unknown: int = 3, noise: str = "none", readout: bool = False, seed: int = 0):
        self.vocab_size, self.mask_id, self.unknown, self.ahead = vocab_size, vocab_size, unknown, 0
        self.noise = NoiseConfig(kind=noise, readout=readout)
        self.words = torch.tensor(list(itertools.product(range(vocab_size), repeat=unknown)))
        weight = torch.rand(len(self.words), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3
        self.joint = weight / weight.sum()
        self.asked: list[torch.Tensor] = []
        self.given: list[torch.Tensor | None] = []

    def logits(self, ids_BL: torch.Tensor, g_NV: torch.Tensor | None, length_B: torch.Tensor | None = None) -> torch.Tensor:
        """A row that is cut says nothing of what stood behind."""
        self.asked.append(ids_BL.clone())
        self.given.append(g_NV)
        cut_BL = ids_BL if length_B is None else ids_BL.where(torch.arange(ids_BL.shape[1]) < length_B[:, None], self.mask_id)
        logits_NV = self.conditionals(cut_BL[:, 1:]).log()[:, : ids_BL.shape[1] - 1][ids_BL[:, 1:] == self.mask_id].float()
        return logits_NV if g_NV is None or not self.noise.readout else logits_NV + g_NV

    def conditionals(self, ids_BM: torch.Tensor) -> torch.Tensor:
        """p of every position's token given the known ones, float64 [B, M, V]; ids may end early."""
        ids_BM = torch.nn.functional.pad(ids_BM, (0, self.unknown - ids_BM.shape[1]), value=self.mask_id)
        known = ids_BM[:, None] == self.words[None]
        weight_BW = self.joint * (known | (ids_BM[:, None] == self.mask_id)).all(-1)
        p_BMV = torch.einsum("bw,wmv->bmv", weight_BW, torch.nn.functional.one_hot(self.words, self.vocab_size).double())
        return p_BMV / p_BMV.sum(-1, keepdim=True)

    def marginals(self) -> torch.Tensor:
        return self.conditionals(torch.full((1, self.unknown), self.mask_id))[0]


class BlockTable(TableStudent):
    """The known joint, asked for one block at a time; it must always be asked with everything before the block filled in."""

    def __init__(self, block_size: int, vocab_size: int = 3, unknown: int = 4, **more: Any):
        super().__init__(vocab_size, unknown, **more)
        self.block_size, self.block_length = block_size, unknown + 1

    def empty_cache(self) -> Any:
        return self

    def keep_rows(self, row_R: torch.Tensor) -> None:
        """Nothing is kept."""

    def logits(self, ids_BT: torch.Tensor, g_NV: torch.Tensor | None, length_B: Any = None, cache: Any = None) -> torch.Tensor:
        start = (ids_BT.shape[1] - 1) // self.block_size * self.block_size
        assert not (ids_BT[:, :start] == self.mask_id).any() and (ids_BT == self.mask_id).any()
        later = torch.full((len(ids_BT), self.unknown + 1 - ids_BT.shape[1]), self.mask_id)
        self.asked.append(ids_BT.clone())
        self.given.append(g_NV)
        p_BMV = self.conditionals(torch.cat((ids_BT, later), 1)[:, 1:])
        logits_NV = p_BMV[:, : ids_BT.shape[1] - 1][ids_BT[:, 1:] == self.mask_id].log().float()
        return logits_NV if g_NV is None or not self.noise.readout else logits_NV + g_NV


class TableLM:
    """The same joint, read from left to right."""

    def __init__(self, student: TableStudent):
        self.student, self.vocab_size = student, student.vocab_size

    def logits_of(self, ids_BL: torch.Tensor, where_N: torch.Tensor) -> torch.Tensor:
        row_N, position_N = where_N // ids_BL.shape[1], where_N % ids_BL.shape[1]
        seen = ids_BL[row_N, 1:].clone()
        seen[torch.arange(seen.shape[1]) >= position_N[:, None] - 1] = self.student.mask_id
        return self.student.conditionals(seen)[torch.arange(len(row_N)), position_N - 1].log().float()


def law(student: TableStudent, steps: int, plan: Plan) -> torch.Tensor:
    """Probability of each of `student.words`, float64."""
    states: dict[State, float] = {(student.mask_id,) * student.unknown: 1.0}
    for step in range(steps):
        after: dict[State, float] = {}
        for state, p in states.items():
            conditional = student.conditionals(torch.tensor([state]))[0]
            for chance, positions in plan(step, state):
                for tokens in itertools.product(range(student.vocab_size), repeat=len(positions)):
                    new, q = list(state), p * chance
                    for position, token in zip(positions, tokens, strict=True):
                        new[position], q = token, q * float(conditional[position, token])
                    after[tuple(new)] = after.get(tuple(new), 0.0) + q
        states = after
    found = torch.tensor([states.get(tuple(word), 0.0) for word in student.words.tolist()], dtype=torch.float64)
    assert abs(float(found.sum()) - 1) < 1e-9
    return found


def fits(ids_BM: torch.Tensor, student: TableStudent, p_W: torch.Tensor) -> bool:
    """A chi-square test of whole rows against probabilities of all words; seeds are fixed, so it never flickers."""
    code = (ids_BM * student.vocab_size ** torch.arange(student.unknown - 1, -1, -1)).sum(1)
    return fits_counts(torch.bincount(code, minlength=len(p_W)), p_W)


def fits_counts(found: torch.Tensor, p: torch.Tensor) -> bool:
    """A chi-square test of counts; cells with fewer than 5 expected are one cell."""
    expected = (p / p.sum() * found.sum()).numpy()
    keep = expected > 5
    observed = found.numpy()
    if not keep.all():
        observed, expected = [*observed[keep], observed[~keep].sum()], [*expected[keep], expected[~keep].sum()]
    return bool(stats.chisquare(observed, expected).pvalue > 1e-3)


def product(p_LV: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    return torch.stack([p_LV[t][words[:, t]] for t in range(words.shape[1])]).prod(0)
