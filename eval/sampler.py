"""Sample a masked student, batched, and count its function evaluations (NFE): forwards that were really made for a row.

Each step makes one forward of the rows that reveal something in it, and reveals a group of their unknown positions
(`Decoding.sampler`: how large a group, see schedules and adaptive; `Decoding.order`: which positions). A row that reveals
nothing in a step is not run.

Every random number is the noise stream's (see stream), so a seed names a sample for ever. The noise g is drawn once a
sequence and held through all steps, or anew in each step with fresh_noise. The same seed and sequence_id give the same
tokens at any batch size, up to float rounding of the student's forward.

An mtp student writes from left to right, and is shown the next masks alone, as many as it predicts.

A student that reads the noise of known tokens (`noise.known`) is given, for each token that it has written, the noise that it wrote it from;
tokens that were given have the noise that the caller names (the posterior, where a teacher is at hand: given), as it is, or none.

Shapes: B rows, L positions, M unknown positions at the start, N still masked in the rows of a step, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from eval.adaptive import Auxiliary, accepted, target_scores
from eval.ahead import check_ahead
from eval.decoding import Decoding, choose, restricted_log_probs
from eval.schedules import confidence_rank, fixed_rank, known_after, reveal_times
from eval.stream import NOISE_DRAW, OUTPUT_DRAW, step_seed, stream_uniform
from eval.view import View
from noise import philox
from trainer.conditioning import KnownNoise
from trainer.marginal import tempered


class MaskedStudent(Protocol):
    """What the sampler needs of a student; trainer.students.mdlm has it.

    `logits` takes length_B where rows are padded or cut, and known where noise.known is set; `row_cache` and `logits_from` are asked for where
    `recompute` is set.
    """

    vocab_size: int
    mask_id: int
    noise: Any
    ahead: int
    """masked positions that it may be shown, the next ones; 0: any"""

    def logits(self, ids_BL: Tensor, g_NV: Tensor | None) -> Tensor: ...


def resolve_output(output: str, student: MaskedStudent) -> Literal["sample", "argmax"]:
    """`auto` is argmax where the readout put the noise into the logits: sampling there would add noise twice."""
    if output == "auto":
        return "argmax" if student.noise.kind != "none" and student.noise.readout else "sample"
    if output not in ("sample", "argmax"):
        raise ValueError(f"output is {output!r}; expected auto, sample or argmax")
    return output  # type: ignore[return-value]


def blank_rows(student: MaskedStudent, rows: int, length: int, bos: int) -> Tensor:
    """int64 [B, L]: BOS, then mask ids."""
    ids_BL = torch.full((rows, length), student.mask_id, dtype=torch.int64)
    ids_BL[:, 0] = bos
    return ids_BL


def sampling_noise(seed: int, sequence_id_B: Tensor, unknown_BL: Tensor, vocab_size: int) -> Tensor:
    """Prior noise at the unknown positions, row-major: float32 [M, V], i.i.d. Gumbel(0, 1)."""
    row_M, position_M = unknown_BL.nonzero(as_tuple=True)
    return philox.gumbel(philox.rows(seed, sequence_id_B[row_M], position_M, NOISE_DRAW), vocab_size)


def sample(
    student: MaskedStudent,
    ids_BL: Tensor,
    sequence_id_B: Tensor,
    seed: int,
    decoding: Decoding,
    g_MV: Tensor | None = None,
    length_B: Tensor | None = None,
    auxiliary: Auxiliary | None = None,
) -> Tensor:
    """`sample_counted` without the counts: int64 [B, L]."""
    return sample_counted(student, ids_BL, sequence_id_B, seed, decoding, g_MV, length_B, auxiliary)[0]


@torch.inference_mode()
def sample_counted(
    student: MaskedStudent,
    ids_BL: Tensor,
    sequence_id_B: Tensor,
    seed: int,
    decoding: Decoding,
    g_MV: Tensor | None = None,
    length_B: Tensor | None = None,
    auxiliary: Auxiliary | None = None,
    given: KnownNoise | None = None,
) -> tuple[Tensor, Tensor]:
    """Fill the masked positions of int64 [B, L]; given tokens stay. Returns (tokens int64 [B, L], NFE int64 [B]).

    g_MV: noise at the masked positions in row-major order, drawn from the stream's prior where it is not given.
    length_B: valid positions, where rows are padded (with any token but the mask). auxiliary: the small model of adaptive.
    given: noise of given tokens, float32 [K, V], for a student that reads it.
    Raises ValueError for more function evaluations than unknown positions, and for settings that the student ignores.
    """
    _check(student, ids_BL, decoding, g_MV, auxiliary)
    check_ahead(student, ids_BL == student.mask_id, length_B, decoding)
    check_given(student, given)
    rows = _Rows(student, ids_BL, sequence_id_B, seed, decoding, g_MV, length_B, given)
    if auxiliary is not None:
        _adaptive(rows, auxiliary)
    else:
        schedule = _Schedule(rows)
        for step in schedule.steps:
            schedule.take(step)
    return rows.ids_BL, rows.nfe_B


@torch.inference_mode()
def last_call(student: MaskedStudent, ids_BL: Tensor, sequence_id_B: Tensor, seed: int, decoding: Decoding) -> tuple[Tensor, Tensor]:
    """What `sample` chooses its last tokens from: (tokens before its last call int64 [B, L], that call's logits [N, V] at masked ones, row-major).

    Raises ValueError as `sample` does, and for a schedule whose last call is not the same one for all rows.
    """
    if decoding.sampler != "even":
        raise ValueError(f"sampler is {decoding.sampler}, whose rows end at different calls; set sampler to even")
    _check(student, ids_BL, decoding, None, None)
    check_ahead(student, ids_BL == student.mask_id, None, decoding)
    rows = _Rows(student, ids_BL, sequence_id_B, seed, decoding, None, None, None)
    schedule = _Schedule(rows)
    *earlier, last = schedule.steps
    for step in earlier:
        schedule.take(step)
    return rows.ids_BL, rows.forward(last, schedule.group_SB[last] > 0)[1]


def _check(student: MaskedStudent, ids_BL: Tensor, decoding: Decoding, g_MV: Tensor | None, auxiliary: Auxiliary | None) -> None:
    most = int((ids_BL == student.mask_id).sum(1).max())
    if decoding.sampler == "even" and decoding.nfe > most:
        raise ValueError(f"nfe is {decoding.nfe} but no row has more than {most} unknown positions; lower nfe")
    check_noise(student, decoding)
    if decoding.fresh_noise and g_MV is not None:
        raise ValueError("fresh_noise is set, but the noise is given, once for all steps; drop one of them")
    if (auxiliary is None) == (decoding.sampler == "adaptive"):
        raise ValueError(
            f"sampler is {decoding.sampler} {'with' if auxiliary else 'without'} a small causal LM; only adaptive takes one, and needs it"
        )
    if auxiliary is not None and auxiliary.vocab_size != student.vocab_size:
        raise ValueError(f"the small causal LM has a vocabulary of {auxiliary.vocab_size}, the student of {student.vocab_size}; they must share one")


def check_given(student: Any, given: KnownNoise | None) -> None:
    """Raises ValueError for noise of given tokens that the student would not read."""
    if given is not None and not student.noise.known:
        raise ValueError("noise of given tokens is handed over, but the student reads none there (noise.known is false); drop it")


def check_noise(student: Any, decoding: Decoding) -> None:
    """Raises ValueError for settings of the noise that this student cannot follow, before any forward."""
    if student.noise.kind == "none" and (decoding.noise_temperature != 1 or decoding.fresh_noise):
        raise ValueError(
            f"noise_temperature is {decoding.noise_temperature} and fresh_noise {decoding.fresh_noise}, but the student takes no noise "
            "(noise.kind: none); trace it by temperature"
        )
    if student.noise.known and decoding.fresh_noise:
        raise ValueError(
            "fresh_noise is set, but the student reads the noise of known tokens (noise.known), which is held through the steps; drop it"
        )


class _Rows:
    """Rows on their way: what is known, what is masked, the noise of each masked position, and the forwards made."""

    def __init__(
        self,
        student: MaskedStudent,
        ids_BL: Tensor,
        sequence_id_B: Tensor,
        seed: int,
        decoding: Decoding,
        g_MV: Tensor | None,
        length_B: Tensor | None,
        given: KnownNoise | None,
    ):
        self.student, self.decoding, self.seed = student, decoding, seed
        self.view = View(student, decoding.lookahead or student.ahead, decoding.recompute, length_B)
        self.ids_BL = ids_BL.clone()
        unknown_BL = ids_BL == student.mask_id
        self.unknown_B = unknown_BL.sum(1)
        self.row_M, self.position_M = unknown_BL.nonzero(as_tuple=True)
        self.sequence_id_M = sequence_id_B[self.row_M]
        self.masked_M = torch.ones(len(self.row_M), dtype=torch.bool, device=ids_BL.device)
        self.nfe_B = torch.zeros_like(self.unknown_B)
        self.g_MV = None
        if student.noise.kind != "none" and not decoding.fresh_noise:
            self.g_MV = self._scaled(sampling_noise(seed, sequence_id_B, unknown_BL, student.vocab_size) if g_MV is None else g_MV)
        self.given = given

    def forward(self, step: int, moving_B: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(at int64 [N] into M, logits [N, V], noise [N, V] or None) of the masked positions in view of the rows that move in this step."""
        at_N = (self.masked_M & moving_B[self.row_M] & (self.position_M < self.view.end(self.ids_BL)[self.row_M])).nonzero()[:, 0]
        g_NV = self._noise(at_N, step)
        self.nfe_B += moving_B
        return at_N, self.view.logits(self.ids_BL, moving_B, g_NV, self._known(moving_B)), g_NV

    def reveal(self, at_N: Tensor, token_N: Tensor) -> None:
        self.ids_BL[self.row_M[at_N], self.position_M[at_N]] = token_N
        self.masked_M[at_N] = False

    def stream(self, draw: int, at_N: Tensor, seed: int | None = None) -> Tensor:
        """Places in the stream of these positions: [N, 5]."""
        return philox.rows(self.seed if seed is None else seed, self.sequence_id_M[at_N], self.position_M[at_N], draw)

    def _noise(self, at_N: Tensor, step: int) -> Tensor | None:
        if self.student.noise.kind == "none":
            return None
        if self.g_MV is not None:
            return self.g_MV[at_N]
        return self._scaled(philox.gumbel(self.stream(NOISE_DRAW, at_N, step_seed(self.seed, step)), self.student.vocab_size))

    def _known(self, moving_B: Tensor) -> KnownNoise | None:
        """Noise of the known tokens of the rows that move, at flat places among these rows."""
        if self.g_MV is None or not self.student.noise.known:
            return None
        length = self.ids_BL.shape[1]
        at_K = (~self.masked_M).nonzero()[:, 0]
        written = KnownNoise(self.row_M[at_K] * length + self.position_M[at_K], self.g_MV[at_K])
        number_B = torch.where(moving_B, moving_B.cumsum(0) - 1, -1)
        return written.and_of(self.given).within(number_B, length, 0, 0, length)

    def _scaled(self, g_NV: Tensor) -> Tensor:
        return tempered(g_NV, self.student.noise.kind, self.decoding.noise_temperature)


class _Schedule:
    """Reveals in every call as many positions as the schedule says, those that the order puts first."""

    def __init__(self, rows: _Rows):
        self.rows, decoding, row_M = rows, rows.decoding, rows.row_M
        time_M = reveal_times(rows.seed, rows.sequence_id_M, rows.position_M)
        self.uniform_M = stream_uniform(rows.stream(OUTPUT_DRAW, torch.arange(len(row_M), device=row_M.device)))
        self.rank_M = fixed_rank(decoding.order, time_M, row_M)
        self.known_SB = known_after(decoding, rows.unknown_B, time_M, row_M)
        self.group_SB = self.known_SB.diff(dim=0, prepend=torch.zeros_like(self.known_SB[:1]))
        self.steps: list[int] = (self.group_SB > 0).any(1).nonzero()[:, 0].tolist()

    def take(self, step: int) -> None:
        """One call, and what it reveals."""
        rows = self.rows
        at_N, logits_NV, _ = rows.forward(step, self.group_SB[step] > 0)
        row_N = rows.row_M[at_N]
        # a fixed rank counts from the row's start, the surest of the moment from what is known already
        if self.rank_M is not None:
            now_N = self.rank_M[at_N] < self.known_SB[step][row_N]
        else:
            now_N = confidence_rank(logits_NV, row_N) < self.group_SB[step][row_N]
        rows.reveal(at_N[now_N], choose(logits_NV[now_N], self.uniform_M[at_N[now_N]], rows.decoding))


def _adaptive(rows: _Rows, auxiliary: Auxiliary) -> None:
    """Adaptive parallel decoding: propose, let the target choose with the same noise, take the longest prefix on which they agree."""
    step = 0
    while bool(rows.masked_M.any()):
        moving_B = torch.bincount(rows.row_M[rows.masked_M], minlength=len(rows.ids_BL)) > 0
        at_N, logits_NV, g_NV = rows.forward(step, moving_B)
        student_NV, shared_NV = _shared_noise(rows, at_N, logits_NV, g_NV)
        token_N = student_NV.argmax(1)
        where = rows.row_M[at_N], rows.position_M[at_N]
        proposed_BL = rows.ids_BL.index_put(where, token_N)[moving_B, : int(where[1].max()) + 1]
        proposed_BL = proposed_BL.masked_fill(proposed_BL == rows.student.mask_id, 0)  # behind what is proposed, so nobody reads it
        flat_N = (moving_B.cumsum(0) - 1)[where[0]] * proposed_BL.shape[1] + where[1]
        log_p_NV = torch.log_softmax(auxiliary.logits_of(proposed_BL, flat_N).float() / rows.decoding.temperature, -1)
        target_N = target_scores(student_NV, log_p_NV + shared_NV, rows.decoding.student_weight).argmax(1)
        taken_N = accepted(token_N, target_N, where[0])
        rows.reveal(at_N[taken_N], token_N[taken_N])
        step += 1


def _shared_noise(rows: _Rows, at_N: Tensor, logits_NV: Tensor, g_NV: Tensor | None) -> tuple[Tensor, Tensor]:
    """(the student's scores s_D, the noise that is in them), both [N, V]."""
    if rows.decoding.output == "sample":
        h_NV = philox.gumbel(rows.stream(OUTPUT_DRAW, at_N), logits_NV.shape[1])
        return restricted_log_probs(logits_NV, rows.decoding) + h_NV, h_NV
    return logits_NV, g_NV if g_NV is not None and rows.student.noise.readout else torch.zeros_like(logits_NV)
