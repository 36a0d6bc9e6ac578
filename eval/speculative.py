"""Exact sampling from a causal LM in fewer of its calls: a drafter guesses the next tokens, one forward of the teacher judges all of them.

    draft    tokens x_1..x_n after the known ones, from the noise                          (drafters)
    verify   one forward of the teacher over them, on its KV cache: its own token at every place, given the drafts before it     (lockstep, referee)
    keep     the drafts that stand, up to the first that does not, and the teacher's own token there: at least one token a call

A row needs no draft of its last token, which the teacher gives anyway. Rows go at their own pace, and leave when they are done.

Equal: with SharedNoise the tokens are those of `pipeline.generate.write` for the same noise, whatever drafter, block and batch size: in float64 all
of them; in float32 but at near ties, since a forward over several tokens adds in another order than one over each.
Shapes: B rows, A rows still being written, L positions, J places of a call, K tokens of a draft, N judged places, V vocabulary, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from eval.lockstep import Lockstep
from eval.referee import Rule
from noise.sketch import TeacherError
from noise.storage import DatasetError
from trainer.conditioning import KnownNoise


@dataclass
class Rows:
    """The rows that are still being written."""

    ids_AL: Tensor
    """int64; past a row's known tokens it holds drafts, or anything"""
    known_A: Tensor
    """int64: tokens that stand, at least 1"""
    given_A: Tensor
    """int64: the first of them, which nobody wrote"""
    limit_A: Tensor
    """int64: tokens of the finished row"""
    row_A: Tensor
    """int64: their numbers among all rows"""
    given: KnownNoise | None = None
    """noise of given tokens, which they alone may have; None where nobody reads it"""
    hidden_AH: Tensor | None = None
    """float32: the teacher's hidden state that chose the last known token; None before its first call, and where no drafter asks for it"""

    def keep(self, at_K: Tensor) -> None:
        if self.given is not None:
            number_A = torch.full_like(self.row_A, -1)
            number_A[at_K] = torch.arange(len(at_K), device=at_K.device)
            self.given = self.given.within(number_A, self.ids_AL.shape[1], 0, 0, self.ids_AL.shape[1])
        for name in ("ids_AL", "known_A", "given_A", "limit_A", "row_A", "hidden_AH"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value[at_K])


class Drafter(Protocol):
    """Whatever can guess the next tokens of a row. Wrong guesses cost time and nothing else."""

    most: int
    """tokens of a draft, at most"""
    span: int
    """positions of a row, one behind the other, whose noise it asks for in one draft; 0 where it reads none"""
    reads_hidden: bool
    """whether it wants the teacher's hidden state"""
    forwards: int
    """of its own model, counted since `begin`"""

    def begin(self) -> None:
        """A new batch of rows."""

    def draft(self, rows: Rows, room_A: Tensor, rule: Rule) -> Tensor:
        """Write at most room_A tokens after each row's known ones; returns how many, int64 [A]."""

    def keep(self, at_K: Tensor) -> None:
        """Go on with these rows alone."""


class Nobody:
    """No draft at all: plain sampling, a token a call."""

    most, span, reads_hidden, forwards = 0, 0, False, 0

    def begin(self) -> None:
        pass

    def draft(self, rows: Rows, room_A: Tensor, rule: Rule) -> Tensor:
        return torch.zeros_like(room_A)

    def keep(self, at_K: Tensor) -> None:
        pass


@dataclass(frozen=True)
class Written:
    """Finished rows, and what became of every draft."""

    ids_BL: Tensor
    """int64; 0 past a row's limit"""
    calls_B: Tensor
    """int64: forwards of the teacher"""
    drafter_calls_B: Tensor
    """int64: forwards of the drafter's own model"""
    offered_BK: Tensor
    """int64: calls whose draft had a k-th token"""
    head_BL: Tensor
    """int64: k where a k-th drafted token was judged, 0 where the teacher wrote without a draft, or the token was given"""
    stands_BL: Tensor
    """bool: where the drafted token stands"""


