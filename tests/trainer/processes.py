"""Real training processes, forked from a server that has imported torch, so that a test can afford to kill many of them."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch
from torch.distributed import TCPStore

from trainer.__main__ import main
from trainer.guard import Guard

Prepare = Callable[[int], None]
"""Runs in a process before its training does, with its rank."""
FILE_OPERATIONS = ("fsync", "rename", "replace", "unlink", "rmdir")


@dataclass
class Ended:
    """Exit status (negative: the signal that ended it) and what the process said."""

    status: int
    said: str


def run(arguments: list[str], folder: Path, size: int = 1, prepare: Prepare | None = None) -> list[Ended]:
    """Train in `size` processes to the end of each, in rank order. No test waits for them longer than ten minutes each."""
    with training(arguments, folder, size, prepare) as processes:
        for process in processes:
            process.join(600)
        assert all(process.exitcode is not None for process in processes), "a process hangs"
    return [Ended(process.exitcode, _log(folder, rank).read_text()) for rank, process in enumerate(processes)]


@contextlib.contextmanager
def training(arguments: list[str], folder: Path, size: int = 1, prepare: Prepare | None = None) -> Iterator[list[ForkServerProcess]]:
    """Processes that train; what is left of them at the end is killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.trainer.preload", __name__])
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if size > 1 else None
    processes = [context.Process(target=_train, args=(arguments, folder, rank, size, store and store.port, prepare)) for rank in range(size)]
    try:
        for process in processes:
            process.start()
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def _log(folder: Path, rank: int) -> Path:
    return folder / f"said.{rank}"


def _train(arguments: list[str], folder: Path, rank: int, size: int, port: int | None, prepare: Prepare | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    said = _log(folder, rank).open("w")
    os.dup2(said.fileno(), 2)
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 - the process's own
    torch.set_num_threads(1)
    if size > 1:
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True", "RANK": str(rank), "WORLD_SIZE": str(size),
            "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size),
        }  # fmt: skip
    if prepare is not None:
        prepare(rank)
    status = main(arguments)
    sys.stderr.flush()
    sys.exit(status)


@dataclass(frozen=True)
class DieAtFileOperation:
    """SIGKILL to itself at the n-th file operation, before it or after it."""

    number: int
    after: bool
    on: int = 0

    def __call__(self, rank: int) -> None:
        if rank != self.on:
            return
        count = itertools.count(1)

        def dying(operation: Callable[..., object]) -> Callable[..., object]:
            def counted(*args: object, **more: object) -> object:
                last = next(count) == self.number
                if last and not self.after:
                    os.kill(os.getpid(), signal.SIGKILL)
                value = operation(*args, **more)
                if last:
                    os.kill(os.getpid(), signal.SIGKILL)
                return value

            return counted

        for name in FILE_OPERATIONS:
            setattr(os, name, dying(getattr(os, name)))


@dataclass(frozen=True)
class Terminated:
    """SIGTERM to one process, after the update of a step."""

    step: int
    on: int

    def __call__(self, rank: int) -> None:
        if rank != self.on:
            return
        watch = Guard.watch

        def watched(self: Guard, step: int, *rest: object) -> None:
            watch(self, step, *rest)
            if step == at:
                os.kill(os.getpid(), signal.SIGTERM)

        at = self.step
        Guard.watch = watched


@dataclass(frozen=True)
class RunOutOfMemory:
    """In one method of one process, after some calls that had enough."""

    owner: type
    method: str
    calls: int
    on: int

    def __call__(self, rank: int) -> None:
        if rank != self.on:
            return
        count, enough = itertools.count(1), getattr(self.owner, self.method)

        def short(*args: object, **more: object) -> object:
            if next(count) > self.calls:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
            return enough(*args, **more)

        setattr(self.owner, self.method, short)
