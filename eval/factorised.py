"""Factorised decoding without noise, exactly: what a student writes, and the limit that all tend to, however large and however long trained.

Given what is known, such a student's best answer at every open place is the exact distribution there; the places of one call
are then chosen independently, and that is all that is wrong. Over a language whose sentences are all known this is a finite
sum. With x_A the tokens that the calls so far have written, at places A chosen at random,

    q(x) = E over A_1 in A_2 in ... in {1..L} of prod over calls k, prod over i in A_k+1 - A_k of p(x_i | x_{A_k})

and every x of the language has p(x_A) > 0, so the sum is exact whatever a student does where it has written nonsense:
share of valid sentences = sum of q, total variation = sum of max(0, p - q). With a trained student's own probabilities in the place of p(x_i | x_A)
the sum is what that student writes: exact, too, for a student that reads no noise.
Shapes: M sentences, L tokens, V vocabulary, K prefixes, B rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import combinations, pairwise

import numpy as np

from eval.languages import Language
from eval.metrics import Array

Places = tuple[int, ...]
Given = Callable[[Places], Array]


def factorised(language: Language, nfe: int, given: Given | None = None) -> Array:
    """q(x) of every sentence after `nfe` calls in random order, float64 [M]; what is missing from 1 is no sentence.

    given: places -> the probability of every sentence's own token at every place, given those at these places, float64 [M, L]; the language's own.
    """
    length = language.length
    revealed = [(length * step + nfe - 1) // nfe for step in range(nfe + 1)]  # the sampler's: as even as can be
    given = functools.cache(given or functools.partial(_given, language))
    q: dict[Places, Array] = {(): np.ones(len(language.p_M))}
    for before, after in pairwise(revealed):
        q = {known: _mean(q, given, known, before) for known in combinations(range(length), after)}
    return q[tuple(range(length))]


def _mean(q: dict[Places, Array], given: Given, known: Places, before: int) -> Array:
    """Over the places that an earlier call had written: all are equally likely in a random order."""
    written = []
    for earlier in combinations(known, before):
        now = [at for at in known if at not in earlier]
        written.append(q[earlier] * given(earlier)[:, now].prod(1))
    mean: Array = np.mean(written, axis=0)
    return mean


def _given(language: Language, known: Places) -> Array:
    """p(x_i | x_known) of every sentence's own tokens, float64 [M, L]."""
    scale_L = language.vocab_size ** np.arange(language.length, dtype=np.int64)
    code_M = language.ids_ML[:, list(known)] @ scale_L[list(known)]
    columns = [
        np.ones(len(code_M)) if at in known else _mass(language, code_M + language.ids_ML[:, at] * scale_L[at]) / _mass(language, code_M)
        for at in range(language.length)
    ]
    return np.stack(columns, 1)


def _mass(language: Language, code_M: Array) -> Array:
    """Probability of all sentences that share each one's code, float64 [M]."""
    _, group_M = np.unique(code_M, return_inverse=True)
    mass: Array = np.bincount(group_M, weights=language.p_M)[group_M]
    return mass


def valid_and_distance(language: Language, q_M: Array) -> tuple[float, float]:
    """(share of valid sentences, total variation of the joint) of a distribution that gives q to the sentences and the rest to none."""
    return float(q_M.sum()), float(np.maximum(language.p_M - q_M, 0).sum())


def accepted(language: Language, q_BLV: Array) -> Array:
    """Tokens of a draft that the teacher accepts before the first it rejects, expected, float64 [B].

    The draft's tokens are drawn independently from q; the rule is that of speculative sampling, which keeps the teacher's
    distribution: token x is accepted with probability min(1, p(x) / q(x)). So a prefix is drafted and accepted with
    probability prod min(p, q), and the expected number of accepted tokens is the sum of that over all prefixes.
    """
    p_KV, next_KV = language.transition.numpy(), language.next_state.numpy()
    state_K, reached_BK = np.zeros(1, np.int64), np.ones((len(q_BLV), 1))
    expected_B = np.zeros(len(q_BLV))
    for at in range(language.length):
        from_k, token_k = (p_KV[state_K] > 0).nonzero()
        reached_BK = reached_BK[:, from_k] * np.minimum(p_KV[state_K[from_k], token_k], q_BLV[:, at, token_k])
        expected_B += reached_BK.sum(1)
        state_K = next_KV[state_K[from_k], token_k]
    return expected_B
