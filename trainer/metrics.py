"""Figures of a run: one JSON object a line in metrics.jsonl, the same in TensorBoard and Weights & Biases, and a line for people."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from noise.storage import sha256_text, write_text
from trainer.config import TrainConfig
from trainer.distributed import World
from trainer.recipe import recipe_of


class Metrics:
    """Writes on rank 0 only. After a resume, lines past the resumed step are dropped; the next line averages the steps since the resume."""

    def __init__(self, folder: Path, first_step: int, config: TrainConfig, active: bool):
        self._active, self._steps, self._first = active, config.optim.steps, first_step
        self._started = time.monotonic()
        self._name = folder.name
        self._board: Any = None
        self._wandb: Any = None
        if not active:
            return
        path = folder / "metrics.jsonl"
        kept = [line for line in path.read_text().splitlines() if _step(line) <= first_step] if path.exists() else []
        write_text(path, "".join(line + "\n" for line in kept))
        self._file = path.open("a")
        if config.tensorboard:
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        if config.wandb:
            self._wandb = _wandb().init(
                project=config.wandb, name=folder.name, id=_run_id(folder, config), resume="allow", dir=str(folder), config=recipe_of(config)
            )

    def log(self, step: int, group: str, figures: dict[str, float]) -> None:
        """Figures of one step; the group (train, heldout) prefixes their names."""
        if not self._active:
            return
        self._file.write(json.dumps({"step": step, **{f"{group}/{name}": value for name, value in figures.items()}}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(f"{group}/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log({f"{group}/{name}": value for name, value in figures.items()}, step=step)

    def show(self, step: int, figures: dict[str, float], names: list[str]) -> None:
        """The line for people: step, the named figures, share of time spent waiting for data, time left. Rewritten in place on a terminal."""
        if not self._active:
            return
        elapsed = time.monotonic() - self._started
        left = elapsed / max(1, step - self._first) * (self._steps - step)
        text = (
            f"{self._name}  step {step}/{self._steps}  "
            + "  ".join(f"{name} {_short(figures[name])}" for name in names)
            + f"  waiting for data {figures['waiting']:.0%}  left {_clock(left)}"
        )
        live = sys.stderr.isatty()
        print(("\r\x1b[K" if live else "") + text, end="" if live and step < self._steps else "\n", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        if self._active:
            print(("\r\x1b[K" if sys.stderr.isatty() else "") + text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._active:
            self._file.close()
            if self._board is not None:
                self._board.close()
            if self._wandb is not None:
                self._wandb.finish()


class Window:
    """Sums of the figures, on the device, and the clock, since the last logged line."""

    def __init__(self, names: list[str], world: World):
        self._names, self._world = names, world
        self._clear()

    def _clear(self) -> None:
        self._sums = torch.zeros(len(self._names), dtype=torch.float64, device=self._world.device)
        self._since, self._waited, self.tokens = time.monotonic(), 0.0, 0

    def add(self, figures: dict[str, Tensor]) -> None:
        self._sums += torch.stack([figures[name].double() for name in self._names])

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        before = time.monotonic()
        yield
        self._waited += time.monotonic() - before

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """What is done within is not training, and its time not counted."""
        before = time.monotonic()
        yield
        self._since += time.monotonic() - before

    def figures(self) -> dict[str, float]:
        """Means a token, tokens a second, and the share of time that processes waited for data: an upper bound of what a GPU idled for it,
        since a GPU may still compute meanwhile. The device is waited for first, so that the clock counts work that is done."""
        sums = self._sums.tolist()
        elapsed = time.monotonic() - self._since
        *values, waited = self._world.sum([*sums, self._waited / elapsed / self._world.size])
        figures = {name: value / self.tokens for name, value in zip(self._names, values, strict=True)}
        figures |= {"tokens/s": self.tokens / elapsed, "waiting": waited}
        if self._world.device.type == "cuda":
            figures["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self._clear()
        return figures


def check_wandb(config: TrainConfig) -> None:
    """Raises ValueError, before anything is trained, where Weights & Biases is asked for and absent."""
    if config.wandb:
        _wandb()


def _wandb() -> Any:
    try:
        import wandb
    except ImportError:
        raise ValueError('wandb is set, but Weights & Biases is not installed; pip install wandb, or set wandb to ""') from None
    return wandb


def _run_id(folder: Path, config: TrainConfig) -> str:
    """The same for a run and its resumption: from the folder's place and the settings that decide its numbers."""
    return sha256_text(json.dumps([str(folder.resolve()), recipe_of(config)], sort_keys=True))[:16]


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return sys.maxsize  # a line cut off by a kill


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
