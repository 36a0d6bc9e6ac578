"""Published MDLM and BD3-LM networks (arXiv 2406.07524, 2503.09573) as weights of `dit.DiT`.

They modulate by a vector c = SiLU(sigma_map(sigma)): x -> (1 + scale(c)) LayerNorm(x) + shift(c) before a branch, gate(c) times its output.
Without time conditioning sigma is 0 always, so scale, shift and gate are constants, and these are the same function:

    norm.weight (1 + scale)      norm.bias = shift      rows of the branch's last product, and its bias, times gate

A network that was trained with time conditioning is taken at sigma 0. One without modulation (no adaLN) is taken as it is.
Shapes: H hidden, C width of c.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor

EMBEDDING = "vocab_embed.embedding"
PARTS = (EMBEDDING, "sigma_map.", "blocks.", "output_layer.")
_FREQUENCIES = 256


def is_published(weights: dict[str, Tensor]) -> bool:
    return any(name.removeprefix("backbone.") == EMBEDDING for name in weights)


def fold(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """(weights under DiT's names, float32, and what to say of them)."""
    given = {name.removeprefix("backbone."): tensor.float() for name, tensor in weights.items()}
    c_C = _condition(given)
    folded = {"model.embed_tokens.weight": given.pop(EMBEDDING)}
    for number in sorted({int(match[1]) for name in given if (match := re.match(r"blocks\.(\d+)\.", name))}):
        folded |= _block(given, f"blocks.{number}.", f"model.layers.{number}.", c_C)
    shift_H, scale_H = _modulation(given, "output_layer.", c_C, 2, len(given["output_layer.norm_final.weight"]))
    folded["model.norm.weight"] = given["output_layer.norm_final.weight"] * (1 + scale_H)
    folded["model.norm.bias"] = shift_H
    folded["model.output.weight"] = given["output_layer.linear.weight"]
    folded["model.output.bias"] = given.get("output_layer.linear.bias", torch.zeros(len(given["output_layer.linear.weight"])))
    said = ["  its modulation (adaLN) at sigma 0 is folded into norms and output weights: the same function without time conditioning"]
    return folded, said if c_C is not None else []


def _condition(given: dict[str, Tensor]) -> Tensor | None:
    """c at sigma = 0, where the sinusoids are ones (cosines), then zeros (sines)."""
    if "sigma_map.mlp.0.weight" not in given:
        return None
    sinusoids = torch.cat((torch.ones(_FREQUENCIES // 2), torch.zeros(_FREQUENCIES // 2)))
    inner = F.silu(F.linear(sinusoids, given["sigma_map.mlp.0.weight"], given["sigma_map.mlp.0.bias"]))
    return F.silu(F.linear(inner, given["sigma_map.mlp.2.weight"], given["sigma_map.mlp.2.bias"]))


def _modulation(given: dict[str, Tensor], prefix: str, c_C: Tensor | None, parts: int, hidden: int) -> tuple[Tensor, ...]:
    """shift, scale and gate of each branch, [H] each; those that change nothing where there is no modulation."""
    if c_C is None or f"{prefix}adaLN_modulation.weight" not in given:
        return tuple(torch.full((hidden,), float(part % 3 == 2)) for part in range(parts))
    return F.linear(c_C, given[f"{prefix}adaLN_modulation.weight"], given[f"{prefix}adaLN_modulation.bias"]).chunk(parts)


def _block(given: dict[str, Tensor], theirs: str, ours: str, c_C: Tensor | None) -> dict[str, Tensor]:
    norm1_H = given[f"{theirs}norm1.weight"]
    shift1_H, scale1_H, gate1_H, shift2_H, scale2_H, gate2_H = _modulation(given, theirs, c_C, 6, len(norm1_H))
    return {
        f"{ours}norm1.weight": norm1_H * (1 + scale1_H),
        f"{ours}norm1.bias": shift1_H,
        f"{ours}attn_qkv.weight": given[f"{theirs}attn_qkv.weight"],
        f"{ours}attn_out.weight": given[f"{theirs}attn_out.weight"] * gate1_H[:, None],
        f"{ours}norm2.weight": given[f"{theirs}norm2.weight"] * (1 + scale2_H),
        f"{ours}norm2.bias": shift2_H,
        f"{ours}mlp.0.weight": given[f"{theirs}mlp.0.weight"],
        f"{ours}mlp.0.bias": given[f"{theirs}mlp.0.bias"],
        f"{ours}mlp.2.weight": given[f"{theirs}mlp.2.weight"] * gate2_H[:, None],
        f"{ours}mlp.2.bias": given[f"{theirs}mlp.2.bias"] * gate2_H,
    }


def ema_weights(state: dict[str, Tensor], shadow: list[Tensor]) -> dict[str, Tensor] | None:
    """The averaged weights of a Lightning checkpoint, whose list holds them in the order of the network's parameters; None where they do not fit.

    Buffers stand between the parameters in the state and are no part of the list: a name whose shape is not the next one's is a buffer.
    """
    averaged, rest = {}, list(shadow)
    for name, tensor in state.items():
        if rest and tensor.shape == rest[0].shape:
            averaged[name] = rest.pop(0)
    return None if rest else averaged
