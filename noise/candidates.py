"""Which entries could be kept: a fast pass over logits and stream that finds them all, and hardly any others.

Kept needs word + 1/2 < y 2^32 (1 + 2^-20) with y = p E_0 / c (noise/sketch.py), so log2(word) below log2(y) + 32. A float's
bit pattern, read as an integer, is a lower bound of its logarithm (Mitchell 1962): bits(w) / 2^23 - 127 <= log2(w), at
most 0.0861 below it. So `bits(float32(word)) <= (log2 y + 32 + 127) 2^23 + margin` holds for every entry that is kept
and for few others, and costs a multiplication and a comparison an entry: no exp, no float64, no [N, V].

The few that are found are then decided exactly, which is why shards do not depend on what ran this pass: numba on a CPU
(V = 50,257: 25 us a position on one core, 14 of them the stream; `python -m benchmarks.encode`), torch.compile on a GPU
and where numba is absent. Shapes: N positions, V vocabulary, K candidates of all positions.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from noise import philox
from noise.compiled import compiled, native

BITS = 2.0**23  # one binary order of magnitude in a float32's bit pattern
SCALE = BITS / math.log(2.0)
MARGIN = 1e-3  # in log2; the roundings of the float32 comparison add up to less than 1e-4 wherever it can hold


class Candidates(NamedTuple):
    """In row-major order."""

    owner_K: Tensor
    """int64 [K]: which of the N positions."""
    index_K: Tensor
    """int64 [K]: vocabulary entry."""
    word_K: Tensor
    """int64 [K]: the stream's word there."""


def find(logits_NV: Tensor, normaliser_N: Tensor, rows_N5: Tensor, ceiling_N: Tensor) -> Candidates:
    """Every entry with word + 1/2 < p ceiling 2^32 (1 + 2^-20), p = exp(logit - normaliser), in the rows' draw, and few others.

    The others are within 6% of that with numba, and without it also the rest of such an entry's block of four.
    logits: floating [N, V]; normaliser: float32 [N], nats; rows: int64 [N, 5]; ceiling: float32 [N], E_0 / c.
    """
    offset_N = ((ceiling_N.double().log2() + (32 + 127 + MARGIN)) * BITS).float()
    fast = native() if logits_NV.device.type == "cpu" else None
    if fast is not None:
        places = logits_NV.float().numpy(), normaliser_N.numpy(), rows_N5.numpy()
        return Candidates(*map(torch.from_numpy, fast.find(*places, SCALE, offset_N.numpy())))
    owner_M, block_M = possible(logits_NV, normaliser_N, rows_N5, offset_N).nonzero(as_tuple=True)
    k0, k1, c1, c2, c3 = rows_N5[owner_M].unbind(-1)
    word_M4 = torch.stack(philox.philox(block_M, c1, c2, c3, k0, k1), dim=-1)
    index_M4 = block_M[:, None] * 4 + torch.arange(4, device=block_M.device)
    entry_M4 = index_M4 < logits_NV.shape[1]
    return Candidates(owner_M[:, None].expand(-1, 4)[entry_M4], index_M4[entry_M4], word_M4[entry_M4])


@compiled
def possible(logits_NV: Tensor, normaliser_N: Tensor, rows_N5: Tensor, offset_N: Tensor) -> Tensor:
    """Whether the comparison holds for any entry of a block of the stream, bool [N, ceil(V/4)]; true for a last block that is not whole.

    Block by block, since what is compiled an entry at a time makes every block's four words four times.
    """
    blocks = logits_NV.shape[1] // 4
    lanes_NJ = [logits_NV[:, lane : 4 * blocks : 4] for lane in range(4)]
    k0, k1, c1, c2, c3 = (column[:, None] for column in rows_N5.unbind(-1))
    words_NJ = philox.philox(torch.arange(blocks, device=logits_NV.device)[None, :], c1, c2, c3, k0, k1)
    some_NJ = torch.zeros(len(logits_NV), blocks, dtype=torch.bool, device=logits_NV.device)
    for logit_NJ, word_NJ in zip(lanes_NJ, words_NJ, strict=True):
        log_prob_NJ = logit_NJ.to(torch.float32) - normaliser_N[:, None]
        bits_NJ = word_NJ.to(torch.float32).view(torch.int32).to(torch.float32)
        some_NJ = some_NJ | (bits_NJ <= log_prob_NJ * SCALE + offset_N[:, None])
    return torch.nn.functional.pad(some_NJ, (0, int(logits_NV.shape[1] % 4 > 0)), value=True)
