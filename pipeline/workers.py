"""All shards of a dataset on Ray: one actor per GPU or share of CPUs, each with its own teacher.

The shard is the unit of work and of retry. A worker that dies takes at most the shards it was given; they go to another
worker, a bounded number of times. A shard that fails by its data fails once, is reported, and stops nothing else.
Nothing here decides a byte of the dataset.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from noise.dataset import Plan, Receipt
from noise.storage import DatasetError
from pipeline.config import Work, WorkError
from pipeline.extract import Job
from pipeline.generate import Generation
from pipeline.plan import corpus_of, documents_apart
from pipeline.progress import Progress, RunLog
from pipeline.tokenizer import Tokenizer

IN_FLIGHT = 2
"""Shards that a worker holds: one it works on, one that waits."""
STARTS = 3
"""Attempts to start a local Ray."""
OBJECT_STORE_BYTES = 100 * 2**20  # only receipts travel


@dataclass(frozen=True)
class Outcome:
    """What a worker says of one shard, or of loading its teacher."""

    receipt: Receipt | None = None
    failure: str = ""
    fatal: bool = False
    """The failure is of the machine or the whole job, not of this shard's data."""
    seconds: float = 0.0
    host: str = ""
    pid: int = 0


class Worker:
    """The body of an actor."""

    def __init__(self, recipe: Work, roots: list[str]):
        self._recipe, self._roots = recipe, roots

    def load(self) -> Outcome:
        """Read plan, tokenizer and teacher."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        try:
            folder = Path(self._recipe.output)
            plan = Plan.read(folder)
            import torch

            from pipeline.teacher import Teacher

            torch.set_num_threads(self._recipe.teacher.threads)
            device = "cuda" if torch.cuda.is_available() else "cpu"
            teacher = Teacher(self._recipe.teacher, plan.identity["vocab_size"], device, documents_apart(plan.identity))
            kind = Generation if plan.identity["extraction"] == "sequential" else Job
            self._job = kind(folder, plan, corpus_of(self._recipe, plan, self._roots), Tokenizer(folder / "tokenizer"), teacher)
        except (DatasetError, OSError) as error:
            return Outcome(failure=str(error), fatal=True)
        return Outcome()

    def extract(self, shard: int) -> Outcome:
        import socket

        began = time.monotonic()
        try:
            receipt = self._job.extract(shard)
        except OSError as error:
            return Outcome(failure=f"shard {shard}: {error.strerror or error}", fatal=True)
        except ValueError as error:
            return Outcome(failure=str(error))
        return Outcome(receipt, seconds=round(time.monotonic() - began, 3), host=socket.gethostname(), pid=os.getpid())


def extract(recipe: Work, job: Job, pending: list[int], progress: Progress, log: RunLog) -> dict[int, str]:
    """Make the pending shards, by extraction or generation as the job is; returns why each that failed did.

    Raises WorkError when no worker can load the teacher, workers keep dying, or the disk is full.
    """
    with cluster(recipe, len(pending)) as count:
        return Driver(_absolute(recipe, job), job, progress, log).run(pending, count)


def _absolute(recipe: Work, job: Job) -> Work:
    """The recipe as workers need it: no relative path, the hub's revision pinned."""
    teacher = recipe.teacher
    assert teacher.model is not None
    if Path(teacher.model).is_dir():
        teacher = replace(teacher, model=str(Path(teacher.model).resolve()))
    else:
        teacher = replace(teacher, revision=job.plan.identity["teacher"]["revision"])
    return replace(recipe, output=str(Path(recipe.output).resolve()), teacher=teacher)


