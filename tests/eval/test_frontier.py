"""Perplexity at matched entropy on curves that are known, and never past their ends."""

from __future__ import annotations

import numpy as np
import pytest

from eval.frontier import Frontier, match, ratio, setting_at
from eval.metrics import Scored, bootstrap_weights, pooled_entropy
from eval.report import compare


def curve(entropy: list[float], log_perplexity: list[float], replicates: int = 3) -> Frontier:
    return Frontier(*(np.repeat(np.array(values)[:, None], replicates, 1) for values in (entropy, log_perplexity)))


def test_between_points_log_perplexity_is_linear_in_entropy_whatever_their_order() -> None:
    at = np.array([2.0, 2.5, 3.5])
    for order in ([0, 1, 2], [2, 0, 1]):
        found = match(curve([[2.0, 3.0, 4.0][k] for k in order], [[1.0, 2.0, 5.0][k] for k in order]), at)
        assert found.value_R.tolist() == pytest.approx([1.0, 1.5, 3.5])
        assert found.position == "inside" and found.clamped == 0


@pytest.mark.parametrize(("wanted", "position", "value"), [(1.0, "below", 7.0), (9.0, "above", 8.0)])
def test_outside_the_traced_range_the_nearest_end_stands_and_is_marked(wanted: float, position: str, value: float) -> None:
    found = match(curve([2.0, 3.0], [7.0, 8.0]), np.full(3, wanted))
    assert (found.position, found.clamped, found.value_R[0]) == (position, 1.0, value)


def test_replicates_that_leave_the_range_are_counted() -> None:
    found = match(curve([2.0, 3.0], [7.0, 8.0], 5), np.array([2.5, 2.5, 3.5, 1.5, 2.5]))
    assert found.position == "inside" and found.clamped == 0.5


def test_one_point_matches_only_its_own_entropy() -> None:
    assert match(curve([2.0], [7.0]), np.full(3, 2.0)).position == "inside"
    assert match(curve([2.0], [7.0]), np.full(3, 2.1)).position == "above"


def test_points_of_equal_entropy_do_not_divide_by_zero() -> None:
    assert np.isfinite(match(curve([2.0, 2.0], [7.0, 8.0]), np.full(3, 2.0)).value_R).all()


def test_a_setting_is_found_on_the_line_through_the_points_on_both_sides() -> None:
    assert setting_at([0.8, 1.1, 0.95], [2.0, 3.5, 3.0], 3.25, 0.4, 2.2) == pytest.approx(1.025)  # between 0.95 and 1.1, in any order
    assert setting_at([0.8, 0.95, 1.1], [2.0, 3.0, 3.5], 3.0, 0.4, 2.2) == pytest.approx(0.95)
    assert setting_at([1.6, 1.0], [2.0, 3.0], 2.5, 0.5, 3.2) == pytest.approx(1.3)  # a frontier may fall as its setting rises
    assert setting_at([0.1, 1.0], [2.0, 3.0], 2.45, 0.05, 2.0) == pytest.approx(0.505)  # however far apart the points are


def test_beyond_the_points_a_setting_follows_the_nearest_two_and_no_further_than_it_may() -> None:
    assert setting_at([0.8, 0.95, 1.1], [2.0, 3.0, 3.5], 3.75, 0.4, 2.2) == pytest.approx(1.175)
    assert setting_at([0.8, 0.95, 1.1], [2.0, 3.0, 3.5], 1.5, 0.4, 2.2) == pytest.approx(0.725)
    assert setting_at([0.9, 1.1], [2.0, 2.001], 4.0, 0.45, 2.2) == 2.2 and setting_at([0.9, 1.1], [2.0, 2.001], 0.0, 0.45, 2.2) == 0.45
    assert setting_at([1.0], [2.0], 3.0, 0.5, 2.0) is None and setting_at([1.0, 1.2], [2.0, 2.0], 3.0, 0.5, 2.4) is None
    assert setting_at([1.0, 2.0, 4.0], [2.0, 2.51, 2.50], 3.0, 0.5, 8.0) is None, "the last two say that it falls, and it does not"


def test_ratio_is_paired_replicate_by_replicate() -> None:
    shared = np.random.default_rng(0).normal(size=400)  # what both systems share cancels
    ours = match(Frontier(np.full((1, 400), 2.0), (3.0 + shared)[None]), np.full(400, 2.0))
    theirs = match(Frontier(np.full((1, 400), 2.0), (3.5 + shared)[None]), np.full(400, 2.0))
    found = ratio(ours, theirs)
    assert (found.value, found.low, found.high) == (pytest.approx(np.exp(-0.5)),) * 3
    assert ours.perplexity.high / ours.perplexity.low > 5


def made(vocabulary: int, nll: float, seed: int, sequences: int = 300) -> Scored:
    random = np.random.default_rng(seed)
    ids = random.integers(1, vocabulary + 1, (sequences, 11))
    return Scored(ids, np.full(sequences, 11), 10 * random.normal(nll, 0.2, sequences), np.full(sequences, 10))


def verdict(ours: float, theirs: float, real_vocabulary: int = 40) -> dict:
    """Two systems, each traced from entropy log 20 to log 80; log-perplexity at log 40 is half way between their ends."""
    weights, real = bootstrap_weights(300, 200, 1), made(real_vocabulary, 0.0, 9)
    real_entropy = pooled_entropy(real.ids_SL, real.length_S, bootstrap_weights(300, 200, 2))
    matched = [
        match(Frontier.trace([made(20, nll - 1, seed), made(80, nll + 1, seed + 1)], weights), real_entropy) for nll, seed in ((ours, 3), (theirs, 5))
    ]
    return compare(4, "a", "b", *matched)


def test_the_lower_curve_wins_with_its_whole_interval() -> None:
    found = verdict(3.0, 3.2)
    assert found["matched"] and found["below_one"] and "the whole interval is below 1" in found["sentence"]
    assert found["ratio"]["low"] < np.exp(-0.2) < found["ratio"]["high"]


def test_equal_curves_are_undecided_and_a_higher_one_loses() -> None:
    assert "undecided" in verdict(3.0, 3.0)["sentence"] and "the whole interval is above 1" in verdict(3.2, 3.0)["sentence"]


def test_no_verdict_where_real_entropy_was_not_traced() -> None:
    found = verdict(2.0, 3.0, real_vocabulary=200)
    assert not found["matched"] and not found["below_one"] and "lies above what a traced and above what b traced" in found["sentence"]
