"""Sample a masked student at any number of function evaluations (NFE), batched.

The unknown positions of each row are split as evenly as possible into NFE groups, and one forward reveals one group.
The order is a random permutation per row, or, with order=confidence, the surest positions first.

Every random number is the noise stream's, so a seed names a sample for ever: draw 128 is the noise g that the student
is given (drawn once a sequence, held through all steps), 129 the order, 130 the choice at the output. The same seed
and sequence_id give the same tokens at any batch size, up to float rounding of the student's forward.

Shapes: B rows, L positions, M unknown positions at the start, N still masked, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from noise import philox

NOISE_DRAW = philox.SAMPLING_DRAW
ORDER_DRAW = philox.SAMPLING_DRAW + 1
OUTPUT_DRAW = philox.SAMPLING_DRAW + 2

_ELEMENTS_AT_ONCE = 2**24  # probabilities turned into cumulative sums together


class MaskedStudent(Protocol):
    """What the sampler needs of a student; trainer.students.mdlm has it."""

    vocab_size: int
    mask_id: int
    noise: Any

    def logits(self, ids_BL: Tensor, g_NV: Tensor | None) -> Tensor: ...


@dataclass(frozen=True)
class Decoding:
    """How tokens are drawn. Raises ValueError for values that are out of range or would be ignored."""

    nfe: int
    """Function evaluations: forwards of the student for one row, 1 to the number of unknown positions."""
    temperature: float = 1.0
    """Divides the logits before sampling at the output."""
    noise_temperature: float = 1.0
    """Multiplies the noise that the student is given."""
    nucleus: float = 1.0
    """Sample from the smallest set of tokens with at least this probability."""
    output: Literal["sample", "argmax"] = "sample"
    """sample from the student's distribution, or take its most likely token (right where noise.readout made it the sample)."""
    order: Literal["random", "confidence"] = "random"
    """Which positions are revealed first."""

    def __post_init__(self) -> None:
        if self.nfe < 1:
            raise ValueError(f"nfe is {self.nfe}; it must be at least 1")
        for name in ("temperature", "noise_temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be above 0" + (" (output: argmax is temperature 0)" if name == "temperature" else "")
                )
        if not 0 < self.nucleus <= 1:
            raise ValueError(f"nucleus is {self.nucleus}; it must be in (0, 1]")
        if self.output not in ("sample", "argmax") or self.order not in ("random", "confidence"):
            raise ValueError(f"output is {self.output!r} and order {self.order!r}; expected sample or argmax, and random or confidence")
        if self.output == "argmax" and (self.temperature != 1 or self.nucleus != 1):
            raise ValueError(
                f"temperature {self.temperature} and nucleus {self.nucleus} do nothing to an argmax; leave them at 1 or set output to sample"
            )


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


@torch.inference_mode()
def sample(student: MaskedStudent, ids_BL: Tensor, sequence_id_B: Tensor, seed: int, decoding: Decoding, g_MV: Tensor | None = None) -> Tensor:
    """Fill the masked positions of int64 [B, L]; given tokens stay. Returns int64 [B, L].

    g_MV: noise at the masked positions in row-major order, drawn from the stream's prior where it is not given.
    Raises ValueError for more function evaluations than unknown positions, and for settings that the student ignores.
    """
    ids_BL = ids_BL.clone()
    unknown_BL = ids_BL == student.mask_id
    unknown_B = unknown_BL.sum(1)
    if decoding.nfe > int(unknown_B.max()):
        raise ValueError(f"nfe is {decoding.nfe} but no row has more than {int(unknown_B.max())} unknown positions; lower nfe")
    if student.noise.kind == "none" and decoding.noise_temperature != 1:
        raise ValueError(
            f"noise_temperature is {decoding.noise_temperature} but the student takes no noise (noise.kind: none); trace it by temperature"
        )
    row_M, position_M = unknown_BL.nonzero(as_tuple=True)
    if student.noise.kind != "none":
        g_MV = sampling_noise(seed, sequence_id_B, unknown_BL, student.vocab_size) if g_MV is None else g_MV
        g_MV = g_MV * decoding.noise_temperature if decoding.noise_temperature != 1 else g_MV
    uniform_M = stream_uniform(philox.rows(seed, sequence_id_B[row_M], position_M, OUTPUT_DRAW))
    rank_M = random_rank(seed, sequence_id_B, unknown_BL) if decoding.order == "random" else None
    masked_M = torch.ones(len(row_M), dtype=torch.bool, device=ids_BL.device)
    for step in range(decoding.nfe):
        revealed_B = (unknown_B * (step + 1) + decoding.nfe - 1) // decoding.nfe  # how many are known once this step is done
        at_N = masked_M.nonzero()[:, 0]
        logits_NV = student.logits(ids_BL, None if g_MV is None else g_MV[at_N])
        if rank_M is not None:
            now_N = rank_M[at_N] < revealed_B[row_M[at_N]]
        else:
            masked_B = torch.bincount(row_M[at_N], minlength=len(ids_BL))
            now_N = confidence_rank(logits_NV, row_M[at_N]) < (revealed_B - (unknown_B - masked_B))[row_M[at_N]]
        at_now = at_N[now_N]
        ids_BL[row_M[at_now], position_M[at_now]] = choose(logits_NV[now_N], uniform_M[at_now], decoding)
        masked_M[at_now] = False
    return ids_BL