@contextmanager
def cluster(recipe: Work, shards: int) -> Iterator[int]:
    """Ray, started here or joined; yields the number of workers. Raises WorkError when a cluster cannot be reached."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray's default is 15; on 2 cores with ten other busy processes that is 0.06 of a core, niceness 0 is 0.31 (measured)
    os.environ.setdefault("RAY_worker_niceness", "0")
    import logging

    ray = _ray()
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    local = recipe.ray.address == "local"
    count = recipe.ray.workers or (_local_workers(recipe) if local else None)
    if local:
        assert count is not None
        count = min(count, shards)
        options |= {"address": "local", "num_cpus": max(1, math.ceil(count * recipe.ray.cpus)), "include_dashboard": False}
        options |= {"object_store_memory": OBJECT_STORE_BYTES}
    else:
        checkout = Path(__file__).resolve().parents[1]
        options |= {"address": recipe.ray.address, "runtime_env": {"working_dir": str(checkout), "excludes": ["/runs", "/.venv", "/.git"]}}
    _begin(options, STARTS if local else 1)
    try:
        resources = ray.cluster_resources()
        yield min(count or int(resources.get("GPU", 0)) or int(resources.get("CPU", 1) // max(recipe.ray.cpus, 1)) or 1, shards)
    finally:
        ray.shutdown()


def _ray() -> Any:
    """Ray, imported where it is needed: it takes a second."""
    import ray

    return ray


def _begin(options: dict[str, Any], attempts: int) -> None:
    """Start or join Ray. Its own limit of 30 seconds for a start cannot be set, and a busy machine needs longer: then once more.

    Raises WorkError when the last attempt fails.
    """
    ray = _ray()
    for attempt in range(1, attempts + 1):
        try:
            ray.init(**options)
            return
        except Exception as error:  # Ray raises its own and the operating system's errors here
            ray.shutdown()
            if attempt == attempts:
                reason = str(error).strip() or type(error).__name__
                raise WorkError(f"Ray at ray.address {options['address']!r} does not answer after {attempts} attempts: {reason}") from None


def _local_workers(recipe: Work) -> int:
    import torch

    gpus = torch.cuda.device_count()
    if gpus and recipe.ray.gpus != 0:
        return max(1, int(gpus / (recipe.ray.gpus or 1)))
    return max(1, int(len(os.sched_getaffinity(0)) / max(recipe.ray.cpus, 0.01)))


@dataclass
class Driver:
    """Hands shards to workers and replaces workers that die. `_tasks` maps a pending result to (actor, shard or None while loading)."""

    recipe: Work
    job: Job
    progress: Progress
    log: RunLog
    _queue: deque[int] = field(default_factory=deque)
    _tasks: dict[Any, tuple[Any, int | None]] = field(default_factory=dict)
    _deaths: dict[int | None, int] = field(default_factory=dict)
    _failures: dict[int, str] = field(default_factory=dict)

    def run(self, pending: list[int], count: int) -> dict[int, str]:
        self._queue.extend(pending)
        self.progress.note("starting workers")
        for _ in range(count):
            self._start()
        ray = _ray()
        while self._tasks:
            ready, _ = ray.wait(list(self._tasks), num_returns=1, timeout=1.0)
            for task in ready:
                if task in self._tasks:  # a death takes several at once
                    self._finish(task)
            self.progress.show()
        return self._failures

    def _start(self) -> None:
        ray = _ray()
        gpus = self.recipe.ray.gpus if self.recipe.ray.gpus is not None else min(1, int(ray.cluster_resources().get("GPU", 0)))
        actor = ray.remote(Worker).options(num_cpus=self.recipe.ray.cpus, num_gpus=gpus).remote(self.recipe, self.job.corpus.roots)
        self._tasks[actor.load.remote()] = (actor, None)

    def _feed(self, actor: Any) -> None:
        """Keep the actor's hands full."""
        held = sum(1 for owner, _ in self._tasks.values() if owner is actor)
        while self._queue and held < IN_FLIGHT:
            shard = self._queue.popleft()
            self._tasks[actor.extract.remote(shard)] = (actor, shard)
            held += 1

    def _finish(self, task: Any) -> None:
        ray = _ray()
        actor, shard = self._tasks[task]
        try:
            outcome: Outcome = ray.get(task)
        except ray.exceptions.RayTaskError as error:  # a bug, or an error nobody foresaw: of this shard alone
            outcome = Outcome(failure=f"shard {shard}: {error.cause!r}", fatal=shard is None)
        except ray.exceptions.RayError as error:
            self._bury(actor, type(error).__name__)
            return
        del self._tasks[task]
        if outcome.fatal:
            raise WorkError(f"{outcome.failure}; what is committed stays, run again once that is settled")
        if outcome.receipt is not None:
            assert shard is not None
            self.log.write("shard", shard=shard, worker=outcome.host, pid=outcome.pid, seconds=outcome.seconds, receipt=asdict(outcome.receipt))
            self.progress.advance(work=self.job.work(shard), tokens=outcome.receipt.tokens)
        elif shard is not None:
            self.log.write("shard failed", shard=shard, reason=outcome.failure)
            self._failures[shard] = outcome.failure
        else:
            self.progress.restart()
        self._feed(actor)

    def _bury(self, actor: Any, reason: str) -> None:
        """The actor died: its shards go back to the front of the queue, unless the one it worked on has used up its retries."""
        lost = [(task, shard) for task, (owner, shard) in self._tasks.items() if owner is actor]
        for task, _ in lost:
            del self._tasks[task]
        shards = [shard for _, shard in lost]
        at_work = shards[0]
        self._deaths[at_work] = self._deaths.get(at_work, 0) + 1
        self.log.write("worker died", shards=shards, reason=reason, times=self._deaths[at_work])
        _ray().kill(actor)
        if self._deaths[at_work] > self.recipe.ray.retries:
            cause = f"{reason}; out of memory? fewer ray.workers or a smaller teacher.micro_batch need less"
            message = f"its worker died {self._deaths[at_work]} times ({cause})"
            if at_work is None:
                raise WorkError(f"no worker starts: {message}")
            self._failures[at_work] = f"shard {at_work}: {message}"
            shards = shards[1:]
        self._queue.extendleft(shard for shard in reversed(shards) if shard is not None)
        if self._queue or at_work is None:
            self._start()
