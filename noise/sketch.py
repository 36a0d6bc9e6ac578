"""The epsilon-sketch, version 1: dense posterior noise in a few bytes a token, with a proven error bound.

The stream rebuilds every E, so noise needs only p, and p matters only where the teacher moved the noise: entry i != x
is kept if `log1p(p_i E_0 / E_i) > epsilon` in some draw. With c = e^epsilon - 1 that is E_i < p_i E_0 / c, a comparison
of the stream's word with a threshold. Kept entries store a code of p_i that rounds up; a reader takes p = 0 elsewhere.

    not kept   0 <= g_decoded - g <= epsilon        kept   -step < g_decoded - g <= 0        token   equal
    argmax(log p + g_decoded) == x, always          E|kept| <= R / c, whatever the vocabulary and the teacher

Equal bits: which entries are kept and their codes depend only on the log-probs' bits and the rows, not on chunking,
batch order, device or compilation, up to float rounding of the threshold at its very edge.
Shapes: N positions, V vocabulary, K kept entries over all positions, R draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from noise import philox
from noise.candidates import find
from noise.compiled import compiled

MIN_EPSILON, MAX_EPSILON = 2.0**-10, math.log(2.0)
MAX_DRAWS = 128
MAX_KEPT = 2**16 - 1


class TeacherError(ValueError):
    """The teacher's output cannot be encoded; `position` is the first bad one among the N given."""

    def __init__(self, position: int, reason: str):
        super().__init__(reason)
        self.position, self.reason = position, reason


@dataclass(frozen=True)
class Codec:
    """The constants of one dataset's sketch. Raises ValueError for any that the format does not allow."""

    vocab_size: int
    """V, the width of the teacher's logits."""
    epsilon: float = 0.125
    """Largest error of an entry that is not kept, in nats; 2^-10 <= epsilon < ln 2."""
    draws: int = 1
    """R, how many draws of noise the kept entries serve."""

    def __post_init__(self) -> None:
        if not 2 <= self.vocab_size < 2**32:
            raise ValueError(f"vocab_size is {self.vocab_size}; it must be in [2, 2^32)")
        if not MIN_EPSILON <= self.epsilon < MAX_EPSILON:
            raise ValueError(f"epsilon is {self.epsilon}; it must be in [2^-10, ln 2) = [{MIN_EPSILON:.6f}, {MAX_EPSILON:.6f})")
        if not 1 <= self.draws <= MAX_DRAWS:
            raise ValueError(f"draws is {self.draws}; it must be in [1, {MAX_DRAWS}]")
        # given E_0, at most E_0 / c entries are kept on average, and E_0 > 64 has probability e^-64
        if min(self.vocab_size - 1, 64 * self.expected_kept_bound) > MAX_KEPT:
            raise ValueError(
                f"epsilon {self.epsilon} with {self.draws} draws could keep more than {MAX_KEPT} entries at one position; "
                "raise epsilon or lower draws"
            )

    @property
    def c(self) -> float:
        """e^epsilon - 1."""
        return math.expm1(self.epsilon)

    @property
    def expected_kept_bound(self) -> float:
        """R / c: no teacher keeps more entries a position on average."""
        return self.draws / self.c

    @property
    def step(self) -> float:
        """Width of a code's bin in nats."""
        return min(self.epsilon, 0.125)

    @property
    def code_bytes(self) -> int:
        return 1 if self.step == 0.125 else 2

    @property
    def index_bytes(self) -> int:
        return 2 if self.vocab_size <= 65536 else 4


@dataclass(frozen=True)
class Sketch:
    """What is kept of N positions."""

    log_prob_N: Tensor
    """float32 [N]: the teacher's log-prob of the realised token, nats."""
    kept_N: Tensor
    """int64 [N]: how many entries each position keeps."""
    index_K: Tensor
    """int64 [K]: their vocabulary entries, position by position, ascending within one."""
    code_K: Tensor
    """int64 [K]: floor(-ln p / step), at most the type's maximum."""

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.log_prob_N, self.kept_N, self.index_K, self.code_K


def encode(logits_NV: Tensor, token_N: Tensor, rows_N5: Tensor, codec: Codec, normaliser_N: Tensor | None = None) -> Sketch:
    """Sketch the posterior noise of tokens int64 [N] under a teacher's logits [N, V], for draws 0..R-1 of the given rows.

    The log-probs are `float32(logits) - normaliser`, float32 [N]; without one, the logits are log-probs already.
    Nothing of [N, V] is made. Raises TeacherError where a log-prob is NaN or the token has probability zero, or a token id
    is outside [0, V); ValueError for logits of another width than the codec's.
    """
    if logits_NV.shape[1] != codec.vocab_size:
        raise ValueError(f"logits are {logits_NV.shape[1]} wide; the dataset's vocab_size is {codec.vocab_size}")
    if normaliser_N is None:
        normaliser_N = torch.zeros(len(token_N), device=token_N.device)
    log_prob_N = _log_prob_of(token_N, logits_NV, normaliser_N)
    kept = [_kept(logits_NV, token_N, philox.with_draw(rows_N5, draw), codec, normaliser_N) for draw in range(codec.draws)]
    place_K = kept[0] if codec.draws == 1 else torch.cat(kept).unique()  # type: ignore[no-untyped-call]
    owner_K, index_K = place_K // codec.vocab_size, place_K % codec.vocab_size
    code_K = quantise(logits_NV[owner_K, index_K].float() - normaliser_N[owner_K], codec)
    return Sketch(log_prob_N, torch.bincount(owner_K, minlength=len(token_N)), index_K, code_K)


