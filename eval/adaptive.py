"""Adaptive parallel decoding (APD, arXiv 2506.00413): a small causal LM says how many of a masked student's tokens are taken at once.

One step, from left to right over the positions that are still masked. The student proposes all of them at once, each alone;
the small model reads the proposal and gives each position's distribution after what was proposed before it. Proposal and target
are chosen with the same Gumbel noise (a universal coupling: equal distributions choose the same token):

    x_t = argmax  s_D(t)                                s_D = log p_D(. | known) + h_t
    y_t = argmax  R s_D(t) + (1 - R) s_A(t)             s_A = log p_A(. | x before t) + h_t        so y_t ~ p_D^R p_A^(1-R), normalised
    the longest prefix with x_t = y_t is taken; the first position always is (given what is known, the student is right there)

Then the next step, with the same h: noise belongs to a position, not to a step. This is what keeps the distribution: with h drawn
anew, a token that the target refused would be drawn a second time without memory of the refusal. So at R = 0, where student and
small model are one exact model, the result is exactly its own sample, argmax(log p + h) from left to right.

With noise: a student whose readout puts the teacher's noise g into its logits (output: argmax) proposes their argmax, so there
s_D are its logits and s_A = log p_A + g with the noise that the student was given; otherwise h is the stream's at the output.
temperature divides both models' logits; top_k and nucleus restrict the student, and with it the target. At R = 1 the student
alone decides: everything is taken, NFE 1. The accepted prefix of a step never gets shorter when R grows, since the set of R
at which y_t = x_t is an interval that ends at 1. NFE counts the student's forwards; each brings one of the small model.
The paper's two other parameters, the lookahead M and the window W of what is computed anew, say what the student reads in a call: see view.
Shapes: B rows, L positions, N masked positions (row-major), V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from eval.schedules import first_in_row


class Auxiliary(Protocol):
    """What adaptive decoding needs of the small causal LM; eval.causal.CausalLM has it."""

    @property
    def vocab_size(self) -> int: ...

    def logits_of(self, ids_BL: Tensor, where_N: Tensor) -> Tensor:
        """Logits [N, V] of the tokens at flat positions b L + t, each given the row's tokens before it."""


def target_scores(student_NV: Tensor, auxiliary_NV: Tensor, weight: float) -> Tensor:
    """R s_D + (1 - R) s_A, [N, V]; where the student's score is -inf, so is the target's."""
    if weight == 1:
        return student_NV
    return (weight * student_NV + (1 - weight) * auxiliary_NV).masked_fill(student_NV == -torch.inf, -torch.inf)


def accepted(proposed_N: Tensor, target_N: Tensor, row_N: Tensor) -> Tensor:
    """bool [N]: the positions before a row's first refusal, and always its first. row_N is ascending."""
    first_N = first_in_row(row_N)
    refused_N = (proposed_N != target_N) & (torch.arange(len(row_N), device=row_N.device) != first_N)
    count_N = refused_N.long().cumsum(0)
    return count_N == count_N[first_N]
