"""How far an evaluation is and how long it still takes: a bar on a terminal, a line for each finished piece elsewhere."""

from __future__ import annotations

import sys
import time


class Progress:
    """Counts units of work, about one forward of one sequence each; speaks on stderr."""

    def __init__(self, total: int, active: bool = True):
        self._total, self._done, self._worked = max(1, total), 0, 0
        self._active, self._live = active, sys.stderr.isatty()
        self._started = self._said = time.monotonic()
        self._text = ""

    def begin(self, text: str) -> None:
        self._text = text
        self._show()

    def advance(self, items: int, each: int = 1) -> None:
        """`items` are done, of so many units each."""
        self._done += items * each
        self._worked += items * each
        self._show()

    def skip(self, items: int, each: int = 1) -> None:
        """Work that an earlier run did: it counts as done but says nothing of the speed."""
        self._done += items * each

    def close(self) -> None:
        if self._active and self._live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def _show(self) -> None:
        now = time.monotonic()
        if not self._active or now - self._said < (0.2 if self._live else 10):
            return
        self._said = now
        left = (now - self._started) / self._worked * (self._total - self._done) if self._worked else None
        text = f"evaluation {min(1.0, self._done / self._total):4.0%}  {self._text}" + (f"  left {_clock(left)}" if left is not None else "")
        print(("\r\x1b[K" if self._live else "") + text, end="" if self._live else "\n", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
