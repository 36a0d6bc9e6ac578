"""Students as drafters: each guesses the next tokens of rows of different lengths, from what is known of them and from the noise.

    mdlm      masks after the known tokens, some of them (`sight`) or all to the row's end as in training, filled in `nfe` forwards from left to right
    bd3lm     the row's block, and those after it while the draft lasts, in `nfe` forwards each, with a cache of the blocks before
    mtp       as many masks as it was trained to predict, in one forward
    medusa    its heads. On the teacher itself they read the hidden state of the teacher's last call, and cost no call of their own;
              on another backbone that one is called, and guesses the first token itself
    ar        any small causal LM, token by token with a cache: classic speculative decoding

Drafters whose logits were made with the noise guess their argmax; the others' logits are the referee's to choose from (referee). One that reads the
noise of known tokens (noise.known) is told that of all written ones, and of given ones what the caller names.
Shapes: A rows, L positions, N masked positions (row-major), J places of a medusa student, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eval.causal import CausalLM
from eval.lockstep import Lockstep
from eval.referee import Rule
from eval.speculative import Drafter, Rows
from noise.storage import DatasetError
from trainer.conditioning import KnownNoise

KINDS = ("mdlm", "bd3lm", "mtp", "medusa")


def drafter_of(student: Any, nfe: int, sight: int, teacher_sha256: str = "") -> Drafter:
    """A loaded student as a drafter; `teacher_sha256` is the hash of the teacher's weights. Raises DatasetError for a kind that drafts nothing."""
    kind = student.config.kind
    if kind not in KINDS:
        raise DatasetError(f"a student of kind {kind} drafts nothing; give one of kind {', '.join(KINDS)}, or a causal LM")
    if kind == "mdlm":
        return MaskedDrafter(student, nfe, sight)
    if kind == "bd3lm":
        return BlockDrafter(student, nfe)
    return MTPDrafter(student) if kind == "mtp" else MedusaDrafter(student, shares=student.base.weights_sha256 == teacher_sha256)


