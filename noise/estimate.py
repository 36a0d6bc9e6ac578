"""Token-level distillation from the same shards: an unbiased teacher cross-entropy, with no teacher at hand.

An entry's chance to be kept depends on the noise alone, not on the text, so the kept entries are a sample of the teacher with
known inclusion probabilities `pi_i = 1 - (1 + p_i/c)^-R`. Weighting each by p_i / pi_i, and the token by p_x, gives

    S = b + p_x (l_x - b) + sum over kept i of (p_i / pi_i) (l_i - b)        E[S] = sum over all i of p_i l_i

for l = -log q of any student and any b that do not depend on the noise at that position, for every token x
(docs/noise.md, "The shards serve token-level distillation too", has the proof and the variance). Of p_i a reader has its
bin; taking the bin's middle costs less than e^(step/2) - 1 = 6.4% of the cross-entropy in the worst case, under 0.3% in practice.

A student whose logits at a position depend on the dataset's noise there knows which entries will be kept; for it S is biased.
Shapes: N positions, V vocabulary, K kept entries over all positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from noise.sketch import Codec, Sketch


def inclusion(p: Tensor, codec: Codec) -> Tensor:
    """pi: the chance over R draws that an entry of probability p, not the token, is kept. Same shape and dtype as p."""
    return -torch.expm1(-codec.draws * torch.log1p(p / codec.c))


def weights(sketch: Sketch, codec: Codec) -> tuple[Tensor, Tensor]:
    """What stands for the teacher's probabilities: (of the token [N], of the kept entries [K]), float64.

    A dense vector of them, 0 elsewhere, has the teacher's p as its mean over the noise. p_i / pi_i is at least c/R and p_i.
    """
    p_K = torch.exp(-codec.step * (sketch.code_K.to(torch.float64) + 0.5))
    return sketch.log_prob_N.to(torch.float64).exp(), p_K / inclusion(p_K, codec)


def cross_entropy(logits_NV: Tensor, token_N: Tensor, sketch: Sketch, codec: Codec) -> Tensor:
    """S at each position, [N] of the logits' dtype, differentiable in the student's logits [N, V]; tokens int64 [N].

    b is the student's own entropy, a constant to the gradient: it is near the mean of l, which is where the variance is least, and
    leaves the gradient `(sum of weights) q - weights`, in which most of what one position's weights share cancels.
    """
    log_q_NV = logits_NV.log_softmax(-1)
    with torch.no_grad():
        b_N: Tensor = torch.special.entr(log_q_NV.exp()).sum(-1)
    owner_K = torch.repeat_interleave(torch.arange(len(token_N), device=token_N.device), sketch.kept_N, output_size=len(sketch.index_K))
    token_weight_N, weight_K = (weight.to(logits_NV.dtype) for weight in weights(sketch, codec))
    of_token_N = token_weight_N * (-log_q_NV.gather(1, token_N[:, None])[:, 0] - b_N)
    of_kept_K = weight_K * (-log_q_NV[owner_K, sketch.index_K] - b_N[owner_K])
    return (b_N + of_token_N).index_add(0, owner_K, of_kept_K)
