"""Reads weights that others wrote: safetensors (whole or sharded), Lightning `.ckpt`, `.bin`; never runs what a file says.

A pickle may hold a run's settings and tokenizer beside its tensors. They are read as inert placeholders; a file that wants more is refused.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from noise.storage import DatasetError, read_json
from trainer.published import ema_weights
from trainer.students import load_tensors


@dataclass
class Weights:
    """Tensors by their names in the file, and what to say of them."""

    tensors: dict[str, Tensor]
    folder: Path
    """Where settings and a tokenizer may lie beside them."""
    said: list[str] = field(default_factory=list)


def locate(where: str) -> Path:
    """A folder or file here, else the hub's copy of a model by its id. Raises DatasetError."""
    path = Path(where)
    if path.exists():
        return path
    reason = "it is no hub id either (owner/name)"
    if where.count("/") == 1 and not where.startswith((".", "/")):
        try:
            from huggingface_hub import snapshot_download

            return Path(snapshot_download(where, allow_patterns=["*.safetensors", "*.bin", "*.json", "*.txt"]))
        except Exception as error:  # the hub's client raises errors of several libraries
            reason = f"the hub did not give it ({type(error).__name__})"
    raise DatasetError(f"student.init_from {where!r} is neither a folder nor a file here (working folder {Path.cwd()}), and {reason}")


def read(path: Path) -> Weights:
    """The weights at a path. Averaged ones are preferred where both are there. Raises DatasetError for people."""
    if path.is_file():
        return Weights(load_tensors(path), path.parent) if path.suffix == ".safetensors" else _pickled(path)
    if (path / "model.safetensors.index.json").exists():
        files = sorted(set(read_json(path / "model.safetensors.index.json")["weight_map"].values()))
        return Weights({name: tensor for file in files for name, tensor in load_tensors(path / file).items()}, path)
    if (path / "model.safetensors").exists():
        weights = Weights(load_tensors(path / "model.safetensors"), path)
        if (path / "average.safetensors").exists():
            weights.tensors |= load_tensors(path / "average.safetensors")
            weights.said.append("  the averaged weights of the checkpoint are used")
        return weights
    others = sorted([*path.glob("*.ckpt"), *path.glob("pytorch_model.bin")])
    if len(others) != 1:
        raise DatasetError(f"{path} has no model.safetensors, and {len(others)} other checkpoints; name one file in student.init_from")
    return _pickled(others[0])


class _Inert:
    """Stands for an object of somebody's class; keeps nothing and does nothing."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def _pickled(path: Path) -> Weights:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        placeholders: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [(_Inert, name) for name in names]
        with torch.serialization.safe_globals(placeholders):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DatasetError(
            f"{path} cannot be read without running code from it, or is damaged: {reason[0]}; save its weights as safetensors"
        ) from None
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise DatasetError(f"{path} holds no tensors by name")
    weights = Weights(tensors, path.parent)
    ema = content.get("ema")
    if isinstance(ema, dict) and isinstance(ema.get("shadow_params"), list):
        averaged = ema_weights(tensors, ema["shadow_params"])
        weights.tensors |= averaged or {}
        weights.said.append(
            f"  the averaged weights (EMA) of {len(averaged)} tensors are used"
            if averaged
            else "  its averaged weights (EMA) do not fit its own state, so they are left out"
        )
    return weights
