"""The input of block diffusion, [x_t ; x_0]: which position stands in which slot, and who sees whom (arXiv 2503.09573, section 4).

Position t is of block t // S; the last block may be shorter. A noised block sees itself and the clean blocks before it; a
clean block sees itself and the clean blocks before it. The last clean block, which nobody would see, is left out, so one
block over the whole row is MDLM's own input. Where a token is predicted at the position before it (student.shift), a noised block after
the first begins with that position's token, clean: its first token too is predicted with the whole block in sight.
Shapes: B rows, L positions, M slots.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from trainer.attention import Mask


@dataclass(frozen=True, eq=False)
class Layout:
    """Slots of one row's input."""

    position_M: Tensor
    """int64: the position that stands there"""
    block_M: Tensor
    """int64: the block it is part of; a leading clean token is part of the block that it leads"""
    noised_M: Tensor
    """bool: in the noised half"""
    from_noised_M: Tensor
    """bool: the token is x_t's, not x_0's"""

    def fill(self, noised_BL: Tensor, clean_BL: Tensor) -> Tensor:
        """[x_t ; x_0], int64 [B, M]."""
        return torch.where(self.from_noised_M, noised_BL[:, self.position_M], clean_BL[:, self.position_M])

    @functools.cached_property
    def seen_MM(self) -> Tensor:
        """bool: whether the query (first) sees the key (second)."""
        slot_M = torch.arange(len(self.block_M), device=self.block_M.device)
        return _sees(self.block_M, self.noised_M, slot_M[:, None], slot_M[None, :])

    def mask(self, length_B: Tensor | None = None, flex: bool = False) -> Mask | None:
        """What `attention.attend` takes; None where all see all. Keys at length_B int64 [B] and after are padding."""
        if length_B is None:
            return None if self._all_see_all else self._flex_mask if flex else self.seen_MM
        if flex:
            return _flex_mask(self, length_B)
        return self.seen_MM & (self.position_M < length_B[:, None])[:, None, None, :]

    @functools.cached_property
    def _all_see_all(self) -> bool:
        return bool(self.seen_MM.all())

    @functools.cached_property
    def _flex_mask(self) -> BlockMask:
        return _flex_mask(self, None)


def _sees(block_M: Tensor, noised_M: Tensor, query: Tensor, key: Tensor) -> Tensor:
    own = (block_M[query] == block_M[key]) & (noised_M[query] == noised_M[key])
    return own | (~noised_M[key] & (block_M[key] < block_M[query]))


def _flex_mask(layout: Layout, length_B: Tensor | None) -> BlockMask:
    position_M, block_M, noised_M = layout.position_M, layout.block_M, layout.noised_M

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = _sees(block_M, noised_M, query, key)
        return seen if length_B is None else seen & (position_M[key] < length_B[row])

    size, rows = len(block_M), None if length_B is None else len(length_B)
    return create_block_mask(sees, rows, None, size, size, device=block_M.device.type)


@functools.lru_cache(maxsize=16)
def layout(length: int, block_size: int, shift: bool, device: torch.device) -> Layout:
    """The layout of rows of `length` positions in blocks of `block_size`, built once."""
    slots = []
    for start in range(0, length, block_size):
        number = start // block_size
        if shift and start:
            slots.append((start - 1, number, True, False))
        slots += [(position, number, True, True) for position in range(start, min(start + block_size, length))]
    last = (length - 1) // block_size * block_size
    slots += [(position, position // block_size, False, False) for position in range(last)]
    return Layout(*(torch.tensor(column, device=device) for column in zip(*slots, strict=True)))
