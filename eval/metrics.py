"""Perplexity, entropy and distinct-n of a set of sequences, with bootstrap intervals over sequences.

A bootstrap is a matrix of weights [R, S]: row 0 is all ones (the set itself), every other row says how often a replicate
drew each sequence. So a statistic is one product, its first entry is the estimate and the rest are its replicates; two
systems sampled from the same sequence ids share the weights and are thereby paired.

Entropy is the plug-in estimate, which is low by about (distinct tokens - 1) / (2 tokens): compare sets of equal size.
Position 0 is given (BOS) and never counted. Entropies and likelihoods are in nats.
Shapes: S sequences, L positions, R replicates + 1, U tokens that occur.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_REPLICATES_AT_ONCE = 256


@dataclass(frozen=True)
class Scored:
    """A set of sequences with what the judge said of each."""

    ids_SL: Array
    """int [S, L]"""
    length_S: Array
    """int [S]: valid positions."""
    nll_S: Array
    """float64 [S]: sum of -log p over the judge's tokens, nats."""
    tokens_S: Array
    """int [S]: how many tokens the judge counted."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, statistic_R: Array) -> Interval:
        """Percentiles of the replicates."""
        low, high = np.quantile(statistic_R[1:], (0.025, 0.975)) if len(statistic_R) > 1 else (statistic_R[0], statistic_R[0])
        return cls(float(statistic_R[0]), float(low), float(high))

    @classmethod
    def normal(cls, statistic_R: Array) -> Interval:
        """Estimate and 1.96 standard deviations of the replicates: for distances, which a finite sample overstates and its replicates more so."""
        half = 1.96 * float(statistic_R[1:].std())
        return cls(float(statistic_R[0]), float(statistic_R[0]) - half, float(statistic_R[0]) + half)

    @classmethod
    def of_mean(cls, value_S: Array) -> Interval:
        """Mean of independent values and 1.96 standard errors on either side; of one value, that value."""
        half = 1.96 * float(value_S.std(ddof=1)) / len(value_S) ** 0.5 if len(value_S) > 1 else 0.0
        mean = float(value_S.mean())
        return cls(mean, mean - half, mean + half)


def bootstrap_weights(sequences: int, replicates: int, seed: int) -> Array:
    """float32 [R, S], R = replicates + 1: ones, then multinomial counts; a function of its arguments alone."""
    if sequences < 1:
        raise ValueError("a bootstrap needs at least one sequence")
    drawn = np.random.default_rng(seed).multinomial(sequences, np.full(sequences, 1 / sequences), size=replicates)
    return np.concatenate([np.ones((1, sequences)), drawn]).astype(np.float32)


def valid(ids_SL: Array, length_S: Array) -> Array:
    """bool [S, L]: positions that count: after BOS, before padding."""
    position_L = np.arange(ids_SL.shape[1])
    return (position_L > 0) & (position_L < np.asarray(length_S)[:, None])


def log_perplexity(nll_S: Array, tokens_S: Array, weights_RS: Array) -> Array:
    """log of perplexity per token, pooled over the set: float64 [R]."""
    weights = weights_RS.astype(np.float64)
    return (weights @ nll_S) / (weights @ np.asarray(tokens_S, np.float64))


def token_counts(ids_SL: Array, length_S: Array) -> Array:
    """float32 [S, U]: how often each token that occurs anywhere occurs in each sequence."""
    row, position = valid(ids_SL, length_S).nonzero()
    _, token = np.unique(ids_SL[row, position], return_inverse=True)
    width = int(token.max()) + 1 if len(token) else 1
    return np.bincount(row * width + token, minlength=len(ids_SL) * width).reshape(len(ids_SL), width).astype(np.float32)


def entropy(counts_RU: Array) -> Array:
    """Plug-in entropy of each row of counts, nats, float64 [R]; 0 for a row without counts."""
    counts = counts_RU.astype(np.float64)
    total = np.maximum(counts.sum(1), 1.0)
    return np.asarray(np.log(total) - (counts * np.log(np.maximum(counts, 1.0))).sum(1) / total)


def pooled_entropy(ids_SL: Array, length_S: Array, weights_RS: Array) -> Array:
    """Entropy of the token distribution of the whole set: float64 [R]."""
    counts_SU = token_counts(ids_SL, length_S)
    parts = range(0, len(weights_RS), _REPLICATES_AT_ONCE)
    return np.concatenate([entropy(weights_RS[start : start + _REPLICATES_AT_ONCE] @ counts_SU) for start in parts])


def sequence_entropy(ids_SL: Array, length_S: Array) -> Array:
    """Entropy of the tokens inside each sequence, float64 [S]: falls when sequences repeat themselves."""
    return entropy(token_counts(ids_SL, length_S))


def ngrams(ids_SL: Array, length_S: Array, n: int) -> tuple[Array, Array]:
    """(a number for each n-gram int64 [S, W], the same for the same n-gram; whether it lies inside its row bool [S, W]); W = max(0, L - n + 1)."""
    good_SL, windows = valid(ids_SL, length_S), max(0, ids_SL.shape[1] - n + 1)
    code_SW, inside_SW = np.zeros((len(ids_SL), windows), np.int64), np.ones((len(ids_SL), windows), bool)
    for k in range(n if windows else 0):
        _, token = np.unique(ids_SL[:, k : k + windows], return_inverse=True)
        token = token.reshape(code_SW.shape)
        _, code = np.unique(code_SW * (int(token.max()) + 1) + token, return_inverse=True)
        code_SW = code.reshape(token.shape)
        inside_SW &= good_SL[:, k : k + windows]
    return code_SW, inside_SW


def distinct(ids_SL: Array, length_S: Array, n: int) -> Interval:
    """Different n-grams divided by all n-grams of the set; n-grams stay inside one sequence. 0 where there are none.

    The interval is the jackknife's, leaving out one sequence at a time: a bootstrap repeats sequences, which are then no longer different.
    """
    code_SW, inside_SW = ngrams(ids_SL, length_S, n)
    row_N, code_N = inside_SW.nonzero()[0], code_SW[inside_SW]
    if not len(code_N):
        return Interval(0.0, 0.0, 0.0)
    sequences, all_S = len(ids_SL), np.bincount(row_N, minlength=len(ids_SL))
    pair = np.unique(np.stack([code_N, row_N]), axis=1)
    _, first, rows = np.unique(pair[0], return_index=True, return_counts=True)
    alone_S = np.bincount(pair[1][first[rows == 1]], minlength=sequences)
    without_S = (len(first) - alone_S) / np.maximum(len(code_N) - all_S, 1)
    half = 1.96 * float(np.sqrt((sequences - 1) * without_S.var()))
    value = len(first) / len(code_N)
    return Interval(value, max(0.0, value - half), min(1.0, value + half))


def mean(value_S: Array, weights_RS: Array) -> Interval:
    """Mean over sequences of one number a sequence."""
    return Interval.of(weights_RS.astype(np.float64) @ value_S / len(value_S))


def agreement(ids_SL: Array, other_SL: Array) -> tuple[float, float]:
    """(share of positions with the same token, mean number of tokens before the first difference) of two paired sets."""
    same_SL = ids_SL[:, 1:] == other_SL[:, 1:]
    return float(same_SL.mean()), float(np.cumprod(same_SL, axis=1).sum(1).mean())