def stream_uniform(rows_N5: Tensor) -> Tensor:
    """One uniform in (0, 1) a row, float64 [N], from the word of entry 0."""
    word_N = philox.words_at(rows_N5, torch.zeros(len(rows_N5), dtype=torch.int64, device=rows_N5.device))
    return (word_N.to(torch.float64) + 0.5) * 2.0**-32


def random_rank(seed: int, sequence_id_B: Tensor, unknown_BL: Tensor) -> Tensor:
    """Each unknown position's place in its row's random permutation, row-major: int64 [M], 0 is revealed first."""
    row_M, position_M = unknown_BL.nonzero(as_tuple=True)
    return _rank_in_row(stream_uniform(philox.rows(seed, sequence_id_B[row_M], position_M, ORDER_DRAW)), row_M)


def confidence_rank(logits_NV: Tensor, row_N: Tensor) -> Tensor:
    """Places by falling probability of the best token among a row's masked positions: int64 [N]."""
    return _rank_in_row(logits_NV.logsumexp(1) - logits_NV.amax(1), row_N)


def _rank_in_row(key_N: Tensor, row_N: Tensor) -> Tensor:
    """Rank of each key among the keys of its row, ascending, ties by position: int64 [N]. row_N is ascending."""
    by_key_N = torch.argsort(key_N, stable=True)
    order_N = by_key_N[torch.argsort(row_N[by_key_N], stable=True)]
    count_B = torch.bincount(row_N)
    first_N = (torch.cumsum(count_B, 0) - count_B)[row_N]
    rank_N = torch.empty_like(row_N)
    rank_N[order_N] = torch.arange(len(row_N), device=row_N.device)
    return rank_N - first_N


def choose(logits_NV: Tensor, uniform_N: Tensor, decoding: Decoding) -> Tensor:
    """One token a position, int64 [N]: the argmax, or the inverse of the distribution function at uniform_N."""
    if decoding.output == "argmax":
        return logits_NV.argmax(1)
    size = max(1, _ELEMENTS_AT_ONCE // logits_NV.shape[1])
    parts = zip(torch.split(logits_NV, size), torch.split(uniform_N, size), strict=True)
    return torch.cat([_inverse_sample(part_NV.float() / decoding.temperature, u_N, decoding.nucleus) for part_NV, u_N in parts])


def _inverse_sample(logits_NV: Tensor, uniform_N: Tensor, nucleus: float) -> Tensor:
    p_NV = torch.softmax(logits_NV, 1, dtype=torch.float64)
    index_NV = None
    if nucleus < 1:
        p_NV, index_NV = torch.sort(p_NV, dim=1, descending=True, stable=True)
        p_NV = p_NV.masked_fill(p_NV.cumsum(1) - p_NV >= nucleus, 0.0)
    cumulative_NV = p_NV.cumsum(1)
    token_N1 = torch.searchsorted(cumulative_NV, uniform_N[:, None] * cumulative_NV[:, -1:], right=True).clamp_max(p_NV.shape[1] - 1)
    return (token_N1 if index_NV is None else index_NV.gather(1, token_N1))[:, 0]
