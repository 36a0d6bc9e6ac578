"""MAUVE (Pillutla et al., NeurIPS 2021, arXiv 2102.01454): how near one set of texts is to another, between 0 and 1.

Features of all texts are clustered together; p and q are the shares of both sets in each cluster. With r = w p + (1 - w) q,

    divergence frontier = { (exp(-c KL(q | r)), exp(-c KL(p | r))) : 0 < w < 1 },  c = 5,        MAUVE = the area under it

As in the paper's experiments: features of unit length, principal components up to 90% of the variance, a cluster for every
ten texts. Written from the definition; `implementation: mauve-text` asks the authors' package instead, which is GPL-3.0 and
so no dependency (`pip install mauve-text`). A value depends on featuriser, settings and sample counts: compare equals only.

Shapes: S texts, D features, K clusters, R replicates + 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from eval.config import MauveConfig
from eval.metrics import Array, Interval

REPLICATES = 200
_MIXTURES = 128
_RESTARTS, _ROUNDS = 5, 100


@dataclass(frozen=True)
class Histograms:
    """Texts in each cluster."""

    real_K: Array
    """int64 [K]"""
    ours_K: Array
    """int64 [K]"""
    value: float
    """MAUVE of the two."""


def compare(real_SD: Array, ours_SD: Array, settings: MauveConfig) -> Histograms:
    """MAUVE of two sets of features, float [S, D] each."""
    clusters = settings.clusters or max(2, round(min(len(real_SD), len(ours_SD)) / 10))
    if settings.implementation == "mauve-text":
        return _by_package(real_SD, ours_SD, clusters, settings)
    both_SD = principal(np.concatenate([real_SD, ours_SD]), settings.variance)
    cluster_S = k_means(both_SD, clusters, settings.seed)
    real_K, ours_K = (np.bincount(part, minlength=clusters) for part in (cluster_S[: len(real_SD)], cluster_S[len(real_SD) :]))
    return Histograms(real_K, ours_K, float(area(real_K[None], ours_K[None], settings.scale)[0]))


def replicates(found: Histograms, settings: MauveConfig) -> Array:
    """MAUVE [R] of the set and of 200 resamples of both sets; the clusters stay, so a resample is a multinomial draw of the histogram."""
    random = np.random.default_rng(settings.seed)
    real_RK, ours_RK = (random.multinomial(int(n_K.sum()), n_K / n_K.sum(), REPLICATES) for n_K in (found.real_K, found.ours_K))
    return np.concatenate([[found.value], area(real_RK, ours_RK, settings.scale)])


def interval(value_R: Array) -> Interval:
    """As for every distance: a resample is farther from the truth than the set, so its spread is taken and not its place."""
    found = Interval.normal(value_R)
    return Interval(found.value, max(0.0, found.low), min(1.0, found.high))


def area(p_RK: Array, q_RK: Array, scale: float = 5.0) -> Array:
    """Area under the divergence frontier of each pair of histograms (any positive multiple of them), float64 [R]."""
    p_RK, q_RK = (n_RK / n_RK.sum(1, keepdims=True) for n_RK in (p_RK, q_RK))
    # denser at both ends, where the frontier bends
    weight_W = (1 - np.cos(np.linspace(0, np.pi, _MIXTURES + 2)[1:-1])) / 2
    x_WR, y_WR = np.empty((_MIXTURES, len(p_RK))), np.empty((_MIXTURES, len(p_RK)))
    for number, weight in enumerate(weight_W):
        r_RK = weight * p_RK + (1 - weight) * q_RK
        log_r_RK = np.log(np.where(r_RK > 0, r_RK, 1.0))
        for into_WR, n_RK in ((x_WR, q_RK), (y_WR, p_RK)):
            own_RK = n_RK * (np.log(np.where(n_RK > 0, n_RK, 1.0)) - log_r_RK)
            into_WR[number] = np.exp(-scale * np.maximum(own_RK.sum(1), 0.0))
    # w = 0 and w = 1 are the ends (1, 0) and (0, 1); x falls as w grows
    zero_1R = np.zeros((1, len(p_RK)))
    x_WR, y_WR = np.concatenate([zero_1R + 1, x_WR, zero_1R]), np.concatenate([zero_1R, y_WR, zero_1R + 1])
    return np.asarray(-np.trapezoid(y_WR, x_WR, axis=0))


def principal(features_SD: Array, variance: float) -> Array:
    """Unit rows on their first principal components, as few as hold this share of the variance."""
    unit_SD = features_SD.astype(np.float64) / np.maximum(np.linalg.norm(features_SD, axis=1, keepdims=True), 1e-30)
    centred_SD = unit_SD - unit_SD.mean(0)
    values_D, axes_DD = np.linalg.eigh(centred_SD.T @ centred_SD)
    share_D = values_D[::-1].cumsum() / max(values_D.sum(), 1e-30)
    wanted = min(int((share_D < variance).sum()) + 1, len(share_D))
    return np.asarray(centred_SD @ axes_DD[:, ::-1][:, :wanted])


def k_means(points_SD: Array, clusters: int, seed: int) -> Array:
    """Cluster of each point, int64 [S]: the best of five runs of Lloyd's algorithm from k-means++ starts, fixed by the seed."""
    random = np.random.default_rng(seed)
    runs = [_lloyd(points_SD, _spread_start(points_SD, clusters, random)) for _ in range(_RESTARTS)]
    return min(runs, key=lambda run: run[1])[0]


