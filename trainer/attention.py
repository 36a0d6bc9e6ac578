"""Who sees whom: the attention product with any mask, and the keys and values that are kept between calls.

A mask is bool [.., Q, K], True where a query sees a key, for SDPA on every device; or a FlexAttention BlockMask, which skips
what nobody sees, for GPUs. `attend` takes either, and None where all see all.
Shapes: B rows, Q queries, K keys, D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from noise.compiled import compiled

Mask = Tensor | BlockMask


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None, causal: bool = False) -> Tensor:
    """softmax(q k' / sqrt D) v over the keys that the mask shows: [B, heads, Q, D]."""
    if mask is None or isinstance(mask, Tensor):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return _flex(q, k, v, mask) if torch.compiler.is_compiling() else _compiled_flex(q, k, v, mask)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    out: Tensor = flex_attention(q, k, v, block_mask=mask)
    return out


_compiled_flex = compiled(_flex)


class Cache:
    """Keys and values of the first `filled` positions, for every layer. What is written past them is written over by the next call."""

    def __init__(self, layers: int, capacity: int):
        self.filled, self._capacity = 0, capacity
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * layers

    def join(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values [B, heads, Q, D] after the filled ones; returns both together, [B, heads, filled + Q, D]."""
        kept = self._layers[layer]
        if kept is None:
            shape = (*k.shape[:2], self._capacity, k.shape[3])
            kept = self._layers[layer] = (k.new_empty(shape), v.new_empty(shape))
        stop = self.filled + k.shape[2]
        for whole, new in zip(kept, (k, v), strict=True):
            whole[:, :, self.filled : stop] = new
        return kept[0][:, :, :stop], kept[1][:, :, :stop]

    def keep_rows(self, row_R: Tensor) -> None:
        """Go on with these rows alone, bool [B] or int64 [R]."""
        self._layers = [None if kept is None else (kept[0][row_R], kept[1][row_R]) for kept in self._layers]


class RowCache(Cache):
    """Keys and values of whole rows, of which a call writes anew the places that it names, other ones in every row."""

    def place(self, position_BQ: Tensor, length: int) -> None:
        """The next call writes at these positions, int64 [B, Q], nowhere where they are past the cache's end, and sees those before `length`."""
        self._position_BQ, self.filled = position_BQ.clamp_max(self._capacity), length

    def join(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values [B, heads, Q, D] at the places of this call; returns those of the rows, [B, heads, length, D]."""
        kept = self._layers[layer]
        if kept is None:
            shape = (*k.shape[:2], self._capacity + 1, k.shape[3])  # the last place is for slots past the end
            kept = self._layers[layer] = (k.new_zeros(shape), v.new_zeros(shape))
        for whole, new in zip(kept, (k, v), strict=True):
            whole.scatter_(2, self._position_BQ[:, None, :, None].expand_as(new), new)
        return kept[0][:, :, : self.filled], kept[1][:, :, : self.filled]
