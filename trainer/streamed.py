"""What noise does to a student, a chunk of the vocabulary at a time: softmax(g) W, and logits + scale g, with g made again in backward.

The noise itself has no gradient, so only W and scale need one, and both are sums over the vocabulary:

    out = sum_v r_v W_v / sum_v r_v, r = exp(g)        dW_v = r_v (d out / sum r)        d scale = sum_v d out_v g_v

Memory: one chunk [N, C] instead of two [N, V] that live until backward; time: the generator twice.
Shapes: N positions, V vocabulary, C a chunk of it, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from noise.decode import Noise

CHUNK_ENTRIES = {"cpu": 2**21, "cuda": 2**26}
"""Entries of noise at a time."""


def chunk(noise: Noise, device: torch.device) -> int:
    """C: as many entries as may be there at a time, in whole blocks of the stream; on a CPU a product is slow below 256 of them."""
    return max(256, CHUNK_ENTRIES.get(device.type, 2**24) // max(1, len(noise)) // 4 * 4)


def project(noise: Noise, weight_VH: Tensor, log_prior_V: Tensor | None = None) -> Tensor:
    """softmax(g [+ log prior]) W, float32 [N, H]; products in the weight's dtype, or autocast's."""
    projected: Tensor = _Project.apply(weight_VH, noise, log_prior_V)
    return projected


def add(logits_NV: Tensor, scale_N1: Tensor, noise: Noise) -> Tensor:
    """logits + scale g, float32 [N, V]."""
    summed: Tensor = _Add.apply(logits_NV, scale_N1, noise)
    return summed


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_VH: Tensor, noise: Noise, log_prior_V: Tensor | None) -> Tensor:
        ctx.product = torch.get_autocast_dtype(weight_VH.device.type) if torch.is_autocast_enabled(weight_VH.device.type) else weight_VH.dtype
        ctx.noise, ctx.ceiling_N = noise, noise.ceiling()
        ctx.prior_V = None if log_prior_V is None else log_prior_V.exp()
        out_NH = torch.zeros(len(noise), weight_VH.shape[1], device=weight_VH.device)
        total_N = torch.zeros(len(noise), device=weight_VH.device)
        for part, rate_NC in _rates(ctx):
            total_N += rate_NC.sum(1)
            out_NH += rate_NC.to(ctx.product) @ weight_VH[part].to(ctx.product)
        ctx.save_for_backward(total_N)
        ctx.like = weight_VH
        return out_NH.div_(total_N[:, None])

    @staticmethod
    def backward(ctx: Any, grad_NH: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (total_N,) = ctx.saved_tensors
        share_NH = (grad_NH / total_N[:, None]).to(ctx.product)
        grad_VH = torch.empty_like(ctx.like)
        for part, rate_NC in _rates(ctx):
            grad_VH[part] = rate_NC.to(ctx.product).T @ share_NH
        return grad_VH, None, None


def _rates(ctx: Any) -> Any:
    for part, rate_NC in ctx.noise.rates(chunk(ctx.noise, ctx.ceiling_N.device), ctx.ceiling_N):
        yield part, rate_NC if ctx.prior_V is None else rate_NC.mul_(ctx.prior_V[part])


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, scale_N1: Tensor, noise: Noise) -> Tensor:
        ctx.noise = noise
        out_NV = torch.empty_like(logits_NV)
        for part, g_NC in noise.chunks(chunk(noise, logits_NV.device)):
            torch.addcmul(logits_NV[:, part], scale_N1, g_NC, out=out_NV[:, part])
        return out_NV

    @staticmethod
    def backward(ctx: Any, grad_NV: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        scale_N1 = torch.zeros(len(ctx.noise), 1, device=grad_NV.device)
        for part, g_NC in ctx.noise.chunks(chunk(ctx.noise, grad_NV.device)):
            scale_N1 += (grad_NV[:, part] * g_NC).sum(1, keepdim=True)
        return grad_NV, scale_N1, None
