"""Sample a block diffusion student block after block, with a KV cache and noise, to any length.

Within a block everything is as in `sampler`: the same schedules, orders and stream draws (see stream), with `Decoding.nfe` and
the sampler's own numbers counted within the block; a block is known whole before the next begins, whatever nfe and block size. The keys and values of
finished blocks are kept; the forward that starts a block adds those of the one before, so the cache costs no forward.

Past the student's training length a window slides: when the next block does not fit, the cache starts again from the last
`keep` blocks, half a window where it is not given. A window looks as a row of training does: its first position holds BOS (the row's token 0), in
place of the token that was there, and positions count from there. The stream's positions are those of the text.

With `eos` a row ends at the first EOS that is written after its last given token; what follows is padding 0, and no more
forwards are made for it. The same seed and sequence_id give the same text at any batch size, up to float rounding.

Shapes: B rows, A rows still being written, L positions, S positions of a block, T positions of the window so far, M unknown
positions of a block at its start and N at a step, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from eval.decoding import Decoding, choose
from eval.sampler import check_given, check_noise
from eval.schedules import confidence_rank, fixed_rank, known_after, reveal_times
from eval.stream import NOISE_DRAW, OUTPUT_DRAW, step_seed, stream_uniform
from noise import philox
from trainer.conditioning import KnownNoise
from trainer.marginal import tempered


class BlockStudent(Protocol):
    """What the sampler needs of a student; trainer.students.bd3lm has it."""

    vocab_size: int
    mask_id: int
    noise: Any
    block_size: int
    block_length: int

    def empty_cache(self) -> Any: ...

    def logits(self, ids_BT: Tensor, g_NV: Tensor | None, length_B: Tensor | None, cache: Any, **known: Any) -> Tensor: ...


@dataclass(frozen=True)
class Written:
    """Finished rows."""

    ids_BL: Tensor
    """int64; 0 past the length"""
    length_B: Tensor
    """int64: L, or up to the EOS, which counts"""
    nfe_B: Tensor
    """int64: forwards that revealed something in the row"""


@torch.inference_mode()
def sample_blocks(
    student: BlockStudent,
    ids_BL: Tensor,
    sequence_id_B: Tensor,
    seed: int,
    decoding: Decoding,
    g_MV: Tensor | None = None,
    length_B: Tensor | None = None,
    eos: int | None = None,
    keep: int | None = None,
    given: KnownNoise | None = None,
) -> Written:
    """Fill the masked positions of int64 [B, L]; given tokens stay, and may stand anywhere.

    g_MV: noise at all masked positions of ids_BL in row-major order, drawn from the stream's prior where it is not given.
    length_B: valid positions, where rows are padded (with any token but the mask). given: noise of given tokens,
    float32 [K, V], for a student that reads it.
    Raises ValueError for settings that would be ignored, and for rows that no window fits.
    """
    check_blocks(student, ids_BL, decoding, g_MV, keep)
    check_given(student, given)
    size, length = student.block_size, ids_BL.shape[1]
    rows = _Rows(student, ids_BL, sequence_id_B, seed, decoding, g_MV, length_B, given)
    window = _Window(student, keep)
    for start in range(0, length, size):
        stop = min(start + size, length)
        at_A = rows.active(start)
        if len(at_A) == 0:
            break
        window.move(start, stop, at_A)
        if bool(rows.unknown_BL[at_A, start:stop].any()):
            _write(rows, window, at_A, start, stop)
            if eos is not None:
                rows.end(at_A, start, stop, eos)
    return Written(rows.ids_BL, rows.length_B, rows.nfe_B)


def check_blocks(student: BlockStudent, ids_BL: Tensor, decoding: Decoding, g_MV: Tensor | None, keep: int | None) -> None:
    """Raises ValueError as `sample_blocks` does, before any forward."""
    size, longest, length = student.block_size, student.block_length, ids_BL.shape[1]
    if decoding.sampler == "adaptive":
        raise ValueError("sampler is adaptive, which takes whole rows; give even, ancestral or first_hitting within blocks")
    check_noise(student, decoding)
    if decoding.fresh_noise and g_MV is not None:
        raise ValueError("fresh_noise is set, but the noise is given, once for all steps; drop one of them")
    if bool((ids_BL[:, 0] == student.mask_id).any()):
        raise ValueError("position 0 of a row is masked; it holds BOS, which is given")
    if length > longest and longest < 2 * size:
        raise ValueError(
            f"rows have {length} positions, and a window of {longest} holds no two blocks of {size}: there would be no context to slide with; "
            f"write at most {longest} positions"
        )
    if keep is not None and length <= longest:
        raise ValueError(f"keep is {keep}, but rows of {length} positions fit the student's {longest}, and no window slides; drop it")
    if keep is not None and not 1 <= keep < longest // size:
        raise ValueError(f"keep is {keep}; a window of {longest} positions in blocks of {size} keeps 1 to {longest // size - 1} blocks")


class _Rows:
    """All rows on their way, with everything that the stream says of them."""

    def __init__(
        self,
        student: BlockStudent,
        ids_BL: Tensor,
        sequence_id_B: Tensor,
        seed: int,
        decoding: Decoding,
        g_MV: Tensor | None,
        length_B: Tensor | None,
        given: KnownNoise | None,
    ):
        self.student, self.seed, self.decoding, self.sequence_id_B, self._drawn_MV = student, seed, decoding, sequence_id_B, g_MV
        self._given = given
        self.ids_BL, self.unknown_BL = ids_BL.clone(), ids_BL == student.mask_id
        self._number_BL = (self.unknown_BL.flatten().cumsum(0) - 1).view_as(ids_BL)
        position_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
        self.padded, self.length_B = length_B is not None, torch.full_like(sequence_id_B, ids_BL.shape[1]) if length_B is None else length_B.clone()
        self._last_given_B = position_L.where(~self.unknown_BL & (position_L < self.length_B[:, None]), -1).amax(1)
        self._last_unknown_B = position_L.where(self.unknown_BL, -1).amax(1)
        self.nfe_B = torch.zeros_like(sequence_id_B)

    def active(self, start: int) -> Tensor:
        """Rows with something to write from `start` on, int64 [A]."""
        return ((self._last_unknown_B >= start) & (self.length_B > start)).nonzero()[:, 0]

    def stream(self, row_N: Tensor, position_N: Tensor, draw: int, seed: int | None = None) -> Tensor:
        """Places in the stream, [N, 5]."""
        return philox.rows(self.seed if seed is None else seed, self.sequence_id_B[row_N], position_N, draw)

    def noise(self, row_N: Tensor, position_N: Tensor, step: int) -> Tensor | None:
        """Noise as the student is given it, [N, V]."""
        if self.student.noise.kind == "none":
            return None
        if self._drawn_MV is not None:
            g_NV = self._drawn_MV[self._number_BL[row_N, position_N]]
        else:
            seed = step_seed(self.seed, step) if self.decoding.fresh_noise else None
            g_NV = philox.gumbel(self.stream(row_N, position_N, NOISE_DRAW, seed), self.student.vocab_size)
        return tempered(g_NV, self.student.noise.kind, self.decoding.noise_temperature)

    def known(self, at_A: Tensor, first: int, start: int, stop: int) -> KnownNoise:
        """Noise of the known tokens of rows at_A from position `start` on, in the window from `first` to `stop`.

        Written tokens have the noise that they were written from. A window's first position has none: there BOS stands.
        """
        begin, size = max(start, first + 1), stop - first
        written_AS = self.unknown_BL[at_A, begin:stop] & (self.ids_BL[at_A, begin:stop] != self.student.mask_id)
        in_A_K, offset_K = written_AS.nonzero(as_tuple=True)
        where_K, g_KV = in_A_K * size + begin - first + offset_K, self.noise(at_A[in_A_K], begin + offset_K, 0)
        assert g_KV is not None
        written = KnownNoise(where_K, g_KV)
        if self._given is None:
            return written
        number_B = torch.full_like(self.sequence_id_B, -1).index_copy(0, at_A, torch.arange(len(at_A), device=at_A.device))
        return written.and_of(self._given.within(number_B, self.ids_BL.shape[1], first, begin, stop))

    def end(self, at_A: Tensor, start: int, stop: int, eos: int) -> None:
        """End rows at their first EOS in this block that was written past all given tokens."""
        position_S = torch.arange(start, stop, device=at_A.device)
        ends_AS = (self.ids_BL[at_A, start:stop] == eos) & self.unknown_BL[at_A, start:stop] & (position_S > self._last_given_B[at_A, None])
        for row, at in zip(at_A[ends_AS.any(1)].tolist(), ends_AS.int().argmax(1)[ends_AS.any(1)].tolist(), strict=True):
            self.length_B[row] = start + at + 1
            self.ids_BL[row, start + at + 1 :] = 0


class _Window:
    """The part of the text that the student sees, and its cache."""

    def __init__(self, student: BlockStudent, keep: int | None):
        self._student, self._first = student, 0
        self._keep = (keep or max(1, student.block_length // student.block_size // 2)) * student.block_size
        self._rows_A: Tensor | None = None

    def move(self, start: int, stop: int, at_A: Tensor) -> None:
        """Before a block: let go of rows that are done, and slide where the block does not fit."""
        if stop - self._first > self._student.block_length:
            self._first, self._rows_A = start - self._keep, None
        if self._rows_A is None:
            self._cache = self._student.empty_cache()
        elif len(at_A) < len(self._rows_A):
            self._cache.keep_rows(torch.isin(self._rows_A, at_A))
        self._rows_A = at_A

    def logits(self, rows: _Rows, stop: int, g_NV: Tensor | None) -> Tensor:
        """Logits at the masked positions of the block that ends at `stop`, of the rows of the last move."""
        ids_AT = rows.ids_BL[self._rows_A, self._first : stop]
        ids_AT[:, 0] = rows.ids_BL[self._rows_A, 0]
        length_A = rows.length_B[self._rows_A] - self._first if rows.padded else None
        more: dict[str, Any] = {}
        if self._student.noise.known:
            assert self._rows_A is not None
            # what the cache holds is not read again, but for the token before the block where the student predicts one position ahead (shift)
            more["known"] = rows.known(self._rows_A, self._first, self._first + self._cache.filled - 1, stop)
        return self._student.logits(ids_AT, g_NV, length_A, self._cache, **more)


def _write(rows: _Rows, window: _Window, at_A: Tensor, start: int, stop: int) -> None:
    """Reveal one block's masked positions: as many in each step as the schedule says, those that the order puts first."""
    decoding = rows.decoding
    in_A_M, offset_M = rows.unknown_BL[at_A, start:stop].nonzero(as_tuple=True)
    row_M, position_M = at_A[in_A_M], start + offset_M
    time_M = reveal_times(rows.seed, rows.sequence_id_B[row_M], position_M)
    uniform_M = stream_uniform(rows.stream(row_M, position_M, OUTPUT_DRAW))
    rank_M = fixed_rank(decoding.order, time_M, in_A_M)
    masked_M = torch.ones_like(row_M, dtype=torch.bool)
    unknown_A = torch.bincount(in_A_M, minlength=len(at_A))
    before_A = torch.zeros_like(unknown_A)
    held_MV = None if decoding.fresh_noise else rows.noise(row_M, position_M, 0)
    for step, after_A in enumerate(known_after(decoding, unknown_A, time_M, in_A_M)):
        moving_A = after_A > before_A
        if bool(moving_A.any()):
            at_N = masked_M.nonzero()[:, 0]
            g_NV = rows.noise(row_M[at_N], position_M[at_N], step) if held_MV is None else held_MV[at_N]
            logits_NV = window.logits(rows, stop, g_NV)
            in_A_N = in_A_M[at_N]
            # a fixed rank counts from the block's start, the surest of the moment from what is known already
            now_N = rank_M[at_N] < after_A[in_A_N] if rank_M is not None else confidence_rank(logits_NV, in_A_N) < (after_A - before_A)[in_A_N]
            now = at_N[now_N]
            rows.ids_BL[row_M[now], position_M[now]] = choose(logits_NV[now_N], uniform_M[now], decoding)
            masked_M[now] = False
            rows.nfe_B[at_A] += moving_A
        before_A = after_A
