"""Perplexity at matched entropy: a system is a curve, not a point.

Lower temperature lowers perplexity and entropy together, so perplexity alone proves nothing. Each system at each NFE is
traced by several temperatures (or noise temperatures); its log-perplexity is interpolated linearly against the pooled
token entropy and read where the entropy is that of real text.

The bootstrap resamples the whole curve (the same sequence ids at every point, so points and systems are paired) and,
independently, the real text: its own error is inside the interval, and the plug-in entropy's bias cancels.
Nothing is extrapolated: outside the traced range the nearest end stands, and `position` says so. So that little is
interpolated either, a further point is drawn where `setting_at` says that the entropy of real text lies.

Shapes: P traced points, R replicates + 1 (row 0 is the estimate).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval.metrics import Array, Interval, Scored, log_perplexity, pooled_entropy


@dataclass(frozen=True)
class Frontier:
    """One system at one NFE, in any order of its points."""

    entropy_PR: Array
    """float64 [P, R]: pooled token entropy, nats."""
    value_PR: Array
    """float64 [P, R]: log-perplexity, or what else is read at matched entropy."""

    @classmethod
    def trace(cls, points: Sequence[Scored], weights_RS: Array) -> Frontier:
        entropies = [pooled_entropy(point.ids_SL, point.length_S, weights_RS) for point in points]
        return cls(np.stack(entropies), np.stack([log_perplexity(point.nll_S, point.tokens_S, weights_RS) for point in points]))


@dataclass(frozen=True)
class Matched:
    """A frontier read at an entropy."""

    value_R: Array
    position: str
    """inside, or `above` / `below`: where the wanted entropy lies of the traced range; then the nearest end was read."""
    clamped: float
    """Share of replicates that had to take an end."""

    @property
    def perplexity(self) -> Interval:
        """Where the value is a log-perplexity."""
        return Interval.of(np.exp(self.value_R))


def match(frontier: Frontier, entropy_R: Array) -> Matched:
    """The frontier's value at entropies [R], replicate by replicate."""
    order_PR = np.argsort(frontier.entropy_PR, axis=0, kind="stable")
    x_PR = np.take_along_axis(frontier.entropy_PR, order_PR, 0)
    y_PR = np.take_along_axis(frontier.value_PR, order_PR, 0)
    below_R, above_R = entropy_R < x_PR[0], entropy_R > x_PR[-1]
    position = "below" if below_R[0] else "above" if above_R[0] else "inside"
    clamped = float((below_R | above_R)[1:].mean()) if len(entropy_R) > 1 else float(position != "inside")
    return Matched(_interpolate(x_PR, y_PR, np.clip(entropy_R, x_PR[0], x_PR[-1])), position, clamped)


def setting_at(settings: Sequence[float], entropies: Sequence[float], wanted: float, low: float, high: float) -> float | None:
    """The setting (a temperature, say) at which the entropy is the wanted one, by a line through two of the points traced so far.

    The two are those nearest to it on both sides or, where it lies on one side of all, the two nearest: then the line is followed no further than
    to `low` or `high`. None where a line says nothing: of one point, of two with one entropy, or where it falls while the frontier rises.
    """
    points = sorted(zip(entropies, settings, strict=True))
    above = sum(entropy <= wanted for entropy, _ in points)
    first = min(max(above - 1, 0), len(points) - 2)
    if len(points) < 2 or points[first][0] == points[first + 1][0]:
        return None
    (x0, y0), (x1, y1) = points[first : first + 2]
    found = y0 + (wanted - x0) / (x1 - x0) * (y1 - y0)
    if x0 <= wanted <= x1:
        return found
    by_setting = sorted(zip(settings, entropies, strict=True))
    rises = by_setting[-1][1] > by_setting[0][1]
    return min(max(found, low), high) if (y1 > y0) == rises else None


def _interpolate(x_PR: Array, y_PR: Array, at_R: Array) -> Array:
    """Linear interpolation in every column; x ascends within a column and at_R lies inside its range."""
    if len(x_PR) == 1:
        return np.asarray(y_PR[0])
    segment_1R = np.clip((x_PR <= at_R).sum(0) - 1, 0, len(x_PR) - 2)[None]
    x0, x1 = (np.take_along_axis(x_PR, segment_1R + end, 0)[0] for end in (0, 1))
    y0, y1 = (np.take_along_axis(y_PR, segment_1R + end, 0)[0] for end in (0, 1))
    share = np.where(x1 > x0, (at_R - x0) / np.where(x1 > x0, x1 - x0, 1.0), 0.0)
    return np.asarray(y0 + share * (y1 - y0))


def ratio(ours: Matched, theirs: Matched) -> Interval:
    """Our perplexity divided by theirs, both at matched entropy, paired replicate by replicate."""
    return Interval.of(np.exp(ours.value_R - theirs.value_R))
