"""Who decides which drafted tokens stand, and how a drafter guesses: with noise that teacher and student share, or without noise.

    SharedNoise   the teacher's token is argmax(log p + g), and the draft is a guess of it: it stands where it is that token. Whatever
                  was drafted, the result is exactly the teacher's sample for that noise
    Rejection     speculative sampling (arXiv 2211.17192): a draft x ~ q stands with probability min(1, p(x) / q(x)); where it does not, the token
                  is drawn from the rest of p, (p - q)+. Whatever q is, the result has exactly the distribution p

A student that was not told the noise guesses with it all the same under SharedNoise, argmax(log q + g): equal distributions then
choose equal tokens (a universal coupling). p and q are what temperature, top_k and nucleus leave of the models' distributions.
Everything random belongs to a position, not to a call, so a seed names the text at any batch size; under SharedNoise at any block and with any
drafter too. Under Rejection those two decide which drafts are judged, and so which text it is: its distribution is the same, the text is not.
Shapes: B rows, R positions that are held, N positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from eval.stream import NOISE_DRAW, OUTPUT_DRAW, RESIDUAL_DRAW, VERDICT_DRAW, stream_uniform
from noise import philox
from noise.sketch import TeacherError
from trainer.marginal import tempered

NoiseAt = Callable[[Tensor, Tensor], Tensor]
"""(row int64 [N], position int64 [N]) -> g float32 [N, V]"""
LogProbs = Callable[[Tensor], Tensor]
"""logits [N, V] -> log of the distribution that is sampled, [N, V], up to a constant a row"""


def prior(seed: int, sequence_id_B: Tensor, vocab_size: int) -> NoiseAt:
    """The noise that samples are made of (see stream)."""

    def noise(row_N: Tensor, position_N: Tensor) -> Tensor:
        return philox.gumbel(philox.rows(seed, sequence_id_B[row_N], position_N, NOISE_DRAW), vocab_size)

    return noise


class Held:
    """Noise of the last `span` positions that were asked for in each row: each is made once. Those of one call are no further apart."""

    def __init__(self, source: NoiseAt, rows: int, span: int, vocab_size: int, device: torch.device):
        self._source, self._span = source, span
        self._g_BRV = torch.empty(rows, span, vocab_size, device=device)
        self._position_BR = torch.full((rows, span), -1, device=device)

    def __call__(self, row_N: Tensor, position_N: Tensor) -> Tensor:
        slot_N = position_N % self._span
        new_N = (self._position_BR[row_N, slot_N] != position_N).nonzero()[:, 0]
        if len(new_N):
            where = row_N[new_N], slot_N[new_N]
            self._g_BRV[where] = self._source(row_N[new_N], position_N[new_N])
            self._position_BR[where] = position_N[new_N]
            assert bool((self._position_BR[row_N, slot_N] == position_N).all()), f"positions of one call are further apart than {self._span}"
        return self._g_BRV[row_N, slot_N]


class Rule(Protocol):
    """What a drafter and the loop ask of a referee."""

    def given(self, row_N: Tensor, position_N: Tensor, kind: str) -> Tensor:
        """Noise of these positions as a student of this kind of noise is given it, [N, V]."""

    def guess(self, logits_NV: Tensor, row_N: Tensor, position_N: Tensor, informed: bool) -> Tensor:
        """A drafted token a position, int64 [N]. `informed`: the logits were made with the noise, and their argmax is the guess."""

    def judge(self, logits_NV: Tensor, row_N: Tensor, position_N: Tensor, drafted_N: Tensor) -> tuple[Tensor, Tensor]:
        """(the token that stands, int64 [N]; whether it is the drafted one, bool [N]) by the teacher's logits. drafted_N: -1 where there is none."""


