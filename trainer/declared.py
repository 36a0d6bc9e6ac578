"""A student is as large as its weights: what student.json says is held against the tensors beside it before anything is built."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from noise.storage import brief

SLACK = 2**24
"""Entries that a network may have beyond eight times those of its file: buffers, and weights that are shared or found elsewhere."""


def refuse_larger(settings: dict[str, Any], vocab_size: Any, block_length: Any, weights: dict[str, Tensor]) -> None:
    """Raises ValueError for sizes that are no sizes, or would take far more memory than the weights have."""
    noise = vars(settings["noise"])
    sizes = {name: settings.get(name, 0) for name in ("layers", "hidden", "heads", "mlp", "block_size", "predict")}
    sizes |= {"vocab_size": vocab_size, "block_length": block_length, "noise.rank": noise["rank"]}
    sizes |= {f"medusa.{name}": value for name, value in vars(settings["medusa"]).items() if isinstance(value, int)}
    for name, value in sizes.items():
        if not isinstance(value, int) or not 0 <= value < 2**32:
            raise ValueError(f"{name} is {brief(value)}")
    layers, hidden = sizes["layers"], sizes["hidden"]
    entries = layers * hidden * (hidden + sizes["mlp"]) + vocab_size * (hidden + sizes["noise.rank"])
    there = sum(tensor.numel() for tensor in weights.values())
    deepest = max(layers, len(noise["drafts"]), *(value for name, value in sizes.items() if name.startswith("medusa.") and "head" in name), 0)
    if settings.get("kind") != "medusa" and (entries > 8 * there + SLACK or block_length > 2**24):
        raise ValueError(f"it would have {entries:,} weights and more, its file has {there:,}")
    if deepest > len(weights) + 64:
        raise ValueError(f"it would have {deepest:,} layers or heads, its file has {len(weights)} tensors")