@torch.inference_mode()
def speculate(
    teacher: Any,
    drafter: Drafter,
    rule: Rule,
    given_BP: Tensor,
    given_B: Tensor,
    limit_B: Tensor,
    block: int,
    given: KnownNoise | None = None,
) -> Written:
    """Rows that begin with the first given_B >= 1 tokens of given_BP, int64, written up to limit_B tokens with drafts of at most `block`.

    teacher: eval.causal.CausalLM, whose `forward_of` reads several tokens at once. given: noise of given tokens, for a drafter that reads it, at
    places of rows as wide as given_BP; it took a forward of the teacher, which counts for the rows that have some.
    """
    rows, written = _begin(given_BP, given_B, limit_B, block)
    if given is not None:
        rows.given = given.within(rows.row_A, given_BP.shape[1], 0, 0, rows.ids_AL.shape[1])
        written.calls_B[(given.where_K // given_BP.shape[1]).unique()] += 1
    reader = Lockstep(teacher.forward_of(drafter.reads_hidden), teacher.name)
    drafter.begin()
    while True:
        live_K = (rows.known_A < rows.limit_A).nonzero()[:, 0]
        if len(live_K) < len(rows.row_A):
            for part in (rows, reader, drafter):
                part.keep(live_K)
        if not len(live_K):
            return written
        before = drafter.forwards
        count_A = drafter.draft(rows, (rows.limit_A - rows.known_A - 1).clamp_max(min(block, drafter.most)), rule)
        written.drafter_calls_B[rows.row_A] += drafter.forwards - before
        logits_AJV, *hidden = reader.read(rows.ids_AL, rows.known_A, count_A)
        try:
            _settle(rows, written, rule, count_A, logits_AJV, hidden)
        except TeacherError as error:
            raise DatasetError(f"{teacher.name}: {error}") from None


def _begin(given_BP: Tensor, given_B: Tensor, limit_B: Tensor, block: int) -> tuple[Rows, Written]:
    device, count, length = given_BP.device, len(given_B), int(limit_B.max())
    ids_BL = torch.zeros(count, length, dtype=torch.int64, device=device)
    place_L = torch.arange(length, device=device)
    width = min(length, given_BP.shape[1])
    ids_BL[:, :width] = given_BP[:, :width].where(place_L[:width] < given_B[:, None], 0)
    zeros_B = torch.zeros(count, dtype=torch.int64, device=device)
    offered_BK = torch.zeros(count, max(1, block), dtype=torch.int64, device=device)
    written = Written(ids_BL, zeros_B, zeros_B.clone(), offered_BK, torch.zeros_like(ids_BL), torch.zeros_like(ids_BL, dtype=torch.bool))
    return Rows(ids_BL.clone(), given_B.clone(), given_B.clone(), limit_B.clone(), torch.arange(count, device=device)), written


def _settle(rows: Rows, written: Written, rule: Rule, count_A: Tensor, logits_AJV: Tensor, hidden: list[Tensor]) -> None:
    """Take the drafts that stand and the teacher's own token after them."""
    place_J = torch.arange(logits_AJV.shape[1], device=count_A.device)
    at_N, j_N = (place_J <= count_A[:, None]).nonzero(as_tuple=True)
    row_N, position_N = rows.row_A[at_N], rows.known_A[at_N] + j_N
    is_draft_N = j_N < count_A[at_N]
    drafted_N = rows.ids_AL[at_N, position_N].where(is_draft_N, -1)
    token_N, stands_N = rule.judge(logits_AJV[at_N, j_N], row_N, position_N, drafted_N)
    stands_AJ = torch.zeros(logits_AJV.shape[:2], dtype=torch.bool, device=count_A.device)
    stands_AJ[at_N, j_N] = stands_N
    taken_A = stands_AJ.long().cumprod(1).sum(1)
    final_N = j_N <= taken_A[at_N]
    row_N, position_N, token_N = row_N[final_N], position_N[final_N], token_N[final_N]
    rows.ids_AL[at_N[final_N], position_N] = written.ids_BL[row_N, position_N] = token_N
    written.head_BL[row_N, position_N] = torch.where(is_draft_N, j_N + 1, 0)[final_N]
    written.stands_BL[row_N, position_N] = stands_N[final_N]
    written.calls_B[rows.row_A] += 1
    offered_AK = torch.arange(written.offered_BK.shape[1], device=count_A.device) < count_A[:, None]
    written.offered_BK[rows.row_A] += offered_AK
    rows.known_A = rows.known_A + taken_A + 1
    rows.hidden_AH = hidden[0][torch.arange(len(taken_A), device=count_A.device), taken_A] if hidden else None
