"""Figures against values worked out by hand and against brute force; intervals that cover."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.metrics import Interval, agreement, bootstrap_weights, distinct, log_perplexity, mean, pooled_entropy, sequence_entropy
from eval.repetition import looped, repeated, written
from tests.eval.world import random_rows

ROWS = np.array([[9, 1, 1, 2], [9, 1, 2, 2], [9, 3, 3, 9]])
LENGTHS = np.array([4, 4, 3])
ONE = np.ones((1, 3), np.float32)


def test_pooled_entropy_counts_tokens_after_bos_and_before_padding() -> None:
    shares = np.array([3, 3, 2]) / 8  # 1 1 2, 1 2 2, 3 3
    assert pooled_entropy(ROWS, LENGTHS, ONE)[0] == pytest.approx(-(shares * np.log(shares)).sum())


def test_sequence_entropy_is_each_rows_own() -> None:
    each = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert sequence_entropy(ROWS, LENGTHS).tolist() == pytest.approx([each, each, 0.0])


def test_distinct_n_counts_ngrams_inside_rows() -> None:
    assert distinct(ROWS, LENGTHS, 1).value == pytest.approx(3 / 8)
    assert distinct(ROWS, LENGTHS, 2).value == pytest.approx(4 / 5)  # 11 12 | 12 22 | 33
    assert distinct(ROWS, LENGTHS, 3).value == pytest.approx(2 / 2)  # 112 | 122
    assert distinct(ROWS, LENGTHS, 5) == Interval(0.0, 0.0, 0.0)


@given(st.integers(1, 3), st.integers(0, 5))
def test_distinct_n_equals_a_set_of_tuples(n: int, seed: int) -> None:
    rows = random_rows(20, 7, seed) % 5
    length = np.random.default_rng(seed).integers(1, 8, 20)
    grams = _grams(rows, length, n)
    assert distinct(rows, length, n).value == pytest.approx(_different(grams))
    assert repeated(rows, length, n).tolist() == pytest.approx([1 - len(set(row)) / len(row) if row else 0.0 for row in grams])
    without = np.array([_different(grams[:left_out] + grams[left_out + 1 :]) for left_out in range(20)])
    half = 1.96 * np.sqrt(19 / 20 * ((without - without.mean()) ** 2).sum())
    found = distinct(rows, length, n)
    assert found.low == pytest.approx(max(0.0, found.value - half)) and found.high == pytest.approx(min(1.0, found.value + half))


def _grams(rows: np.ndarray, length: np.ndarray, n: int) -> list[list[tuple[int, ...]]]:
    return [[tuple(row[t : t + n]) for t in range(1, last - n + 1)] for row, last in zip(rows.tolist(), length, strict=True)]


def _different(grams: list[list[tuple[int, ...]]]) -> float:
    every = [gram for row in grams for gram in row]
    return len(set(every)) / len(every) if every else 0.0


def test_the_interval_of_distinct_n_covers_about_as_often_as_it_says() -> None:
    random, p = np.random.default_rng(0), np.arange(1, 41) ** -1.0
    drawn = random.choice(40, (200, 60, 11), p=p / p.sum())
    found = [distinct(rows, np.full(60, 11), 2) for rows in drawn]
    truth = np.mean([one.value for one in found])
    assert 0.88 <= np.mean([one.low <= truth <= one.high for one in found]) <= 0.99


def test_a_loop_is_three_copies_over_eight_tokens_or_more() -> None:
    rows = {
        (0, 7, 1, 2, 3, 1, 2, 3, 1, 2, 3, 8, 9): 9 / 12,  # a period of 3, three times
        (0, 7, 1, 2, 3, 1, 2, 3, 1, 2, 8, 8, 9): 0.0,  # not quite
        (0, 5, 5, 5, 5, 5, 5, 5, 5, 1, 2, 3, 4): 8 / 12,
        (0, 5, 5, 5, 5, 5, 5, 5, 1, 2, 3, 4, 6): 0.0,  # seven tokens are no loop
        (0, 1, 2, 1, 2, 1, 2, 1, 2, 9, 9, 9, 9): 8 / 12,
        (4, 4, 4, 4, 4, 4, 4, 4, 1, 2, 3, 5, 6): 0.0,  # position 0 is given
    }
    ids = np.array(list(rows))
    assert looped(ids, np.full(len(ids), 13)).tolist() == pytest.approx(list(rows.values()))
    assert looped(ids[:1], np.array([10])).tolist() == [0.0]  # what is past the length does not count


def test_a_text_is_as_long_as_its_tokens_before_an_end() -> None:
    ids = np.array([[0, 5, 6, 1, 7, 1], [0, 5, 6, 7, 8, 9], [0, 0, 5, 6, 7, 8], [0, 5, 6, 7, 1, 1]])
    tokens, ended = written(ids, np.array([6, 6, 6, 4]), {0, 1})
    assert tokens.tolist() == [2, 5, 0, 3] and ended.tolist() == [True, False, True, False]


def test_a_mean_over_sequences_is_the_bootstraps() -> None:
    value, weights = np.array([1.0, 2.0, 6.0]), bootstrap_weights(3, 500, 1)
    found = mean(value, weights)
    assert found.value == 3.0 and (found.low, found.high) == tuple(np.quantile([np.average(value, weights=w) for w in weights[1:]], (0.025, 0.975)))


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
