"""What stands for the teacher in token-level distillation, as random weights at one position, and the errors that follow.

An estimator puts weights w in the place of the teacher's p: the loss is `b + sum w_i (l_i - b)` with l = -log q of a student, its
gradient with respect to the student's logits `(sum w) q - w`. Their means and variances over the noise are exact, not simulated.
Shapes: V vocabulary, S values of the noise that entries share, C columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from noise import estimate
from noise.sketch import Codec

MEANS = (1, 1_000, 1_000_000)  # tokens that a mean is taken over
NODES = 48
PIECE = 8192  # entries at a time: they stay in a core's cache
TAILS = ("truncated", "renormalised", "tail even")
Figures = dict[str, Any]


@dataclass(frozen=True)
class Student:
    """A student at one position, float64."""

    q_V: Tensor
    nll_V: Tensor


@dataclass(frozen=True)
class Weights:
    """What an estimator puts in the place of p at one position: random weights w."""

    mean_V: Tensor
    """Over the noise."""
    covariance_CC: Tensor
    """Of `sum w_i column_i` over the noise, for the columns of `columns`."""
    variance: float = 0.0
    """Of each w_i, added up."""
    controlled: bool = False
    """Whether the student's entropy is the control value; otherwise 0 is."""


class Account:
    """An estimator's errors for one student, position by position."""

    def __init__(self) -> None:
        self.error: list[float] = []
        self.variance = self.gradient_square = self.gradient_variance = 0.0
        self.gradient_V: Tensor | float = 0.0

    def add(self, weights: Weights, truth_V: Tensor, student: Student, column: int) -> None:
        """The errors of loss and gradient at a position; the student's columns are `column` and the one after it."""
        b = float(student.q_V @ student.nll_V) if weights.controlled else 0.0
        off_V, cov = weights.mean_V - truth_V, weights.covariance_CC
        self.error.append(float(off_V @ (student.nll_V - b)))
        self.variance += float(cov[column, column] - 2 * b * cov[0, column] + b * b * cov[0, 0])
        off_gradient_V = off_V.sum() * student.q_V - off_V
        self.gradient_V = self.gradient_V + off_gradient_V
        self.gradient_square += float(off_gradient_V @ off_gradient_V)
        self.gradient_variance += float(student.q_V @ student.q_V * cov[0, 0] - 2 * cov[0, column + 1]) + weights.variance

    def mean_gradient_square(self) -> float:
        """Squared length of the mean gradient (error) of what the positions are a sample of, without that sample's own noise."""
        count = len(self.error)
        assert isinstance(self.gradient_V, Tensor)
        return max(0.0, (float(self.gradient_V @ self.gradient_V) - self.gradient_square) / (count * (count - 1)))

    def figures(self, gradient: float) -> Figures:
        """Bias, deviation and root mean square errors of means; of the gradient relative to `gradient`, a length."""
        count, bias = len(self.error), float(np.mean(self.error))
        std = float(np.sqrt(np.var(self.error) + self.variance / count))
        lasting = self.mean_gradient_square()
        passing = (self.gradient_square + self.gradient_variance) / count - lasting
        return {
            "bias": bias,
            "std": std,
            "rmse": {str(n): (bias**2 + std**2 / n) ** 0.5 for n in MEANS},
            "gradient_error": {str(n): (lasting + passing / n) ** 0.5 / gradient for n in MEANS},
        }


def columns(students: list[Student]) -> Tensor:
    """[V, C]: ones, then -log q and q of each student."""
    pairs = [column_V for student in students for column_V in (student.nll_V, student.q_V)]
    return torch.stack([torch.ones_like(pairs[0]), *pairs], 1)


def kept_weights(p_V: Tensor, token: int, column_VC: Tensor, codec: Codec) -> Weights:
    """The sketch's weights. Given s, the sum of its draws' E_0, entries are kept independently, with probability 1 - e^(-p s/c).

    s is Gamma(R): what an entry varies by alone has a closed form, what entries share is a Gauss-Laguerre sum over s.
    """
    from scipy.special import roots_genlaguerre

    at = torch.tensor([token])
    middle_V = torch.exp(-codec.step * ((-p_V.log() / codec.step).floor() + 0.5))
    weight_V = (middle_V / estimate.inclusion(middle_V, codec)).index_copy(0, at, p_V[at])
    pi_V = estimate.inclusion(p_V, codec).index_fill(0, at, 1.0)
    node_S, mass_S = (torch.from_numpy(values) for values in roots_genlaguerre(NODES, codec.draws - 1))
    mass_S = mass_S / mass_S.sum()
    rate_V = p_V / codec.c
    alone_V = weight_V**2 * ((1 + rate_V) ** -codec.draws - (1 + 2 * rate_V) ** -codec.draws)
    free_V, given_SC = weight_V.index_fill(0, at, 0.0), column_VC.new_zeros(NODES, column_VC.shape[1])
    for part in torch.arange(len(p_V)).split(PIECE):
        given_SC -= torch.exp(-node_S[:, None] * rate_V[part]) @ (free_V[part, None] * column_VC[part])
    share_SC = given_SC - mass_S @ given_SC
    alone_V[token] = 0.0
    covariance_CC = share_SC.T @ (mass_S[:, None] * share_SC) + column_VC.T @ (alone_V[:, None] * column_VC)
    return Weights(weight_V * pi_V, covariance_CC, float((weight_V**2 * pi_V * (1 - pi_V)).sum()), controlled=True)


def sampled_weights(p_V: Tensor, column_VC: Tensor, k: int) -> Weights:
    """k independent tokens x ~ p, each with weight 1/k."""
    off_VC = column_VC - p_V @ column_VC
    return Weights(p_V, off_VC.T @ (p_V[:, None] * off_VC) / k, (1 - float(p_V @ p_V)) / k)


def top_k_weights(p_V: Tensor, column_VC: Tensor, k: int, tail: str) -> Weights:
    """The k largest entries of p; of what is missing from 1, nothing is said, or it is shared in proportion or over the others."""
    top_V = torch.zeros_like(p_V).index_fill(0, p_V.topk(k).indices, 1.0)
    inside = float(p_V @ top_V)
    weight_V = {
        "truncated": p_V * top_V,
        "renormalised": p_V * top_V / inside,
        "tail even": p_V * top_V + (1 - inside) / (len(p_V) - k) * (1 - top_V),
    }[tail]
    return Weights(weight_V, column_VC.new_zeros(column_VC.shape[1], column_VC.shape[1]))