def _spread_start(points_SD: Array, clusters: int, random: np.random.Generator) -> Array:
    """k-means++ (Arthur and Vassilvitskii 2007): each next centre with chance in proportion to its squared distance from those there are."""
    chosen = [int(random.integers(len(points_SD)))]
    near_S = _squares(points_SD, points_SD[chosen])[:, 0]
    for _ in range(min(clusters, len(points_SD)) - 1):
        total = near_S.sum()
        chosen.append(int(random.choice(len(points_SD), p=near_S / total)) if total > 0 else int(random.integers(len(points_SD))))
        near_S = np.minimum(near_S, _squares(points_SD, points_SD[chosen[-1:]])[:, 0])
    return np.asarray(points_SD[chosen])


def _lloyd(points_SD: Array, centre_KD: Array) -> tuple[Array, float]:
    """(cluster of each point, sum of squared distances); an empty cluster keeps its centre."""
    cluster_S = np.full(len(points_SD), -1)
    for _ in range(_ROUNDS):
        square_SK = _squares(points_SD, centre_KD)
        nearest_S = square_SK.argmin(1)
        if np.array_equal(nearest_S, cluster_S):
            break
        cluster_S = nearest_S
        count_K = np.bincount(cluster_S, minlength=len(centre_KD))
        sum_KD = np.zeros_like(centre_KD)
        np.add.at(sum_KD, cluster_S, points_SD)
        centre_KD = np.where(count_K[:, None] > 0, sum_KD / np.maximum(count_K, 1)[:, None], centre_KD)
    return cluster_S, float(_squares(points_SD, centre_KD)[np.arange(len(points_SD)), cluster_S].sum())


def _squares(points_SD: Array, centre_KD: Array) -> Array:
    """Squared distances [S, K]."""
    inner_SK = points_SD @ centre_KD.T
    return np.asarray(np.maximum((points_SD**2).sum(1)[:, None] - 2 * inner_SK + (centre_KD**2).sum(1), 0.0))


def _by_package(real_SD: Array, ours_SD: Array, clusters: int, settings: MauveConfig) -> Histograms:
    try:
        import mauve
    except ImportError:
        raise ValueError("mauve.implementation is mauve-text, which is not installed: pip install mauve-text (GPL-3.0), or set it to own") from None
    found = mauve.compute_mauve(
        p_features=real_SD, q_features=ours_SD, num_buckets=clusters, seed=settings.seed, mauve_scaling_factor=settings.scale,
        kmeans_explained_var=settings.variance, verbose=False,
    )  # fmt: skip
    real_K, ours_K = (np.rint(share_K * count).astype(np.int64) for share_K, count in ((found.p_hist, len(real_SD)), (found.q_hist, len(ours_SD))))
    return Histograms(real_K, ours_K, float(found.mauve))
