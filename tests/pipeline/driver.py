"""A driver in a process of its own, and kills at known places without clocks.

A driver reports to run.jsonl, which is a pipe here: the test reads it line by line, and a driver that is not read from waits.
"""

import ctypes
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.pipeline.world import environment

ONE_PAGE = 4096  # the smallest pipe: about ten events
SECONDS = 600.0
"""How long any one thing may take, on a machine with much else to do."""


LIBRARY = ctypes.CDLL(None)
SIGNAL_AT_PARENTS_DEATH = 1


def die_with_the_tests() -> None:
    """For `preexec_fn`: the process is killed when that of the tests ends, however it ends."""
    LIBRARY.prctl(SIGNAL_AT_PARENTS_DEATH, signal.SIGKILL)


class EndedError(AssertionError):
    """The process has ended, and everything that it wrote is read."""


def next_line(process: subprocess.Popen[Any], output: int) -> bytes:
    """The next line that a process writes to a pipe, read byte by byte so that nothing after it is lost. Raises EndedError."""
    line, end = b"", os.pidfd_open(process.pid) if process.poll() is None else None
    try:
        while not line.endswith(b"\n"):
            ready = select.select([output] if end is None else [output, end], [], [], SECONDS if end is not None else 0)[0]
            if output in ready and (byte := os.read(output, 1)):
                line += byte
            elif end is None or ready:
                raise EndedError(f"process {process.args} has ended with {process.wait(SECONDS)}")
            else:
                raise AssertionError(f"nothing happened in {SECONDS:.0f} s; what is waited for: a line of {process.args}")
        return line
    finally:
        if end is not None:
            os.close(end)


class Driver:
    """`python -m pipeline COMMAND` in a process of its own, whose run.jsonl is read event by event."""

    def __init__(self, arguments: list[str], events: int, variables: dict[str, str]):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", *arguments],
            env=environment() | variables,
            cwd=Path(__file__).parents[2],
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=die_with_the_tests,
        )
        self._events = events
        self.seen: list[dict[str, Any]] = []
        """All events so far."""

    def next(self, *kinds: str) -> dict[str, Any]:
        """The next event of a kind; those before it are left behind. Raises EndedError, with what the driver said, where there is none."""
        while True:
            try:
                self.seen.append(json.loads(next_line(self.process, self._events)))
            except EndedError as error:
                raise EndedError(f"{error} before an event {kinds}; it said:\n{self.process.communicate()[1]}") from None
            if self.seen[-1]["event"] in kinds:
                return self.seen[-1]

    def kill(self) -> None:
        """SIGKILL; what it had reported is read."""
        self.process.kill()
        self.process.wait()
        self._drain()

    def finish(self) -> int:
        """Its exit code, after the events that are left."""
        self._drain()
        return self.process.wait()

    def _drain(self) -> None:
        try:
            while True:
                self.seen.append(json.loads(next_line(self.process, self._events)))
        except EndedError:
            return


@contextmanager
def driver(dataset: Path, arguments: list[str], **variables: str) -> Iterator[Driver]:
    """A command that makes `dataset`, killed at the end if it is still there."""
    dataset.mkdir(exist_ok=True)
    os.mkfifo(dataset / "run.jsonl")
    events = os.open(dataset / "run.jsonl", os.O_RDWR)
    fcntl.fcntl(events, fcntl.F_SETPIPE_SZ, ONE_PAGE)
    running = Driver(arguments, events, variables)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.communicate()
        os.close(events)
        (dataset / "run.jsonl").unlink()
