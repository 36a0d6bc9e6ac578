"""Which draws of the noise stream sampling uses, so that a seed names a sample for ever.

    128 noise given to the student    129 times and order of positions    130 choice at the output    133 seeds of fresh noise
    134 whether a draft stands        135 the token where it does not    136 how many positions a likelihood masks

Draws 131 and 132 make exact teachers and their texts. Shapes: N positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from noise import philox

NOISE_DRAW = philox.SAMPLING_DRAW
ORDER_DRAW = philox.SAMPLING_DRAW + 1
OUTPUT_DRAW = philox.SAMPLING_DRAW + 2
FRESH_DRAW = philox.SAMPLING_DRAW + 5
VERDICT_DRAW = philox.SAMPLING_DRAW + 6
RESIDUAL_DRAW = philox.SAMPLING_DRAW + 7
LIKELIHOOD_DRAW = philox.SAMPLING_DRAW + 8


def stream_uniform(rows_N5: Tensor) -> Tensor:
    """One uniform in (0, 1) a row, float64 [N], from the word of entry 0."""
    word_N = philox.words_at(rows_N5, torch.zeros(len(rows_N5), dtype=torch.int64, device=rows_N5.device))
    return (word_N.to(torch.float64) + 0.5) * 2.0**-32


def step_seed(seed: int, step: int) -> int:
    """The seed of the noise of one step where every step has its own: that of step 0 is `seed`, so with one step nothing changes."""
    if step == 0:
        return seed
    zero = torch.zeros(1, dtype=torch.int64)
    low, high = philox.words(philox.rows(seed, zero, zero, FRESH_DRAW), 4 * step + 4, 4 * step)[0, :2].tolist()
    return int(low | high << 32)
