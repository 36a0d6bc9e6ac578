"""A causal LM that reads rows of different lengths together, with a KV cache that can be taken back, and no padding.

A cache is cut at one place for all rows. So a call begins before the first position that some row has not settled yet, and gives
the rows that are ahead their own tokens there once more. No row is shifted or padded on the left: positions are the text's in every
row, for any kind of positional encoding, and what stands behind a row's own tokens is never seen, since attention is causal. The
price: a call is wider than the draft by what the fastest row is ahead of the slowest, nothing for one row.
Shapes: B rows, L positions, W positions of a call, J places: the last known token's and those of the draft behind it, X outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from noise.storage import DatasetError

Forward = Callable[[Tensor, Any], tuple[list[Tensor], Any]]
"""(tokens int64 [B, W] that continue what the KV cache holds, the cache or None) -> (outputs [B, W, X], the cache)"""


class Lockstep:
    """The cache of one batch of rows. `name` is the model's, for errors."""

    def __init__(self, forward: Forward, name: str):
        self._forward, self._name = forward, name
        self._cache: Any = None
        self._filled = self._sound = 0  # positions in the cache, and those of them that hold tokens of every row

    def read(self, ids_BL: Tensor, known_B: Tensor, drafted_B: Tensor) -> list[Tensor]:
        """Outputs [B, J, X] at the last known token of each row and at the drafted ones behind it; past a row's own draft they mean nothing.

        known_B: leading tokens that will not change any more, at least 1. Raises DatasetError for a model whose cache cannot be taken back.
        """
        start, stop = min(self._sound, int(known_B.min()) - 1), int((known_B + drafted_B).max())
        self._crop(self._filled - start)
        outputs, self._cache = self._forward(ids_BL[:, start:stop], self._cache)
        if self._cache is None:
            raise DatasetError(f"{self._name} has no KV cache, without which nothing would be faster; take another model")
        self._filled, self._sound = stop, int((known_B + drafted_B).min())
        place_J = torch.arange(int(drafted_B.max()) + 1, device=ids_BL.device)
        at_BJ = ((known_B - 1 - start)[:, None] + place_J).clamp_max(stop - start - 1)
        row_B1 = torch.arange(len(ids_BL), device=ids_BL.device)[:, None]
        return [output[row_B1, at_BJ] for output in outputs]

    def keep(self, at_A: Tensor) -> None:
        """Go on with these rows alone, int64 [A]."""
        if self._cache is not None:
            self._cache.batch_select_indices(at_A)

    def _crop(self, tokens: int) -> None:
        if tokens == self._filled:
            self._cache = None
        elif tokens:
            try:
                self._cache.crop(-tokens)
            except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
                raise DatasetError(
                    f"{self._name} has a KV cache that cannot be taken back ({error}): a refused draft would stay in it; take another model"
                ) from None
