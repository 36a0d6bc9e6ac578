"""Which settings decide the numbers of a run, and the refusal to continue or overwrite another run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from noise.identity import differences
from noise.storage import DatasetError
from trainer.config import TrainConfig

FREE = (
    "output", "data", "device", "threads", "compile", "log_every", "eval_every", "eval_rows", "checkpoint_every", "keep_checkpoints", "keep_best",
    "tensorboard", "wandb", "optim.micro_batch", "optim.explode",
)  # fmt: skip
"""Settings that may change between a run and its resumption; the data are identified by their root hash."""


def recipe_of(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide the numbers of a run."""
    recipe: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    for name in FREE:
        *groups, last = name.split(".")
        inner = recipe
        for group in groups:
            inner = inner[group]
        inner.pop(last)
    if config.student.clip_search:  # evaluations then decide the mask rates of training
        recipe |= {"eval_every": config.eval_every, "eval_rows": config.eval_rows}
    return recipe


def refuse_other(where: Path, recipe: dict[str, Any], theirs: dict[str, Any], root_hash: str, their_root: Any) -> None:
    """DatasetError that names every field in which the run at `where` is another. A setting that it does not know had its default."""
    changed = differences(recipe, _filled(theirs, recipe_of(TrainConfig(output=""))))
    if root_hash != their_root:
        changed.append(f"dataset root_hash: {root_hash} here, {their_root} there")
    if changed:
        raise DatasetError(f"{where} holds another run:\n  " + "\n  ".join(changed) + "\nset another --output, or remove that folder")


def refuse_other_order(where: Path, order: str, theirs: str) -> None:
    """DatasetError where a run would go on in another order of rows, and so not see every row once."""
    if order != theirs:
        raise DatasetError(
            f"{where} reads its rows in another order: {order} here, {theirs or 'as an older version did'} there\n"
            "set data.window back, remove the checkpoints to start anew, or finish the run with the version that began it"
        )


def _filled(value: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    filled = defaults | value
    return {name: _filled(inner, defaults[name]) if isinstance(inner, dict) and isinstance(defaults.get(name), dict) else inner
            for name, inner in filled.items()}  # fmt: skip
