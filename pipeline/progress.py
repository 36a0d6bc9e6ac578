"""What a person sees while it runs.

One live line on a terminal, a plain line every few seconds elsewhere, both on stderr; `run_log` keeps the rest.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from types import TracebackType
from typing import Any

from noise.secrets import redacted

SECONDS_BETWEEN_LINES = 10.0
SECONDS_OF_NOW = 60.0
"""What the rate now is measured over, or from one item to the next where items take longer."""


def say(line: str) -> None:
    """A plain line for people, on stderr."""
    print(printable(line), file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Text of anyone's, as a terminal may show it: without secrets, and what is not printable (escapes, changes of direction) spelled."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in redacted(text))


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
        self._done, self._done_work, self._begun_work, self._tokens, self._retried = done, done_work, done_work, 0, 0
        self._began = self._printed = time.monotonic()
        self._lately = deque([(self._began, 0)])
        self._note = ""
        self._warned = False
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
        self._lately.append((time.monotonic(), self._tokens))
        while len(self._lately) > 2 and self._lately[1][0] < self._lately[-1][0] - SECONDS_OF_NOW:
            self._lately.popleft()
        self._note = ""
        self.show()

    def retry(self, items: int = 1) -> None:
        """So many items are done again."""
        self._retried += items
        self.show()

    def restart(self) -> None:
        """Measure rates from now on, where nothing was done yet: what came before was preparation."""
        if self._done_work == self._begun_work:
            self._began = time.monotonic()
            self._lately = deque([(self._began, 0)])

    def note(self, text: str) -> None:
        """What is being waited for, until the next advance."""
        self._note = text
        self.show()

    def warn(self, line: str, once: bool = True) -> None:
        """A line that stays; the first of its kind alone if `once`."""
        if not (once and self._warned):
            (self._live.console.print if self._live is not None else say)(f"{self._stage}: {line}")
        self._warned = self._warned or once

    def show(self) -> None:
        now = time.monotonic()
        if self._live is not None:
            self._live.update(self._task, completed=self._done_work, text=self.text())
        elif now - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = now
            say(f"{self._stage}: {self.text()}")

    def text(self) -> str:
        elapsed, left = time.monotonic() - self._began, self._total - self._done
        retried = f"{self._retried:,} retried" if self._retried else ""
        state = ", ".join(part for part in (retried, f"{left:,} left" if left else "") if part)
        parts = [f"{self._done:,}/{self._total:,} {self._unit}" + (f" ({state})" if state else "")]
        if self._tokens:
            overall = f"{self._tokens / max(elapsed, 1e-9):,.0f}"
            (before, then), (now, tokens) = self._lately[0], self._lately[-1]
            parts.append(f"{(tokens - then) / max(now - before, 1e-9):,.0f} tokens/s, {overall} overall" if left else f"{overall} tokens/s")
        if (here := self._done_work - self._begun_work) > 0 and left:
            parts.append(f"{duration(elapsed * (self._work - self._done_work) / here)} to go")
        elif not left:
            parts.append(f"in {duration(elapsed)}")
        return ", ".join(parts + ([self._note] if self._note else []))
