"""Checkpoints of a run: safetensors + JSON in one folder that appears whole by a rename.

    checkpoints/000200/   model.safetensors  average.safetensors  optimizer.safetensors  state.json

Contract: continuing from a checkpoint gives the same bits as never having stopped (CPU, same number of processes).
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from noise.storage import read_json, write_json
from trainer.students import load_tensors, save_tensors


@dataclass
class State:
    """What a checkpoint holds besides tensors."""

    step: int
    epoch: int
    consumed: int
    recipe: dict[str, Any]
    root_hash: str


def save(run: Path, state: State, student: nn.Module, average: dict[str, Tensor] | None, optimizer: torch.optim.Optimizer, keep: int) -> None:
    """Write checkpoints/<step> atomically, then drop all but the newest `keep`."""
    folder = run / "checkpoints" / f"{state.step:06d}"
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_tensors(temporary / "model.safetensors", student.state_dict())
    if average is not None:
        save_tensors(temporary / "average.safetensors", average)
    save_tensors(temporary / "optimizer.safetensors", _optimizer_tensors(student, optimizer))
    write_json(temporary / "state.json", vars(state))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    for old in checkpoints(run)[:-keep] if keep else []:
        shutil.rmtree(old, ignore_errors=True)


def checkpoints(run: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    folder = run / "checkpoints"
    return sorted((path for path in folder.glob("*") if path.name.isdigit()), key=lambda path: int(path.name)) if folder.exists() else []


def read_state(folder: Path) -> State:
    return State(**read_json(folder / "state.json"))


def restore(folder: Path, student: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor] | None:
    """Load student and optimizer in place; returns the averaged weights if the run keeps them."""
    student.load_state_dict(load_tensors(folder / "model.safetensors"))
    tensors = load_tensors(folder / "optimizer.safetensors")
    for name, parameter in student.named_parameters():
        prefix = f"{name}/"
        found = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
        if found:
            optimizer.state[parameter] = {key: value if key == "step" else value.to(parameter.device) for key, value in found.items()}
    path = folder / "average.safetensors"
    return load_tensors(path) if path.exists() else None


def _optimizer_tensors(student: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {f"{name}/{key}": value for name, parameter in student.named_parameters() for key, value in optimizer.state[parameter].items()}