class _Alone:
    """A drafter with one model and nothing kept between drafts. `ahead`: masks that it sees after the known tokens, at most."""

    reads_hidden = False

    def __init__(self, student: Any, ahead: int):
        self.student, self.forwards = student, 0
        self.informed = bool(student.noise.informed)
        self.span: int = 0 if student.noise.kind == "none" else student.block_length if student.noise.known else ahead

    def begin(self) -> None:
        self.forwards = 0

    def keep(self, at_K: Tensor) -> None:
        pass

    def fill(self, rows: Rows, room_A: Tensor, shown_AL: Tensor, wanted_AL: Tensor, steps: int, rule: Rule, *more: Any, since: int = 0) -> None:
        """Guess the wanted masks of shown_AL from left to right, in so many forwards at most, into it and into the rows' drafts.

        room_A: tokens of the whole draft. more: what `logits` takes besides. since: from this position on the noise of known tokens is read.
        """
        rank_AL = wanted_AL.long().cumsum(1) - 1
        count_A = wanted_AL.sum(1)
        steps = min(steps, int(count_A.max()))
        for step in range(1, steps + 1):
            at_N, position_N = (shown_AL == self.student.mask_id).nonzero(as_tuple=True)
            row_N = rows.row_A[at_N]
            g_NV = rule.given(row_N, position_N, self.student.noise.kind) if self.student.noise.kind != "none" else None
            logits_NV = self.student.logits(shown_AL, g_NV, *more, **self._known(rows, shown_AL, rows.known_A + room_A, since, rule))
            self.forwards += 1
            now_N = wanted_AL[at_N, position_N] & (rank_AL[at_N, position_N] < -(-count_A * step // steps)[at_N])
            at_N, position_N = at_N[now_N], position_N[now_N]
            token_N = rule.guess(logits_NV[now_N], rows.row_A[at_N], position_N, self.informed)
            shown_AL[at_N, position_N] = rows.ids_AL[at_N, position_N] = token_N

    def _known(self, rows: Rows, shown_AL: Tensor, end_A: Tensor, since: int, rule: Rule) -> dict[str, KnownNoise]:
        """Noise of what is written, and of what this draft holds so far; nothing for a student that reads none."""
        if not self.student.noise.known:
            return {}
        place_L = torch.arange(shown_AL.shape[1], device=shown_AL.device)
        told_AL = (shown_AL != self.student.mask_id) & (place_L >= rows.given_A[:, None].clamp_min(since)) & (place_L < end_A[:, None])
        at_K, position_K = told_AL.nonzero(as_tuple=True)
        written = KnownNoise(at_K * len(place_L) + position_K, rule.given(rows.row_A[at_K], position_K, self.student.noise.kind))
        number_A, wide = torch.arange(len(rows.row_A), device=shown_AL.device), rows.ids_AL.shape[1]
        return {"known": written.and_of(rows.given and rows.given.within(number_A, wide, 0, since, len(place_L)))}


class MaskedDrafter(_Alone):
    """An mdlm student. `sight`: masks that it sees after the known tokens; 0: all to the row's end."""

    def __init__(self, student: Any, nfe: int, sight: int):
        self.most = sight or student.block_length
        super().__init__(student, self.most)
        self._nfe, self._sight = nfe, sight

    def draft(self, rows: Rows, room_A: Tensor, rule: Rule) -> Tensor:
        place_L = torch.arange(rows.ids_AL.shape[1], device=room_A.device)
        known_A1 = rows.known_A[:, None]
        end_A = torch.minimum(rows.known_A + self._sight, rows.limit_A) if self._sight else rows.limit_A
        shown_AL = rows.ids_AL.where(place_L < known_A1, self.student.mask_id).masked_fill(place_L >= end_A[:, None], 0)[:, : int(end_A.max())]
        wanted_AL = ((place_L >= known_A1) & (place_L < known_A1 + room_A[:, None]))[:, : shown_AL.shape[1]]
        ragged = bool((end_A < shown_AL.shape[1]).any())
        self.fill(rows, room_A, shown_AL, wanted_AL, self._nfe, rule, end_A if ragged else None)
        return room_A


class MTPDrafter(_Alone):
    """An mtp student: the masks of its training, of which the first are drafted."""

    def __init__(self, student: Any):
        self.most = student.config.predict
        super().__init__(student, self.most)

    def draft(self, rows: Rows, room_A: Tensor, rule: Rule) -> Tensor:
        place_L = torch.arange(rows.ids_AL.shape[1], device=room_A.device)
        known_A1 = rows.known_A[:, None]
        end_A = torch.minimum(rows.known_A + self.most, rows.limit_A)
        shown_AL = rows.ids_AL.where(place_L < known_A1, self.student.mask_id).masked_fill(place_L >= end_A[:, None], 0)[:, : int(end_A.max())]
        wanted_AL = ((place_L >= known_A1) & (place_L < known_A1 + room_A[:, None]))[:, : shown_AL.shape[1]]
        self.fill(rows, room_A, shown_AL, wanted_AL, 1, rule)
        return room_A


class BlockDrafter(_Alone):
    """A bd3lm student: its cache holds the blocks before the earliest that some row has not finished; rows that are ahead are read there again."""

    def __init__(self, student: Any, nfe: int):
        super().__init__(student, student.block_size)
        self._nfe = nfe
        self.most = student.block_length

    def begin(self) -> None:
        super().begin()
        self._cache = self.student.empty_cache()

    def keep(self, at_K: Tensor) -> None:
        self._cache.keep_rows(at_K)

    def draft(self, rows: Rows, room_A: Tensor, rule: Rule) -> Tensor:
        size, length = self.student.block_size, rows.ids_AL.shape[1]
        place_L = torch.arange(length, device=room_A.device)
        drafted_AL = (place_L >= rows.known_A[:, None]) & (place_L < (rows.known_A + room_A)[:, None])
        open_AL = (place_L >= rows.known_A[:, None]) & (place_L < rows.limit_A[:, None])
        # behind the block of the last known token the cache may hold drafts that were refused, and that token's own predecessor
        self._cache.filled = min(self._cache.filled, (int(rows.known_A.min()) - 1) // size * size)
        ragged = rows.limit_A if bool((rows.limit_A < length).any()) else None
        first = int(rows.known_A.min()) // size * size
        for start in range(first, int((rows.known_A + room_A).max()), size):
            stop = min(start + size, length)
            wanted_AL = drafted_AL[:, :stop] & (place_L[:stop] >= start)
            masked_AL = open_AL[:, :stop] & (place_L[:stop] >= start) & wanted_AL.any(1, keepdim=True)
            if bool(wanted_AL.any()):
                shown_AL = rows.ids_AL[:, :stop].masked_fill(masked_AL, self.student.mask_id)
                self.fill(rows, room_A, shown_AL, wanted_AL, self._nfe, rule, ragged, self._cache, since=self._cache.filled - 1)
        return room_A


class MedusaDrafter:
    """A medusa student. `shares`: its backbone is the teacher, whose hidden states it reads."""

    def __init__(self, student: Any, shares: bool):
        self.student, self.reads_hidden, self.forwards = student, shares, 0
        self._lead = int(shares)
        self.most, self.span = student.places - self._lead, student.places + 1 if student.noise.kind != "none" else 0

    def begin(self) -> None:
        self.forwards = 0

        def forward(ids_BW: Tensor, cache: Any) -> tuple[list[Tensor], Any]:
            hidden_BWH, cache = self.student.base.read(ids_BW, cache, keep=True)
            return [hidden_BWH], cache

        self._reader = Lockstep(forward, self.student.base.name)

    def keep(self, at_K: Tensor) -> None:
        self._reader.keep(at_K)

    def draft(self, rows: Rows, room_A: Tensor, rule: Rule) -> Tensor:
        if not bool(room_A.any()) or (self.reads_hidden and rows.hidden_AH is None):
            return torch.zeros_like(room_A)
        hidden_AH = rows.hidden_AH
        if not self.reads_hidden:
            hidden_AH = self._reader.read(rows.ids_AL, rows.known_A, torch.zeros_like(room_A))[0][:, 0]
            self.forwards += 1
        # the places that follow the token which that state has read: the first of them is known where the teacher's state is read
        place_AJ = (rows.known_A - self._lead)[:, None] + torch.arange(self.student.places, device=room_A.device)
        g_AJV = None
        if self.student.noise.kind != "none":
            row_AJ = rows.row_A[:, None].expand_as(place_AJ)
            g_AJV = rule.given(row_AJ.flatten(), place_AJ.flatten(), self.student.noise.kind).unflatten(0, place_AJ.shape)
        logits_AJV = self.student.heads_at(hidden_AH, g_AJV)
        for j in range(self._lead, self.student.places):
            informed = j > 0 and self.student.noise.informed  # the backbone's own logits know nothing of the noise
            at_K = (j - self._lead < room_A).nonzero()[:, 0]
            token_K = rule.guess(logits_AJV[at_K, j], rows.row_A[at_K], place_AJ[at_K, j], informed)
            rows.ids_AL[at_K, place_AJ[at_K, j]] = token_K
        return room_A


class CausalDrafter:
    """A small causal LM."""

    reads_hidden = False

    def __init__(self, lm: CausalLM):
        self._lm, self.forwards = lm, 0
        self.most, self.span = lm.max_length or 2**24, 0

    def begin(self) -> None:
        self.forwards, self._reader = 0, Lockstep(self._lm.forward_of(), self._lm.name)

    def keep(self, at_K: Tensor) -> None:
        self._reader.keep(at_K)

    def draft(self, rows: Rows, room_A: Tensor, rule: Rule) -> Tensor:
        for j in range(int(room_A.max())):
            logits_AV = self._reader.read(rows.ids_AL, rows.known_A + room_A.clamp_max(j), torch.zeros_like(room_A))[0][:, 0]
            self.forwards += 1
            at_K = (room_A > j).nonzero()[:, 0]
            position_K = rows.known_A[at_K] + j
            rows.ids_AL[at_K, position_K] = rule.guess(logits_AV[at_K], rows.row_A[at_K], position_K, informed=False)
        return room_A