def normaliser(logits_NV: Tensor) -> Tensor:
    """log sum exp of the logits, float32 [N], computed in float32: one pass over them."""
    if logits_NV.device.type != "cpu":
        return _fused_normaliser(logits_NV)
    logits_NV = logits_NV.float()
    return logits_NV.amax(1) - logits_NV.log_softmax(1).amax(1)  # in 0.6 of logsumexp's time


@compiled
def _fused_normaliser(logits_NV: Tensor) -> Tensor:
    return logits_NV.float().logsumexp(1)


def _log_prob_of(token_N: Tensor, logits_NV: Tensor, normaliser_N: Tensor) -> Tensor:
    outside = (token_N < 0) | (token_N >= logits_NV.shape[1])
    if bool(outside.any()):
        raise TeacherError(int(outside.nonzero()[0, 0]), f"token id {int(token_N[outside][0])} is not below the teacher's width {logits_NV.shape[1]}")
    log_prob_N = logits_NV.gather(1, token_N[:, None])[:, 0].float() - normaliser_N
    # one NaN or +inf logit makes its row's normaliser NaN or +inf
    bad = ~(torch.isfinite(log_prob_N) & torch.isfinite(normaliser_N))
    if bool(bad.any()):
        at = int(bad.nonzero()[0, 0])
        value, total = float(log_prob_N[at]), float(normaliser_N[at])
        cause = "the token has probability zero" if value == -math.inf and math.isfinite(total) else "NaN or infinite logits"
        raise TeacherError(at, f"the teacher's log-prob of the token is {value} ({cause})")
    return log_prob_N


def _kept(logits_NV: Tensor, token_N: Tensor, rows_N5: Tensor, codec: Codec, normaliser_N: Tensor) -> Tensor:
    """The entries that the teacher moved by more than epsilon in the rows' draw: n V + i, int64, ascending."""
    ceiling_N = philox.winner_exponential(rows_N5) / codec.c
    owner_K, index_K, word_K = find(logits_NV, normaliser_N, rows_N5, ceiling_N)
    p_K = (logits_NV[owner_K, index_K].float() - normaliser_N[owner_K]).double().exp()
    moved_K = (word_K < _threshold(p_K * ceiling_N[owner_K])) & (index_K != token_N[owner_K])
    return (owner_K * codec.vocab_size + index_K)[moved_K]


def _threshold(y: Tensor) -> Tensor:
    """T = min(2^32, ceil((1 - e^-y) 2^32 (1 + 2^-20) - 1/2)), int64, of y = p E_0 / c in float64: moved iff word < T, no logarithm."""
    return (-torch.expm1(-y) * (2.0**32 * (1 + 2.0**-20)) - 0.5).ceil().clamp_max(2.0**32).to(torch.int64)


def quantise(log_prob_K: Tensor, codec: Codec) -> Tensor:
    """Codes floor(-ln p / step), int64 [K], computed in float64; the type's maximum is never reached at a legal epsilon."""
    return (-log_prob_K.to(torch.float64) / codec.step).floor().to(torch.int64).clamp(0, 256**codec.code_bytes - 1)


def dequantise(code_K: Tensor, codec: Codec) -> Tensor:
    """p = exp(-step code), float32: never below the p that was encoded, less than a factor e^step above it."""
    return torch.exp(code_K.to(torch.float64) * -codec.step).to(torch.float32)


def justified(sketch: Sketch, rows_N5: Tensor, codec: Codec) -> Tensor:
    """bool [K]: whether some draw explains each kept entry, given its decoded p. One that none explains is damage."""
    owner_K = torch.repeat_interleave(torch.arange(len(rows_N5), device=rows_N5.device), sketch.kept_N, output_size=len(sketch.index_K))
    p_K = dequantise(sketch.code_K, codec)
    explained_K = torch.zeros(len(p_K), dtype=torch.bool, device=p_K.device)
    for draw in range(codec.draws):
        drawn_K5 = philox.with_draw(rows_N5, draw)[owner_K]
        # a little above the threshold still counts: p on the edge of its code's bin may have been rounded up on another device
        y_K = p_K.double() * philox.winner_exponential(drawn_K5) * ((1 + 2.0**-20) / codec.c)
        explained_K |= philox.words_at(drawn_K5, sketch.index_K) < _threshold(y_K)
    return explained_K


def select(sketch: Sketch, position_M: Tensor) -> Sketch:
    """The sketch of some of its positions, int64 [M] indices into N, in the order given."""
    start_N = torch.cumsum(sketch.kept_N, 0) - sketch.kept_N
    kept_M = sketch.kept_N[position_M]
    first_M = torch.cumsum(kept_M, 0) - kept_M
    total = int(kept_M.sum())
    shift_K = torch.repeat_interleave(start_N[position_M] - first_M, kept_M, output_size=total)
    entry_K = torch.arange(total, device=shift_K.device) + shift_K
    return Sketch(sketch.log_prob_N[position_M], kept_M, sketch.index_K[entry_K], sketch.code_K[entry_K])
