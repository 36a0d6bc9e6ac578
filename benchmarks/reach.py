"""How far back a token's noise lies: what an ideal reader knows of the teacher's token from the last few noises, and what a student takes from them.

The teacher's token at t is a function of the noise at t and of the token before it, which is a function of the noise at t - 1, and
so on to the row's start. So the noise of t - k..t leaves a distribution of the token at t: that of the state before them, which
the chain's own law gives, pushed through k + 1 known maps. Its likeliest token is the best guess that there is, and how often that is
right is exact, up to the draw of the noise itself. A student is shown the same noise, and fresh noise at every other place.
Shapes: S rows, L positions after BOS, K states, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.exact import BOS
from eval.markov import MarkovTeacher
from eval.metrics import Array
from eval.sampler import blank_rows


def maps(teacher: MarkovTeacher, g_SLV: Tensor) -> Tensor:
    """The token that the teacher writes at each position from each state, given the noise there: int64 [S, L, K]."""
    return torch.stack([(log_p_V + g_SLV).argmax(-1) for log_p_V in teacher.log_p], -1)


def ideal(teacher: MarkovTeacher, map_SLK: Tensor, before: int) -> Array:
    """How often the best guess from the noise of a position and of `before` positions before it is the teacher's token, float64 [L]."""
    rows, length, states = map_SLK.shape
    start_K = torch.zeros(states, dtype=torch.float64).index_fill(0, torch.tensor([BOS]), 1.0)
    law_LK = [start_K]  # of the state before each position
    for _ in range(1, length):
        law_LK.append(law_LK[-1] @ teacher.transition)
    found = []
    for at in range(length):
        first = max(0, at - before)
        known_SK = law_LK[first].expand(rows, -1)
        for position in range(first, at + 1):
            known_SK = torch.zeros_like(known_SK).scatter_add(1, map_SLK[:, position], known_SK)
        found.append(float(known_SK.amax(1).mean()))
    return np.array(found)


def equivalent(match: float, ideal_k: list[float]) -> float:
    """How many positions before its own an ideal reader needs to be right this often; between two of them by linear interpolation."""
    return float(np.interp(match, ideal_k, range(len(ideal_k))))


@torch.inference_mode()
def shown(student: Any, g_SLV: Tensor, other_SLV: Tensor, seen_LL: Tensor) -> Tensor:
    """A student's likeliest token at each position t in one call that shows it g where seen_LL[t] is set, and other noise elsewhere: int64 [S, L]."""
    rows, length, _ = g_SLV.shape
    ids_BL = blank_rows(student, rows, length + 1, BOS)
    found = []
    for at in range(length):
        mixed_SLV = torch.where(seen_LL[at][:, None], g_SLV, other_SLV)
        found.append(student.logits(ids_BL, mixed_SLV.flatten(0, 1)).view(rows, length, -1)[:, at].argmax(-1))
    return torch.stack(found, 1)


def windows(length: int, before: list[int]) -> dict[str, Tensor]:
    """Name -> which noises the student is shown for each position, bool [L, L]: its own and some before it, all up to it, all."""
    back_LL = torch.arange(length)[:, None] - torch.arange(length)  # how far each noise lies before each position
    named = {str(k): (back_LL >= 0) & (back_LL <= k) for k in before}
    return {**named, "all before": back_LL >= 0, "all": torch.ones(length, length, dtype=torch.bool)}
