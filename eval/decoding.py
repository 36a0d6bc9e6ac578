"""How a masked student's text is drawn: every setting that decides tokens, and one token from one row of logits.

Shapes: N positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor

SamplerName = Literal["even", "ancestral", "first_hitting", "adaptive"]
OrderName = Literal["random", "confidence", "left_to_right"]

_ELEMENTS_AT_ONCE = 2**24  # probabilities turned into cumulative sums together
_OUTPUT = "output (of sample and perplexity: choose)"
_FIRST_FIELDS = ("nfe", "temperature", "noise_temperature", "nucleus", "output", "order")


@dataclass(frozen=True)
class Decoding:
    """How tokens are drawn. Raises ValueError for values that are out of range or would be ignored."""

    nfe: int = 0
    """Function evaluations that are asked for: 1 to the number of unknown positions with even, steps of the schedule with
    ancestral, which makes fewer; 0 with first_hitting and adaptive, which take what they take."""
    temperature: float = 1.0
    """Divides the logits before sampling at the output."""
    noise_temperature: float = 1.0
    """Multiplies the noise that the student is given."""
    nucleus: float = 1.0
    """Sample from the smallest set of tokens with at least this probability."""
    output: Literal["sample", "argmax"] = "sample"
    """sample from the student's distribution, or take its most likely token (right where noise.readout made it the sample)."""
    order: OrderName = "random"
    """Which positions are revealed first."""
    top_k: int = 0
    """Sample from that many most likely tokens; 0: from all. Nucleus then counts what is left of all tokens' probability."""
    sampler: SamplerName = "even"
    """How many positions each forward reveals: see schedules, and adaptive."""
    fresh_noise: bool = False
    """New noise for the student in every step, instead of noise held through all steps."""
    student_weight: float = 0.5
    """R of adaptive parallel decoding: 1 is the student alone, 0 lets the small model decide."""
    lookahead: int = 0
    """M of adaptive: the masked positions that the student is shown in a call; 0: all. See view."""
    recompute: int = 0
    """W of adaptive: from how far behind the newest tokens a call reads a row, with cached keys and values before; 0: from its start, exactly."""

    def __post_init__(self) -> None:
        for field, known in (("output", ("sample", "argmax")), ("order", get_args(OrderName)), ("sampler", get_args(SamplerName))):
            if getattr(self, field) not in known:
                raise ValueError(f"{field} is {getattr(self, field)!r}; expected {', '.join(known[:-1])} or {known[-1]}")
        self._check_numbers()
        if self.output == "argmax" and (self.temperature != 1 or self.nucleus != 1 or self.top_k):
            raise ValueError(
                f"temperature {self.temperature}, nucleus {self.nucleus} and top_k {self.top_k} do nothing to an argmax; "
                f"leave them alone or set {_OUTPUT} to sample"
            )
        if self.sampler in ("first_hitting", "adaptive") and (self.nfe or self.order != "random"):
            raise ValueError(
                f"sampler {self.sampler} has its own order and number of forwards; leave order and nfe alone (they are {self.order} and {self.nfe}), "
                "or take sampler even"
            )
        if self.sampler != "adaptive" and self.student_weight != 0.5:
            raise ValueError(f"student_weight is {self.student_weight}, but sampler {self.sampler} has no second model; set sampler to adaptive")
        if self.sampler != "adaptive" and (self.lookahead or self.recompute):
            raise ValueError(
                f"lookahead is {self.lookahead} and recompute {self.recompute}, but sampler {self.sampler} does not write from left to right; "
                "leave them at 0, or set sampler to adaptive"
            )

    def _check_numbers(self) -> None:
        if self.sampler in ("even", "ancestral") and self.nfe < 1:
            raise ValueError(f"nfe is {self.nfe}; it must be at least 1")
        for name in ("temperature", "noise_temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be above 0"
                    + (f"; for temperature 0 set {_OUTPUT} to argmax" if name == "temperature" else "")
                )
        if not 0 < self.nucleus <= 1:
            raise ValueError(f"nucleus is {self.nucleus}; it must be in (0, 1]")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1, or 0 for all tokens")
        if not 0 <= self.student_weight <= 1:
            raise ValueError(f"student_weight is {self.student_weight}; it must be in [0, 1]")
        for name, all_of in (("lookahead", "all masked positions"), ("recompute", "the whole row")):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1, or 0 for {all_of}")

    def request(self) -> dict[str, Any]:
        """The settings by name, for a sample set's request; those that came later are left out at their default, which changes no name."""
        defaults = {field.name: field.default for field in fields(self)}
        return {name: value for name, value in asdict(self).items() if name in _FIRST_FIELDS or value != defaults[name]}


def choose(logits_NV: Tensor, uniform_N: Tensor, decoding: Decoding) -> Tensor:
    """One token a position, int64 [N]: the argmax, or the inverse of the distribution function at uniform_N."""
    if decoding.output == "argmax":
        return logits_NV.argmax(1)
    size = max(1, _ELEMENTS_AT_ONCE // logits_NV.shape[1])
    parts = zip(torch.split(logits_NV, size), torch.split(uniform_N, size), strict=True)
    return torch.cat([_inverse_sample(part_NV.float() / decoding.temperature, u_N, decoding) for part_NV, u_N in parts])


def restricted_log_probs(logits_NV: Tensor, decoding: Decoding) -> Tensor:
    """log of the distribution that is sampled, [N, V], up to a constant a row: -inf at tokens that top_k and nucleus leave out."""
    wide_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    log_p_NV = torch.log_softmax(wide_NV / decoding.temperature, -1)
    if decoding.nucleus == 1 and not decoding.top_k:
        return log_p_NV
    p_NV, index_NV = torch.sort(log_p_NV.double().exp(), dim=1, descending=True, stable=True)
    left_out_NV = torch.zeros_like(p_NV, dtype=torch.bool).scatter_(1, index_NV, _left_out(p_NV, decoding))
    return log_p_NV.masked_fill(left_out_NV, -torch.inf)


def _inverse_sample(logits_NV: Tensor, uniform_N: Tensor, decoding: Decoding) -> Tensor:
    p_NV = torch.softmax(logits_NV, 1, dtype=torch.float64)
    index_NV = None
    if decoding.nucleus < 1 or decoding.top_k:
        p_NV, index_NV = torch.sort(p_NV, dim=1, descending=True, stable=True)
        p_NV = p_NV.masked_fill(_left_out(p_NV, decoding), 0.0)
    cumulative_NV = p_NV.cumsum(1)
    token_N1 = torch.searchsorted(cumulative_NV, uniform_N[:, None] * cumulative_NV[:, -1:], right=True).clamp_max(p_NV.shape[1] - 1)
    return (token_N1 if index_NV is None else index_NV.gather(1, token_N1))[:, 0]


def _left_out(falling_NV: Tensor, decoding: Decoding) -> Tensor:
    """bool [N, V]: which of the probabilities, sorted from the largest, are outside the nucleus or past top_k."""
    out_NV = torch.zeros_like(falling_NV, dtype=torch.bool)
    if decoding.nucleus < 1:
        out_NV = falling_NV.cumsum(1) - falling_NV >= decoding.nucleus
    if decoding.top_k:
        out_NV[:, decoding.top_k :] = True
    return out_NV
