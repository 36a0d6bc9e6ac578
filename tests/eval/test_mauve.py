"""MAUVE against its definition, against the authors' package where it is there, and where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from eval.config import MauveConfig
from eval.mauve import Histograms, area, compare, interval, k_means, principal, replicates

OWN = MauveConfig(featuriser="any")


def by_definition(p_K: np.ndarray, q_K: np.ndarray, scale: float) -> tuple[float, float]:
    """Bounds of the area under { (exp(-c KL(q|r)), exp(-c KL(p|r))) : 0 <= w <= 1 }: the second falls as the first grows."""
    w_W1 = np.linspace(0, 1, 20_001)[:, None]
    r_WK = w_W1 * p_K + (1 - w_W1) * q_K
    x_W, y_W = (np.exp(-scale * stats.entropy(np.broadcast_to(n_K, r_WK.shape), r_WK, axis=1)) for n_K in (q_K, p_K))
    assert (np.diff(x_W) <= 1e-12).all() and (np.diff(y_W) >= -1e-12).all()
    width_W = -np.diff(x_W)
    return float(x_W[-1] + (width_W * y_W[:-1]).sum()), float(x_W[-1] + (width_W * y_W[1:]).sum())


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_area_is_the_definitions_for_histograms_with_and_without_empty_clusters(scale: float) -> None:
    random = np.random.default_rng(3)
    pairs = [random.dirichlet(np.full(6, concentration), 2) for concentration in (0.3, 3.0)]
    for p_K, q_K in [*pairs, (np.array([0.5, 0.5, 0.0]), np.array([0.0, 0.25, 0.75]))]:
        low, high = by_definition(p_K, q_K, scale)
        assert high - low < 1e-3 and low - 5e-4 < area(p_K[None], q_K[None], scale)[0] < high + 5e-4


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=2, max_size=8).filter(any), st.integers(0, 99))
def test_equal_sets_have_one_disjoint_sets_nothing_and_order_does_not_matter(counts: list[int], seed: int) -> None:
    p_K = np.array(counts)
    assert area(p_K[None], 3 * p_K[None])[0] == pytest.approx(1, abs=1e-9)
    apart = np.concatenate([p_K, 0 * p_K]), np.concatenate([0 * p_K, p_K])
    assert area(*(n_K[None] for n_K in apart))[0] < 0.05  # two sets that share nothing: the area under exp(c log w), exp(c log(1 - w))
    q_K = np.random.default_rng(seed).integers(1, 9, len(p_K))
    assert area(p_K[None], q_K[None])[0] == pytest.approx(area(q_K[None], p_K[None])[0], abs=2e-3)


def clouds(shift: float, rows: int = 300) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.normal(size=(rows, 8)), random.normal(size=(rows, 8)) + shift


def test_it_falls_as_two_sets_part_and_the_same_texts_have_one() -> None:
    values = [compare(*clouds(shift), OWN).value for shift in (0.0, 0.5, 2.0)]
    assert values[0] > 0.85 > values[1] > values[2] and values[2] < 0.1
    same = clouds(0.0)[0]
    assert compare(same, same, OWN).value == pytest.approx(1) and compare(same, same, OWN).real_K.shape == (30,)


def test_clusters_that_lie_apart_are_found_and_the_seed_decides() -> None:
    random = np.random.default_rng(1)
    truth = random.integers(0, 7, 400)
    points = 10 * np.eye(7)[truth] + 0.1 * random.normal(size=(400, 7))
    found = k_means(points, 7, seed=3)
    assert len({(int(a), int(b)) for a, b in zip(truth, found, strict=True)}) == 7
    assert np.array_equal(found, k_means(points, 7, seed=3))
    assert k_means(points[:3], 7, seed=3).max() < 3 and (k_means(np.ones((9, 2)), 4, seed=1) == 0).all()  # fewer points, or equal ones


def test_principal_components_keep_the_share_of_variance_that_is_asked_for() -> None:
    points = np.random.default_rng(2).normal(size=(500, 6)) * np.array([5, 3, 1, 0.1, 0.1, 0.1])
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    whole = ((unit - unit.mean(0)) ** 2).sum()
    kept = principal(points, 0.9)
    assert kept.shape[1] == 2 and (kept**2).sum() / whole >= 0.9 and ((kept**2).sum(0)[:1] / whole < 0.9).all()
    assert principal(points, 1.0).shape[1] == 6


def test_an_interval_holds_its_value_and_covers_the_value_of_the_distributions() -> None:
    p_K, q_K = (np.random.default_rng(seed).dirichlet(np.full(8, 2.0)) for seed in (1, 2))
    truth, random = area(p_K[None], q_K[None])[0], np.random.default_rng(5)
    covered = 0
    for seed in range(40):
        drawn = [random.multinomial(2000, n_K) for n_K in (p_K, q_K)]
        found = Histograms(*drawn, float(area(drawn[0][None], drawn[1][None])[0]))
        value_R = replicates(found, MauveConfig(featuriser="any", seed=seed))
        at = interval(value_R)
        assert len(value_R) == 201 and 0 <= at.low < at.value == found.value < at.high <= 1
        covered += at.low <= truth <= at.high
    assert covered >= 35


def test_the_authors_package_agrees_where_it_is_installed() -> None:
    pytest.importorskip("mauve")
    for shift in (0.1, 0.5):
        ours, theirs = (compare(*clouds(shift), MauveConfig(featuriser="any", implementation=name)) for name in ("own", "mauve-text"))
        assert ours.value == pytest.approx(theirs.value, abs=0.06)  # another k-means; the areas of one histogram agree closely:
        assert area(theirs.real_K[None], theirs.ours_K[None])[0] == pytest.approx(theirs.value, abs=0.01)


def test_a_package_that_is_missing_is_named_with_its_licence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mauve", None)
    with pytest.raises(ValueError, match=r"pip install mauve-text \(GPL-3.0\)"):
        compare(*clouds(0.0, 20), MauveConfig(featuriser="any", implementation="mauve-text"))
