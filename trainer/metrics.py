"""Figures of a run: one JSON object a line in metrics.jsonl, the same in TensorBoard, and a line for people."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from noise.storage import write_text


class Metrics:
    """Writes on rank 0 only. After a resume, lines past the resumed step are dropped; the next line averages the steps since the resume."""

    def __init__(self, folder: Path, first_step: int, steps: int, tensorboard: bool, active: bool):
        self._active, self._steps, self._first = active, steps, first_step
        self._started = time.monotonic()
        self._name = folder.name
        self._board: Any = None
        if not active:
            return
        path = folder / "metrics.jsonl"
        kept = [line for line in path.read_text().splitlines() if _step(line) <= first_step] if path.exists() else []
        write_text(path, "".join(line + "\n" for line in kept))
        self._file = path.open("a")
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def log(self, step: int, group: str, figures: dict[str, float]) -> None:
        """Figures of one step; the group (train, heldout) prefixes their names."""
        if not self._active:
            return
        self._file.write(json.dumps({"step": step, **{f"{group}/{name}": value for name, value in figures.items()}}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(f"{group}/{name}", value, step)

    def show(self, step: int, figures: dict[str, float]) -> None:
        """The line for people: step, figures, time left. Rewritten in place on a terminal."""
        if not self._active:
            return
        elapsed = time.monotonic() - self._started
        left = elapsed / max(1, step - self._first) * (self._steps - step)
        text = (
            f"{self._name}  step {step}/{self._steps}  "
            + "  ".join(f"{name} {_short(value)}" for name, value in figures.items())
            + f"  left {_clock(left)}"
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
