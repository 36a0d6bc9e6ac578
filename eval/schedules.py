"""How many positions of a row are known after each step, and which come first.

    even            the unknown positions in `nfe` groups as equal as possible: any number of forwards from 1 to L - 1
    ancestral       MDLM's reverse process on the log-linear schedule (alpha_t = 1 - t) in `nfe` steps: a masked position is revealed
                    between t and s with probability (t - s) / t. Most of the last steps reveal nothing in a row; its forward is
                    then skipped (the student is not told the time, so the last logits would be the same), and NFE counts
                    what is left: nfe (1 - (1 - 1 / nfe)^M) on average for M unknown positions, never more than M
    first_hitting   the same process at its exact times instead of on a grid (arXiv 2409.02908): one position a forward,
                    so its NFE is the number of tokens: what it gains over other samplers says nothing of parallel decoding

Each position has one uniform of the stream, u: the share of the reverse process that is over when it is revealed. On a
grid of `nfe` steps that is step floor(nfe u), which is ancestral's law exactly, for a student that is not told the time.
So the samplers are one process seen at different times: first_hitting gives the very tokens of `even` at nfe = M.

Which positions: `random` takes them by u; `confidence` takes the surest of the moment; `left_to_right` by position.
Shapes: B rows, L positions, M unknown positions at the start (row-major), N still masked, S steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eval.decoding import Decoding, OrderName
from eval.stream import ORDER_DRAW, stream_uniform
from noise import philox


def reveal_times(seed: int, sequence_id_M: Tensor, position_M: Tensor) -> Tensor:
    """u of each unknown position, float64 [M] in (0, 1)."""
    return stream_uniform(philox.rows(seed, sequence_id_M, position_M, ORDER_DRAW))


def known_after(decoding: Decoding, unknown_B: Tensor, time_M: Tensor, row_M: Tensor) -> Tensor:
    """How many of a row's unknown positions are known after each step: int64 [S, B], never falling, unknown_B at the end."""
    if decoding.sampler == "even":
        step_S1 = torch.arange(1, decoding.nfe + 1, device=unknown_B.device)[:, None]
        return (unknown_B * step_S1 + decoding.nfe - 1) // decoding.nfe
    if decoding.sampler == "first_hitting":
        step_S1 = torch.arange(1, int(unknown_B.amax()) + 1, device=unknown_B.device)[:, None]
        return torch.minimum(step_S1, unknown_B)
    assert decoding.sampler == "ancestral"
    step_M = (time_M * decoding.nfe).long().clamp_max(decoding.nfe - 1)
    revealed_SB = torch.zeros(decoding.nfe, len(unknown_B), dtype=torch.int64, device=unknown_B.device)
    return revealed_SB.index_put_((step_M, row_M), torch.ones_like(row_M), accumulate=True).cumsum(0)


def fixed_rank(order: OrderName, time_M: Tensor, row_M: Tensor) -> Tensor | None:
    """Each unknown position's place in its row, int64 [M], 0 is revealed first; None where the student decides as it goes."""
    if order == "confidence":
        return None
    return rank_in_row(time_M if order == "random" else torch.zeros_like(row_M), row_M)


def confidence_rank(logits_NV: Tensor, row_N: Tensor) -> Tensor:
    """Places by falling probability of the best token among a row's masked positions: int64 [N]."""
    return rank_in_row(logits_NV.logsumexp(1) - logits_NV.amax(1), row_N)


def rank_in_row(key_N: Tensor, row_N: Tensor) -> Tensor:
    """Rank of each key among the keys of its row, ascending, ties by position: int64 [N]. row_N is ascending."""
    by_key_N = torch.argsort(key_N, stable=True)
    order_N = by_key_N[torch.argsort(row_N[by_key_N], stable=True)]
    rank_N = torch.empty_like(row_N)
    rank_N[order_N] = torch.arange(len(row_N), device=row_N.device)
    return rank_N - first_in_row(row_N)


def first_in_row(row_N: Tensor) -> Tensor:
    """Index of the first entry of each entry's row: int64 [N]. row_N is ascending."""
    count_B = torch.bincount(row_N)
    return (torch.cumsum(count_B, 0) - count_B)[row_N]
