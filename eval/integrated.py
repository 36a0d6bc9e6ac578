"""What a student writes in a language whose sentences are all known, where it reads noise: an integral, with bounds on its error.

A student without noise is summed exactly (factorised). With noise, what it writes is an expectation over its noise g, the order
of the places, and the tokens x_A of all calls but the last, each drawn from the noise stream as in sampling; the last call is
summed over all its tokens:

    q(x) = E over g, order, x_A of [x agrees with x_A] prod over the places i that are open then of q(x_i | x_A, g)

The draws are made in groups, each with a mean of its own. The share of sentences is linear in q, so its error is that of a mean.
The distance is not: of an estimate q it is too large on average (sum of max(0, p - q) is convex), while for any set A of
sentences p(A) - q(A) is at most the distance. With A chosen by half of the groups and q(A) taken from the others, which are
independent of it, the estimate is too small on average. Between the two, and 1.96 standard errors of each beyond them, the
distance lies.
Shapes: B draws, G groups, M sentences, L tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.decoding import Decoding, restricted_log_probs
from eval.exact import BOS
from eval.languages import Language
from eval.metrics import Array, Interval
from eval.sampler import blank_rows, last_call

GROUPS = 128
_DRAWS_AT_ONCE = 512


def integrated(student: Any, known: Language, decoding: Decoding, draws: int, seed: int, device: str) -> Array:
    """q(x) of every sentence by group of draws, float64 [G, M]. Raises ValueError for fewer draws than groups."""
    if draws < GROUPS:
        raise ValueError(f"draws is {draws}; give at least {GROUPS}, one a group")
    ids_ML = torch.from_numpy(known.ids_ML).to(device)
    groups = np.array_split(np.arange(draws), GROUPS)
    return np.stack([_group(student, ids_ML, torch.from_numpy(group), decoding, seed, device) for group in groups])


def _group(student: Any, ids_ML: Tensor, sequence_id_B: Tensor, decoding: Decoding, seed: int, device: str) -> Array:
    total_M = torch.zeros(len(ids_ML), dtype=torch.float64, device=device)
    for some_B in sequence_id_B.to(device).split(_DRAWS_AT_ONCE):
        rows_BL = blank_rows(student, len(some_B), ids_ML.shape[1] + 1, BOS).to(device)
        known_BL, logits_NV = last_call(student, rows_BL, some_B, seed, decoding)
        total_M += _chances(student, known_BL[:, 1:], logits_NV, ids_ML, decoding).sum(0)
    mean: Array = (total_M / len(sequence_id_B)).cpu().numpy()
    return mean


def _chances(student: Any, known_BL: Tensor, logits_NV: Tensor, ids_ML: Tensor, decoding: Decoding) -> Tensor:
    """Probability that each row becomes each sentence in its last call, float64 [B, M]."""
    open_BL = known_BL == student.mask_id
    log_q_BLV = torch.full((*known_BL.shape, logits_NV.shape[1]), -torch.inf, dtype=torch.float64, device=known_BL.device)
    log_q_BLV.scatter_(2, known_BL.masked_fill(open_BL, 0)[..., None], 0.0)  # a token that is written stands
    if decoding.output == "argmax":
        log_q_BLV[open_BL] = torch.full_like(log_q_BLV[open_BL], -torch.inf).scatter_(1, logits_NV.argmax(1, keepdim=True), 0.0)
    else:
        log_q_BLV[open_BL] = restricted_log_probs(logits_NV.double(), decoding).log_softmax(1)
    log_q_BM = torch.zeros(len(known_BL), len(ids_ML), dtype=torch.float64, device=known_BL.device)
    for place, token_M in enumerate(ids_ML.T):
        log_q_BM += log_q_BLV[:, place, token_M]
    return log_q_BM.exp()


def share_of_sentences(q_GM: Array) -> Interval:
    """Share of sentences among all that is written, 95%; exact of one group, which is a sum."""
    return _within_one(Interval.of_mean(q_GM.sum(1)))


def distance(p_M: Array, q_GM: Array) -> Interval:
    """Total variation between p and what is written, between its two bounds, 95%; exact of one group, which is a sum."""
    above = Interval.of_mean((p_M - q_GM)[:, p_M > q_GM.mean(0)].sum(1))
    if len(q_GM) == 1:
        return _within_one(above)
    chosen_M = p_M > q_GM[::2].mean(0)
    below = Interval.of_mean((p_M - q_GM[1::2])[:, chosen_M].sum(1))
    middle = (max(0.0, below.value) + above.value) / 2
    return _within_one(Interval(middle, min(below.low, middle), max(above.high, middle)))


def _within_one(found: Interval) -> Interval:
    """As of a share: from 0 to 1."""
    return Interval(*(min(1.0, max(0.0, value)) for value in (found.value, found.low, found.high)))
