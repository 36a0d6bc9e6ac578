"""The dataset's noise with another marginal: the same coupling, seen through the noise's own distribution function.

    u = F(g) = exp(-a), a = exp(-g)            uniform on (0, 1)
    z = Phi^-1(u)                              standard normal

Both rise with g, so every order and every dependence on the text is that of the Gumbel noise; only the shape differs. (The
published ablation draws its Gaussian afresh, which tells nothing of the text, as `independent` does here with Gumbel noise, and
applies its uniform in sampling alone.) A student takes the softmax of z or u where it takes that of g. Sampling draws the stream's
Gumbel and maps it in the same place, `conditioning.given`, so training, probe and sampling cannot differ.

Numerics: what is near 1 is not held as u. The smaller tail's logarithm is, so z keeps its digits wherever a is finite:

    log u = -a        log (1 - u) = log(-expm1(-a)), which is -g - a/2 + a^2/24 for small a
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from noise.decode import Noise

MAPPED = ("gaussian", "uniform")
"""The kinds of noise that are not Gumbel."""

_AT_ONCE = 2**22  # entries whose intermediate values are there together
_SMALL = 2.0**-12
_FAR = -50.0  # below it exp leaves float32, and the tail is found from its logarithm


@dataclass(frozen=True)
class Mapped(Noise):
    """Unmade noise whose entries are seen through another marginal, chunk by chunk."""

    kind: str

    @classmethod
    def of(cls, noise: Noise, kind: str) -> Mapped:
        return cls(**{field.name: getattr(noise, field.name) for field in fields(Noise)}, kind=kind)

    def dense(self) -> Tensor:
        return seen(super().dense(), self.kind)

    def chunks(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        for part, g_NC in super().chunks(size):
            yield part, seen(g_NC, self.kind)

    def ceiling(self) -> Tensor:
        """0: z grows as sqrt(2 g) and u stays below 1, so their exponentials do not overflow."""
        return torch.zeros(len(self), device=self.rows_N5.device)

    def rates(self, size: int, ceiling_N: Tensor) -> Iterator[tuple[slice, Tensor]]:
        for part, z_NC in self.chunks(size):
            yield part, z_NC.sub_(ceiling_N[:, None]).exp_()


def seen(g_NV: Tensor, kind: str) -> Tensor:
    """Gumbel noise g through the marginal of this kind of noise: same shape and dtype, finite, rising with g; Gumbel itself as it is."""
    if kind not in MAPPED:
        return g_NV
    mapped = gaussian if kind == "gaussian" else uniform
    out_NV = torch.empty_like(g_NV)
    rows = max(1, _AT_ONCE // max(1, g_NV[:1].numel()))
    for part_nV, into_nV in zip(g_NV.split(rows), out_NV.split(rows), strict=True):
        into_nV.copy_(mapped(part_nV))
    return out_NV


def tempered(g: Tensor, kind: str, temperature: float) -> Tensor:
    """The Gumbel noise that is seen as `temperature` times what g is seen as: what a sampler gives to its student.

    Raises ValueError for uniform noise and a temperature above 1, which no u in (0, 1) is seen as.
    """
    if temperature == 1:
        return g
    if kind == "gaussian":
        z = temperature * gaussian(g)  # above 10, -log Phi(z) is Phi(-z), of which the logarithm never underflows
        return torch.where(z > 10, -torch.special.log_ndtr(-z), -torch.log(-torch.special.log_ndtr(z)))
    if kind != "uniform":
        return g * temperature
    if temperature > 1:
        raise ValueError(f"noise_temperature is {temperature}, but uniform noise stays below 1; give at most 1")
    return -torch.log(torch.exp(-g) - math.log(temperature))


def uniform(g: Tensor) -> Tensor:
    """exp(-exp(-g))."""
    return torch.exp(-torch.exp(-g))


def gaussian(g: Tensor) -> Tensor:
    """Phi^-1(exp(-exp(-g)))."""
    a = torch.exp(-g)
    upper = a < math.log(2)
    log_upper = torch.where(a < _SMALL, -g - a / 2 + a * a / 24, torch.log(-torch.expm1(-a)))
    z = normal_quantile(torch.where(upper, log_upper, -a))
    return torch.where(upper, -z, z)


def normal_quantile(log_p: Tensor) -> Tensor:
    """z with log Phi(z) = log_p <= log(1/2); far below by Newton on log Phi(z) = log(erfcx(-z / sqrt 2) / 2) - z^2 / 2."""
    z = torch.special.ndtri(log_p.exp())
    far = log_p < _FAR
    if bool(far.any()):
        y = log_p[far]
        s = torch.sqrt(-2 * y - torch.log(-4 * math.pi * y))  # s = -z, from the tail's first term
        for _ in range(3):
            e = torch.special.erfcx(s / math.sqrt(2))
            s = s + (torch.log(e / 2) - s * s / 2 - y) * e * math.sqrt(math.pi / 2)
        z[far] = -s
    return z
