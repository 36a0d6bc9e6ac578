"""Figures against values worked out by hand and against brute force; intervals that cover."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.metrics import Interval, agreement, bootstrap_weights, distinct, log_perplexity, pooled_entropy, sequence_entropy
from tests.eval.world import random_rows

ROWS = np.array([[9, 1, 1, 2], [9, 1, 2, 2], [9, 3, 3, 9]])
LENGTHS = np.array([4, 4, 3])
ONE = np.ones((1, 3), np.float32)


def test_pooled_entropy_counts_tokens_after_bos_and_before_padding() -> None:
    shares = np.array([3, 3, 2]) / 8  # 1 1 2, 1 2 2, 3 3
    assert pooled_entropy(ROWS, LENGTHS, ONE)[0] == pytest.approx(-(shares * np.log(shares)).sum())


def test_sequence_entropy_is_the_mean_of_each_rows_own() -> None:
    each = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert sequence_entropy(ROWS, LENGTHS) == pytest.approx((each + each + 0.0) / 3)


def test_distinct_n_counts_ngrams_inside_rows() -> None:
    assert distinct(ROWS, LENGTHS, 1) == pytest.approx(3 / 8)
    assert distinct(ROWS, LENGTHS, 2) == pytest.approx(4 / 5)  # 11 12 | 12 22 | 33
    assert distinct(ROWS, LENGTHS, 3) == pytest.approx(2 / 2)  # 112 | 122
    assert distinct(ROWS, LENGTHS, 5) == 0.0


@given(st.integers(1, 3), st.integers(0, 5))
def test_distinct_n_equals_a_set_of_tuples(n: int, seed: int) -> None:
    rows = random_rows(20, 7, seed) % 5
    length = np.random.default_rng(seed).integers(1, 8, 20)
    grams = [tuple(row[t : t + n]) for row, last in zip(rows.tolist(), length, strict=True) for t in range(1, last - n + 1)]
    assert distinct(rows, length, n) == pytest.approx(len(set(grams)) / len(grams) if grams else 0.0)


def test_perplexity_pools_tokens_not_sequences() -> None:
    nll, tokens = np.array([2.0, 30.0]), np.array([1, 10])
    assert log_perplexity(nll, tokens, np.ones((1, 2), np.float32))[0] == pytest.approx(32 / 11)


def test_a_weight_repeats_its_sequence() -> None:
    rows, length = random_rows(6, 9), np.full(6, 9)
    weights = bootstrap_weights(6, 4, seed=3)
    nll, tokens = np.arange(6.0), np.array([3, 1, 4, 1, 5, 9])
    for weight, entropy, log_ppl in zip(weights, pooled_entropy(rows, length, weights), log_perplexity(nll, tokens, weights), strict=True):
        chosen = np.repeat(np.arange(6), weight.astype(int))
        shares = np.array(list(Counter(rows[chosen, 1:].flatten().tolist()).values())) / (8 * len(chosen))
        assert entropy == pytest.approx(-(shares * np.log(shares)).sum())
        assert log_ppl == pytest.approx(nll[chosen].sum() / tokens[chosen].sum())


def test_weights_are_the_set_itself_then_resamples_fixed_by_the_seed() -> None:
    weights = bootstrap_weights(50, 200, seed=7)
    assert weights.shape == (201, 50) and (weights[0] == 1).all() and (weights.sum(1) == 50).all()
    assert np.array_equal(weights, bootstrap_weights(50, 200, seed=7)) and not np.array_equal(weights, bootstrap_weights(50, 200, seed=8))
    assert weights[1:].var() == pytest.approx(1 - 1 / 50, rel=0.1)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    random = np.random.default_rng(0)
    weights = bootstrap_weights(80, 300, seed=1)
    covered = 0
    for _ in range(300):
        tokens = random.integers(5, 20, 80)
        found = Interval.of(log_perplexity(random.gamma(2.0, 1.5, 80) * tokens, tokens, weights))
        covered += found.low <= 3.0 <= found.high
    assert 0.90 <= covered / 300 <= 0.98


def test_agreement_is_the_share_of_equal_tokens_and_the_common_prefix() -> None:
    ours = np.array([[0, 1, 2, 3], [0, 5, 6, 7]])
    theirs = np.array([[0, 1, 2, 9], [0, 9, 6, 7]])
    assert agreement(ours, theirs) == (pytest.approx(4 / 6), pytest.approx((2 + 0) / 2))


def test_a_bootstrap_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one sequence"):
        bootstrap_weights(0, 10, 1)
