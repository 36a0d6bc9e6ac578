"""Clipped mask rates, and the search for the interval in which the loss varies least (BD3-LM, arXiv 2503.09573, section 5).

Training draws the mask rate of a block from U[beta, omega] instead of U[0, 1]: rates near 0 and 1 teach little, and their estimates
of the bound vary most. The interval is the one that minimises, over blocks and rates,

    Var [ 1/rate  sum over the block's masked positions of  -log softmax(logits)[x] ]   a token

It is found from one evaluation at rates in U[0, 1]: given that a rate fell into an interval it is uniform there, so sums over narrow bins
hold every interval's variance, and no interval needs an evaluation of its own.
Shapes: K bins, C blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 20
SMALLEST_WIDTH = 10  # bins; with less a student would not see enough rates to write text in few steps


def check(clip: tuple[float, float]) -> None:
    """Raises ValueError for what is no interval of mask rates."""
    low, high = clip
    if not (0 <= low <= high <= 1 and high > 0):
        raise ValueError(f"student.clip is [{low}, {high}]; give two mask rates beta <= omega between 0 and 1, omega above 0")


def no_moments(device: torch.device) -> Tensor:
    """What `moments` gives of no block."""
    return torch.zeros(BINS, 3, dtype=torch.float64, device=device)


def moments(rate_C: Tensor, loss_C: Tensor) -> Tensor:
    """Count, sum and sum of squares of the blocks' losses a token, by their rates' bin: float64 [K, 3]; of several batches, they add up."""
    loss_C = loss_C.double()
    bin_C = (rate_C * BINS).long().clamp_max(BINS - 1)
    return no_moments(rate_C.device).index_add_(0, bin_C, torch.stack((torch.ones_like(loss_C), loss_C, loss_C * loss_C), 1))


def variance(moments_K3: Tensor, first: int, stop: int) -> float:
    """Variance of the loss at rates from first / K to stop / K; infinite where fewer than two blocks had one."""
    count, total, squares = moments_K3[first:stop].sum(0).tolist()
    return (squares - total * total / count) / (count - 1) if count > 1 else float("inf")


def search(moments_K3: Tensor) -> tuple[float, float]:
    """(beta, omega) with the smallest variance; of equal ones the widest, then the lowest."""
    widths = range(BINS, SMALLEST_WIDTH - 1, -1)
    intervals = [(first, first + width) for width in widths for first in range(BINS - width + 1)]
    first, stop = min(intervals, key=lambda at: variance(moments_K3, *at))
    return first / BINS, stop / BINS
