"""The noise stream, version 1: Philox4x32-10 counters -> words -> exponentials.

Every number of the stream is a function of (seed, sequence_id, position, draw, vocabulary entry) alone, so noise is
never stored. Words and uniforms are bit-equal on CPU and GPU, eager and compiled, in any order and chunking; the
exponentials agree within 2 ulp (log1p differs between libraries).

    key      = (seed mod 2^32, seed div 2^32)
    counter  = (block j, position + draw * 2^24, sequence_id mod 2^32, sequence_id div 2^32)
    word k of block j -> vocabulary entry 4 j + k;   E_0 is word 0 of block 0xFFFFFFFF
    v = min(RN32(RN32(word) + 0.5) * 2^-32, 1 - 2^-24);   E = -log1p(-v);   g = -log E

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Torch has no uint32
arithmetic, so words live in int64: a 32 x 32 bit product wraps modulo 2^64 and its bits are still the right ones.

A *row* is one position's place in the stream: five int64 numbers (k0, k1, c1, c2, c3). Shapes: N rows, V entries, K chosen entries.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from noise.compiled import compiled, native

MAX_POSITION = 2**24
MAX_DRAW = 256
SAMPLING_DRAW = 128  # draws 0..127 belong to datasets, 128..255 to sampling

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_E0_BLOCK = 0xFFFFFFFF
_LARGEST_UNIFORM = 1 - 2**-24
_TILE = 2**16  # entries whose noise is made at a time on a CPU: they stay in its second cache

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor) -> Words:
    """Philox4x32-10. Arguments are int64 tensors of values in [0, 2^32) that broadcast; so are the four output words."""
    for _ in range(10):
        product0, product1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK) ^ c1 ^ k0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def rows(seed: int | Tensor, sequence_id: Tensor, position: Tensor, draw: int | Tensor = 0) -> Tensor:
    """Places in the stream, [N, 5] int64, for N positions.

    seed: 0 <= seed < 2^64, or an int64 tensor [N] of its bit patterns; sequence_id: int64 [N], bit patterns of uint64;
    position: int64 [N] in [0, 2^24); draw: in [0, 256), one for all or [N]. Raises ValueError outside these ranges.
    """
    if isinstance(seed, int):
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}; it must be in [0, 2^64)")
        seed = torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
    if isinstance(draw, int) and not 0 <= draw < MAX_DRAW:
        raise ValueError(f"draw is {draw}; it must be in [0, {MAX_DRAW}): 0..127 for datasets, 128..255 for sampling")
    if position.numel() and position.device.type == "cpu" and not 0 <= int(position.min()) <= int(position.max()) < MAX_POSITION:
        raise ValueError(f"positions reach from {int(position.min())} to {int(position.max())}; they must be in [0, 2^24)")
    place = position.to(torch.int64) + draw * MAX_POSITION
    seed = seed.to(sequence_id.device)
    parts = (seed & _MASK, (seed >> 32) & _MASK, place, sequence_id & _MASK, (sequence_id >> 32) & _MASK)
    return torch.stack(torch.broadcast_tensors(*parts), dim=-1)  # type: ignore[no-untyped-call]


def with_draw(rows_N5: Tensor, draw: int) -> Tensor:
    """The same positions at another draw."""
    place = (rows_N5[:, 2] & (MAX_POSITION - 1)) + draw * MAX_POSITION
    return torch.stack((rows_N5[:, 0], rows_N5[:, 1], place, rows_N5[:, 3], rows_N5[:, 4]), dim=-1)


def words(rows_N5: Tensor, stop: int, start: int = 0) -> Tensor:
    """One 32-bit word for each of the vocabulary entries from `start`, a multiple of 4, to `stop`: int64 [N, stop - start] in [0, 2^32)."""
    block = torch.arange(start // 4, (stop + 3) // 4, device=rows_N5.device)[None, :]
    k0, k1, c1, c2, c3 = (column[:, None] for column in rows_N5.unbind(-1))
    return torch.stack(philox(block, c1, c2, c3, k0, k1), dim=-1).flatten(1)[:, : stop - start]


def words_at(rows_K5: Tensor, index_K: Tensor) -> Tensor:
    """The words of single entries: int64 [K], entry index_K[k] at row k. Equal to `words` there."""
    k0, k1, c1, c2, c3 = rows_K5.unbind(-1)
    lanes = torch.stack(philox(index_K >> 2, c1, c2, c3, k0, k1), dim=-1)
    return lanes.gather(-1, (index_K & 3)[:, None])[:, 0]


def uniform(word: Tensor) -> Tensor:
    """v in (0, 1), float32, from words; round to nearest even twice, as the stream says."""
    return ((word.to(torch.float32) + 0.5) * 2.0**-32).clamp_max(_LARGEST_UNIFORM)


def exponential(word: Tensor) -> Tensor:
    """Exp(1) from words, float32. Small values, which are large Gumbels, keep full relative precision."""
    return -torch.log1p(-uniform(word))


def winner_exponential(rows_N5: Tensor) -> Tensor:
    """E_0, float32 [N]: the one extra exponential of Algorithm 1 at each position."""
    k0, k1, c1, c2, c3 = rows_N5.unbind(-1)
    return exponential(philox(torch.full_like(c1, _E0_BLOCK), c1, c2, c3, k0, k1)[0])


def gumbel(rows_N5: Tensor, stop: int, start: int = 0) -> Tensor:
    """Prior noise g = -log E of entries `start` (a multiple of 4) to `stop`, float32 [N, stop - start], i.i.d. Gumbel(0, 1)."""
    if not _has_machine_code(rows_N5):
        return _gumbel(rows_N5, stop, start)
    return _in_tiles(rows_N5, stop, start, lambda e: e.log_().neg_())


def rate(rows_N5: Tensor, stop: int, start: int = 0) -> Tensor:
    """exp(g) = 1 / E of the same noise: what a softmax of it is made of, without a logarithm."""
    if not _has_machine_code(rows_N5):
        return _rate(rows_N5, stop, start)
    return _in_tiles(rows_N5, stop, start, lambda e: e.reciprocal_())


def _has_machine_code(rows_N5: Tensor) -> bool:
    return rows_N5.device.type == "cpu" and native() is not None


def _in_tiles(rows_N5: Tensor, stop: int, start: int, finish: Callable[[Tensor], Tensor]) -> Tensor:
    """E on a CPU, with `finish` done in place, a few positions at a time so that passes over them stay in its second cache."""
    fast = native()
    assert fast is not None
    e_NV = torch.empty(len(rows_N5), stop - start)
    size = max(1, _TILE // (stop - start))
    for first in range(0, len(rows_N5), size):
        tile_NV = e_NV[first : first + size]
        fast.uniform(rows_N5[first : first + size].numpy(), start // 4, tile_NV.numpy())
        finish(tile_NV.neg_().log1p_().neg_())
    return e_NV


@compiled
def _gumbel(rows_N5: Tensor, stop: int, start: int) -> Tensor:
    return -torch.log(exponential(words(rows_N5, stop, start)))


@compiled
def _rate(rows_N5: Tensor, stop: int, start: int) -> Tensor:
    return 1 / exponential(words(rows_N5, stop, start))
