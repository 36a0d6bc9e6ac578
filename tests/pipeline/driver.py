"""A driver in a process of its own, and kills at known places without clocks.

A driver reports to run.jsonl, which is a pipe here: the test reads it line by line, and a driver that is not read from waits.
"""

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.pipeline.world import environment

ONE_PAGE = 4096  # the smallest pipe: about ten events


class Driver:
    """`python -m pipeline COMMAND` in a process of its own, whose run.jsonl is read event by event."""

    def __init__(self, arguments: list[str], events: int):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", *arguments],
            env=environment(),
            cwd=Path(__file__).parents[2],
            stderr=subprocess.PIPE,
            text=True,
        )
        self._events = os.fdopen(events, "rb", buffering=0)

    def next(self, kind: str) -> dict[str, Any]:
        """The next event of a kind; those before it are left behind."""
        while True:
            line = b""
            while not line.endswith(b"\n"):
                line += self._events.read(1)
            event: dict[str, Any] = json.loads(line)
            if event["event"] == kind:
                return event


@contextmanager
def driver(dataset: Path, arguments: list[str]) -> Iterator[Driver]:
    """A command that makes `dataset`, killed at the end if it is still there."""
    dataset.mkdir()
    os.mkfifo(dataset / "run.jsonl")
    events = os.open(dataset / "run.jsonl", os.O_RDWR)
    fcntl.fcntl(events, fcntl.F_SETPIPE_SZ, ONE_PAGE)
    running = Driver(arguments, events)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.communicate()
        (dataset / "run.jsonl").unlink()
