"""Checkpoints of a run: safetensors + JSON in one folder that appears whole by a rename.

    checkpoints/000200/   model.safetensors  average.safetensors  optimizer.safetensors  state.json

Contract: continuing from a checkpoint gives the same bits as never having stopped (CPU, same number of processes). A process
killed at any moment leaves the checkpoints that stood: names change only when every file is on disk, and a step that is
written again (its first copy was made by the same run) waits as `000200.old` until the new one has its name.
state.json has the sha256 of each file; a checkpoint that is damaged is set aside as `000200.damaged`, and the one before continues.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from noise.storage import DatasetError, read_json, sha256_file, sync_folder, write_json
from trainer.students import load_tensors, save_tensors
from trainer.students.base import Base

_STANDING = re.compile(r"(\d+)(\.old)?")


@dataclass
class State:
    """What a checkpoint holds besides tensors."""

    step: int
    epoch: int
    consumed: int
    recipe: dict[str, Any]
    root_hash: str
    recent: list[float] = field(default_factory=list)
    """Losses a token of the last steps, which the next are held against."""
    heldout: dict[str, float] = field(default_factory=dict)
    """Figures of this very step, if it was evaluated."""
    files: dict[str, str] = field(default_factory=dict)
    """sha256 of each file of tensors."""
    order: str = ""
    """In which order the rows are read, in words; empty in checkpoints that are older than the field."""


def save(
    run: Path,
    state: State,
    student: Base,
    average: dict[str, Tensor] | None,
    optimizer: torch.optim.Optimizer,
    keep: int,
    best_by: str = "",
) -> None:
    """Write checkpoints/<step>, then drop all but the newest `keep` (0: none) and the best by a held-out figure, if one is named."""
    folder = run / "checkpoints" / f"{state.step:06d}"
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    parts = {"model": student.own_state(), "average": average, "optimizer": _optimizer_tensors(student, optimizer)}
    for name, tensors in parts.items():
        if tensors is not None:
            state.files[f"{name}.safetensors"] = save_tensors(temporary / f"{name}.safetensors", tensors)
    write_json(temporary / "state.json", vars(state))
    _give_name(temporary, folder)
    _drop(run, keep, best_by)


def _give_name(temporary: Path, folder: Path) -> None:
    """Rename; what has the name already stays readable until the new folder has it."""
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    temporary.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _drop(run: Path, keep: int, best_by: str) -> None:
    standing = checkpoints(run)
    wanted = {*standing[-keep:], best(run, best_by) if best_by else None} if keep else set(standing)
    for folder in list((run / "checkpoints").iterdir()):
        if folder not in wanted and not folder.name.endswith(".damaged"):
            gone = folder.with_name(folder.name + ".gone")  # half removed, it must not look finished
            shutil.rmtree(folder.replace(gone), ignore_errors=True)


def checkpoints(run: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found: dict[int, Path] = {}
    for path in sorted((run / "checkpoints").glob("*")):  # 000200 comes before 000200.old
        named = _STANDING.fullmatch(path.name)
        if named:
            found.setdefault(int(named[1]), path)
    return [found[step] for step in sorted(found)]


def step_of(folder: Path) -> int:
    return int(folder.name.partition(".")[0])


def best(run: Path, figure: str) -> Path | None:
    """The checkpoint with the least held-out figure of that name, the earliest of equals; None where no checkpoint has it."""
    judged = []
    for path in checkpoints(run):
        with contextlib.suppress(DatasetError, KeyError):
            judged.append((read_state(path).heldout[figure], path))
    return min(judged, key=lambda pair: pair[0])[1] if judged else None


def read_state(folder: Path) -> State:
    """Raises DatasetError that names the file where it is no state."""
    try:
        return State(**read_json(folder / "state.json"))
    except TypeError as error:
        raise DatasetError(f"{folder / 'state.json'} is not the state of a checkpoint ({error})") from None


def check(folder: Path) -> State:
    """The state of a checkpoint whose files are all as they were written; DatasetError that names the first that is not."""
    state = read_state(folder)
    for name, digest in state.files.items():
        path = folder / name
        if not path.exists():
            raise DatasetError(f"{path} does not exist")
        if sha256_file(path) != digest:
            raise DatasetError(f"{path} is damaged: its sha256 is not the one in state.json")
    return state


def newest(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and what to say of damaged ones, which are set aside.

    Raises DatasetError when there are checkpoints and none is whole: starting anew is for a person to decide.
    """
    said: list[str] = []
    for folder in reversed(checkpoints(run)):
        try:
            check(folder)
            return folder, said
        except DatasetError as error:
            said.append(f"checkpoint {folder.name} cannot be used ({error}); it is set aside as {folder.name}.damaged")
            aside = folder.with_name(folder.name + ".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
    if said:
        raise DatasetError("\n  ".join([f"no checkpoint of {run} is whole; remove the folder to train from the start:", *said]))
    return None, []


def restore(folder: Path, student: Base, optimizer: torch.optim.Optimizer) -> dict[str, Tensor] | None:
    """Load student and optimizer in place; returns the averaged weights if the run keeps them."""
    student.load_own_state(load_tensors(folder / "model.safetensors"))
    tensors = load_tensors(folder / "optimizer.safetensors")
    for name, parameter in student.named_parameters():
        prefix = f"{name}/"
        found = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
        if found:
            optimizer.state[parameter] = {key: value if key == "step" else value.to(parameter.device) for key, value in found.items()}
    path = folder / "average.safetensors"
    return load_tensors(path) if path.exists() else None


def _optimizer_tensors(student: Base, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    named = [(name, parameter) for name, parameter in student.named_parameters() if parameter.requires_grad]
    return {f"{name}/{key}": value for name, parameter in named for key, value in optimizer.state[parameter].items()}
