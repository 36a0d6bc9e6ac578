"""How a row goes on: whether it says again what it said, runs in a circle, or comes to an end.

Each is one number a sequence, so a set's figure is a mean over sequences with its bootstrap interval. Position 0 is given
and never counted. Shapes: S sequences, L positions, W windows of n tokens.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from eval.metrics import Array, ngrams, valid

LONGEST_PERIOD = 64
COPIES, SHORTEST_LOOP = 3, 8


def repeated(ids_SL: Array, length_S: Array, n: int) -> Array:
    """Share of a row's n-grams that the row has had before: 1 - different / all, float64 [S]; 0 for a row without n-grams."""
    code_SW, inside_SW = ngrams(ids_SL, length_S, n)
    if not code_SW.shape[1]:
        return np.zeros(len(ids_SL))
    ordered_SW = np.sort(np.where(inside_SW, code_SW, -1), axis=1)
    new_SW = np.diff(ordered_SW, axis=1, prepend=-1) > 0
    all_S = inside_SW.sum(1)
    return np.asarray(np.where(all_S, 1 - new_SW.sum(1) / np.maximum(all_S, 1), 0.0))


def looped(ids_SL: Array, length_S: Array) -> Array:
    """Share of a row's tokens inside a loop, float64 [S]: a segment of at most 64 tokens, three or more times in a row, over 8 tokens or more."""
    good_SL = valid(ids_SL, length_S)
    inside_SL = np.zeros_like(good_SL)
    for period in range(1, min(LONGEST_PERIOD, (ids_SL.shape[1] - 1) // COPIES) + 1):
        same_SL = np.zeros_like(good_SL)
        same_SL[:, period:] = (ids_SL[:, period:] == ids_SL[:, :-period]) & good_SL[:, period:] & good_SL[:, :-period]
        # a run of equal tokens, together with the period before it, is the loop
        for row, start, stop in _runs(same_SL, max((COPIES - 1) * period, SHORTEST_LOOP - period)):
            inside_SL[row, start - period : stop] = True
    return np.asarray(inside_SL.sum(1) / np.maximum(good_SL.sum(1), 1))


def _runs(same_SL: Array, least: int) -> list[tuple[int, int, int]]:
    """(row, start, stop) of the runs of at least so many true values."""
    edge = np.diff(np.pad(same_SL.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    (row, start), (_, stop) = (edge == 1).nonzero(), (edge == -1).nonzero()
    long = stop - start >= least
    return list(zip(row[long].tolist(), start[long].tolist(), stop[long].tolist(), strict=True))


def written(ids_SL: Array, length_S: Array, ends: Collection[int]) -> tuple[Array, Array]:
    """(tokens before the first end of a text or of the row int64 [S], whether an end came bool [S]); `ends`: EOS, and BOS where a new text begins."""
    end_SL = np.isin(ids_SL, list(ends)) & valid(ids_SL, length_S)
    ended_S = np.asarray(end_SL.any(1))
    return np.where(ended_S, end_SL.argmax(1), np.asarray(length_S)) - 1, ended_S