class SharedNoise:
    """Teacher and student read the same noise.

    `temperature` T is the teacher's: log p / T + g chooses as log p + T g does, so a student is given T g.
    """

    def __init__(self, log_probs: LogProbs, noise: NoiseAt, temperature: float = 1.0):
        self._log_probs, self._noise, self._temperature = log_probs, noise, temperature

    def given(self, row_N: Tensor, position_N: Tensor, kind: str) -> Tensor:
        return tempered(self._noise(row_N, position_N), kind, self._temperature)

    def scores(self, logits_NV: Tensor, row_N: Tensor, position_N: Tensor) -> tuple[Tensor, Tensor]:
        """(log p + g, log p), both [N, V]."""
        log_p_NV = self._log_probs(logits_NV)
        return log_p_NV + self._noise(row_N, position_N), log_p_NV

    def guess(self, logits_NV: Tensor, row_N: Tensor, position_N: Tensor, informed: bool) -> Tensor:
        return (logits_NV if informed else self.scores(logits_NV, row_N, position_N)[0]).argmax(-1)

    def judge(self, logits_NV: Tensor, row_N: Tensor, position_N: Tensor, drafted_N: Tensor) -> tuple[Tensor, Tensor]:
        scores_NV, log_p_NV = self.scores(logits_NV, row_N, position_N)
        token_N = scores_NV.argmax(-1)
        _check_finite(log_p_NV.gather(1, token_N[:, None])[:, 0])
        return token_N, token_N == drafted_N


class Rejection:
    """No noise is shared: one that a student wants is its own affair, and its distribution given it is q."""

    def __init__(self, log_probs: LogProbs, noise: NoiseAt, seed: int, sequence_id_B: Tensor, span: int, vocab_size: int):
        self._log_probs, self._noise, self._seed, self._sequence_id_B, self._span = log_probs, noise, seed, sequence_id_B, span
        self._q_BRV = torch.zeros(len(sequence_id_B), span, vocab_size, dtype=torch.float64, device=sequence_id_B.device)

    def given(self, row_N: Tensor, position_N: Tensor, kind: str) -> Tensor:
        return self._noise(row_N, position_N)

    def guess(self, logits_NV: Tensor, row_N: Tensor, position_N: Tensor, informed: bool) -> Tensor:
        q_NV = self._p(logits_NV)
        self._q_BRV[row_N, position_N % self._span] = q_NV
        return _inverse(q_NV, self._uniform(row_N, position_N, OUTPUT_DRAW))

    def judge(self, logits_NV: Tensor, row_N: Tensor, position_N: Tensor, drafted_N: Tensor) -> tuple[Tensor, Tensor]:
        p_NV = self._p(logits_NV)
        token_N1, was_drafted_N = drafted_N.clamp_min(0)[:, None], drafted_N >= 0
        q_NV = self._q_BRV[row_N, position_N % self._span] * was_drafted_N[:, None]
        u_N = self._uniform(row_N, position_N, VERDICT_DRAW)
        stands_N = was_drafted_N & (u_N * q_NV.gather(1, token_N1)[:, 0] < p_NV.gather(1, token_N1)[:, 0])
        rest_NV = (p_NV - q_NV).clamp_min(0)
        rest_NV = torch.where(rest_NV.sum(1, keepdim=True) > 0, rest_NV, p_NV)  # nothing is left where p = q, and nothing is refused
        drawn_N = _inverse(rest_NV, self._uniform(row_N, position_N, RESIDUAL_DRAW))
        token_N = torch.where(stands_N, drafted_N, drawn_N)
        _check_finite(p_NV.gather(1, token_N[:, None])[:, 0].log())
        return token_N, stands_N

    def _p(self, logits_NV: Tensor) -> Tensor:
        p_NV = self._log_probs(logits_NV.double()).exp()
        return p_NV / p_NV.sum(1, keepdim=True)

    def _uniform(self, row_N: Tensor, position_N: Tensor, draw: int) -> Tensor:
        return stream_uniform(philox.rows(self._seed, self._sequence_id_B[row_N], position_N, draw))


def _inverse(p_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """One token of each distribution, int64 [N], at uniform_N; p need not sum to 1."""
    cumulative_NV = p_NV.cumsum(1)
    token_N1 = torch.searchsorted(cumulative_NV, uniform_N[:, None] * cumulative_NV[:, -1:], right=True)
    return token_N1.clamp_max(p_NV.shape[1] - 1)[:, 0]


def _check_finite(log_prob_N: Tensor) -> None:
    for at in (~torch.isfinite(log_prob_N)).nonzero()[:1, 0].tolist():
        raise TeacherError(at, f"the teacher's log-prob of the token is {float(log_prob_N[at])} (NaN or infinite logits)")
