"""What a person sees while it runs, and what stays of it.

One live line on a terminal, a plain line every few seconds elsewhere (both on stderr); `RunLog` appends JSON lines to a file.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

SECONDS_BETWEEN_LINES = 10.0


def say(line: str) -> None:
    """A plain line for people, on stderr."""
    print(line, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"


class Progress:
    """`with Progress("extract", "shards", total=37, work=1e6) as progress: progress.advance(work=3e4, tokens=9000)`.

    Time left comes from the share of the work that is done, at the rate since the start of this run.
    """

    def __init__(self, stage: str, unit: str, total: int, work: float, done: int = 0, done_work: float = 0.0):
        self._stage, self._unit, self._total, self._work = stage, unit, total, max(work, 1.0)
        self._done, self._done_work, self._begun_work, self._tokens = done, done_work, done_work, 0
        self._began = self._printed = time.monotonic()
        self._note = ""
        self._live: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            with contextlib.suppress(ImportError):
                from rich.console import Console
                from rich.progress import BarColumn, TextColumn
                from rich.progress import Progress as Live

                self._live = Live(
                    TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"), console=Console(stderr=True), transient=True
                )
                self._live.start()
                self._task = self._live.add_task(self._stage, total=self._work, text="")
        self.show()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()
        say(f"{self._stage}: {self.text()}")

    def advance(self, items: int = 1, work: float = 0.0, tokens: int = 0) -> None:
        self._done, self._done_work, self._tokens = self._done + items, self._done_work + work, self._tokens + tokens
        self._note = ""
        self.show()

    def restart(self) -> None:
        """Measure rates from now on: what came before was preparation."""
        self._began, self._begun_work, self._tokens = time.monotonic(), self._done_work, 0

    def note(self, text: str) -> None:
        """What is being waited for, until the next advance."""
        self._note = text
        self.show()

    def show(self) -> None:
        now = time.monotonic()
        if self._live is not None:
            self._live.update(self._task, completed=self._done_work, text=self.text())
        elif now - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = now
            say(f"{self._stage}: {self.text()}")

    def text(self) -> str:
        elapsed = time.monotonic() - self._began
        parts = [f"{self._done:,}/{self._total:,} {self._unit}"]
        if self._tokens:
            parts.append(f"{self._tokens / max(elapsed, 1e-9):,.0f} tokens/s")
        if (here := self._done_work - self._begun_work) > 0 and self._done < self._total:
            parts.append(f"{duration(elapsed * (self._work - self._done_work) / here)} left")
        elif self._done >= self._total:
            parts.append(f"in {duration(elapsed)}")
        return ", ".join(parts + ([self._note] if self._note else []))


class RunLog:
    """run.jsonl of a dataset: timings, hosts, retries; outside identity, hashes and manifest."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "run.jsonl"

    def write(self, event: str, **fields: Any) -> None:
        line = json.dumps({"event": event, "time": round(time.time(), 3), "host": socket.gethostname(), **fields}, sort_keys=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
