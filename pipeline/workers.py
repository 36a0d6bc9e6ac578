"""All shards of a dataset on Ray: one actor per GPU or share of CPUs, each with its own teacher.

The shard is the unit of work and of retry. A worker that dies takes at most the shards it was given; they go to another
worker, a bounded number of times, and one by one, so that the one that kills is found. A shard that fails is tried again
where that can help; in the end it is reported, or its bad rows are left out (quarantine), and it stops nothing else.
Nothing here decides a byte of the dataset, except that quarantine does what it says.
"""

from __future__ import annotations

import os
import time
from collections import deque
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from noise.folder import Folder
from pipeline.cluster import cluster, gpus_of_a_worker, ray_module
from pipeline.config import AUTO, Work, WorkError
from pipeline.extract import Job
from pipeline.plan import settle_micro_batch
from pipeline.progress import Progress, say
from pipeline.run_log import RunLog
from pipeline.worker import THREADS, Outcome, Worker

BARREN = 16
"""Deaths of workers in a row, or four a worker, with no shard made between them, after which none will be."""
LONGEST_PAUSE = 60.0
"""Seconds before another worker starts in the place of one that died while it loaded: 2, 4, 8, and so on up to this."""


def extract(recipe: Work, job: Job, pending: list[int], progress: Progress, log: RunLog, quarantine: bool = False) -> dict[int, str]:
    """Make the pending shards, by extraction or generation as the job is; returns why each that failed did.

    Raises WorkError when no worker can load the teacher, workers keep dying, or the disk is full.
    """
    with cluster(recipe, len(pending)) as count:
        log.write("workers", count=count)
        return Driver(_absolute(recipe, job), job, progress, log, quarantine).run(pending, count)


def _absolute(recipe: Work, job: Job) -> Work:
    """The recipe as workers need it: no relative path, the hub's revision pinned."""
    teacher = recipe.teacher
    assert teacher.model is not None
    if Path(teacher.model).is_dir():
        teacher = replace(teacher, model=str(Path(teacher.model).resolve()))
    else:
        teacher = replace(teacher, revision=job.plan.identity["teacher"]["revision"])
    return replace(recipe, output=Folder.of(recipe.output).absolute(), teacher=teacher)


@dataclass
class Driver:
    """Hands shards to workers and replaces workers that die. `_tasks` maps a pending result to (actor, shard or None while loading)."""

    recipe: Work
    job: Job
    progress: Progress
    log: RunLog
    quarantine: bool = False
    _queue: deque[int] = field(default_factory=deque)
    _tasks: dict[Any, tuple[Any, int | None]] = field(default_factory=dict)
    _cores: dict[Any, list[int]] = field(default_factory=dict)
    _free_cores: list[list[int]] = field(default_factory=list)
    _deaths: dict[int | None, int] = field(default_factory=dict)
    _barren: int = 0
    _loaded: bool = False
    """Whether any worker has loaded its teacher, so that it can be."""
    _starts: list[float] = field(default_factory=list)
    """When workers are to be started, by the monotonic clock."""
    _tries: dict[int, int] = field(default_factory=dict)
    _suspects: set[int] = field(default_factory=set)
    """Shards that were in the hands of a worker that died: each is alone in its worker's hands until it is made."""
    _quarantined: set[int] = field(default_factory=set)
    """Shards to make without their bad rows."""
    _failures: dict[int, str] = field(default_factory=dict)

    def run(self, pending: list[int], count: int) -> dict[int, str]:
        self._queue.extend(pending)
        self._count = count
        if self.recipe.ray.pinned:
            each, cores = max(1, int(self.recipe.ray.cpus)), sorted(os.sched_getaffinity(0))
            self._free_cores = [cores[at * each : (at + 1) * each] for at in range(len(cores) // each)]
        self.progress.note("starting workers")
        if self.job.plan.environment["numerics"]["micro_batch"] == AUTO:
            self._settle_micro_batch()
        for _ in range(count):
            self._start()
        # a worker that never finds room in the cluster is not waited for
        while (self._tasks or self._starts) and (self._queue or any(shard is not None for _, shard in self._tasks.values())):
            for task in self._ready():
                if task in self._tasks:  # a death takes several at once
                    self._finish(task)
            due = [at for at in self._starts if at <= time.monotonic()]
            self._starts = [at for at in self._starts if at not in due]
            for _ in due:
                self._start()
            self.progress.show()
        return self._failures

    def _ready(self) -> list[Any]:
        """What is done, waited for up to a second."""
        if self._tasks:
            return list(ray_module().wait(list(self._tasks), num_returns=1, timeout=1.0)[0])
        time.sleep(1.0)
        return []

    def _actor(self) -> Any:
        ray = ray_module()
        gpus = gpus_of_a_worker(self.recipe.ray, ray.cluster_resources().get("GPU", 0.0))
        cores = self._free_cores.pop(0) if self._free_cores else None
        options = {"num_cpus": self.recipe.ray.cpus, "num_gpus": gpus, "max_concurrency": THREADS}
        actor = ray.remote(Worker).options(**options).remote(self.recipe, self.job.corpus.roots, cores)
        if cores is not None:
            self._cores[actor] = cores
        return actor

    def _start(self) -> None:
        actor = self._actor()
        self._tasks[actor.load.remote()] = (actor, None)

    def _end(self, actor: Any) -> None:
        ray_module().kill(actor)
        if actor in self._cores:
            self._free_cores.append(self._cores.pop(actor))

    def _settle_micro_batch(self) -> None:
        """Where the plan leaves it to be found, the first worker finds it, and the plan says so from then on."""
        ray, actor = ray_module(), self._actor()
        try:
            loaded: Outcome = ray.get(actor.load.remote())
            found: Outcome = loaded if loaded.fatal else ray.get(actor.largest_micro_batch.remote())
        except ray.exceptions.RayError as error:
            message = f"the micro-batch cannot be found, its worker died ({type(error).__name__}); set teacher.micro_batch to a small number"
            raise WorkError(message) from None
        if found.fatal:
            raise WorkError(found.failure)
        assert found.micro_batch is not None
        size = settle_micro_batch(self.job.folder, found.micro_batch)
        say(f"plan: micro-batches of {size} rows, which the first worker found to fit")
        self.log.write("micro-batch", rows=size)
        self._end(actor)

    def _feed(self, actor: Any) -> None:
        """Keep the actor's hands full, but leave the last shards to those whose hands are empty."""
        held = [shard for owner, shard in self._tasks.values() if owner is actor]
        while self._queue and len(held) < THREADS:
            if held and ({self._queue[0], *held} & self._suspects or len(self._queue) < self._count):
                return
            shard = self._queue.popleft()
            self._tasks[actor.extract.remote(shard, shard in self._quarantined)] = (actor, shard)
            held.append(shard)

    def _finish(self, task: Any) -> None:
        ray = ray_module()
        actor, shard = self._tasks[task]
        try:
            outcome: Outcome = ray.get(task)
        except ray.exceptions.RayTaskError as error:  # nobody foresaw it: a GPU in disarray, or a bug; another process may do better
            self._bury(actor, repr(error.cause), shard)
            return
        except ray.exceptions.RayError as error:
            self._bury(actor, type(error).__name__)
            return
        del self._tasks[task]
        if outcome.fatal:
            raise WorkError(f"{outcome.failure}; what is committed stays, run again once that is settled")
        if shard is None:
            self._loaded = True
            self._deaths.pop(None, None)
            self.progress.restart()
        elif outcome.receipt is None:
            self._failed(shard, outcome)
        else:
            self._made(shard, outcome)
        self._feed(actor)

    def _made(self, shard: int, outcome: Outcome) -> None:
        assert outcome.receipt is not None
        self._suspects.discard(shard)
        self._barren = 0
        self._deaths.pop(None, None)  # machines come and go for days; only those that die in a row say that no worker can start
        about = {name: value for name, value in asdict(outcome).items() if name not in ("failure", "fatal", "again", "row", "receipt", "host")}
        self.log.write("shard", shard=shard, worker=outcome.host, receipt=outcome.receipt.to_json(), **about)
        if outcome.micro_batch is not None:
            self.progress.warn(
                f"shard {shard}: the plan's micro-batch does not fit on {outcome.host}, {outcome.micro_batch} rows at once do; its bytes may differ "
                "from those that another machine makes (run.jsonl lists every such shard)"
            )
        for row in outcome.receipt.quarantined:
            self.progress.warn(f"shard {shard}: row {row.row} is left out ({row.tokens} tokens): {row.reason}", once=False)
        self.progress.advance(work=self.job.work(shard), tokens=outcome.receipt.tokens)

    def _failed(self, shard: int, outcome: Outcome) -> None:
        """Again where that may help, without its bad rows where that is asked for, or never."""
        self._tries[shard] = self._tries.get(shard, 0) + 1
        again = outcome.again and self._tries[shard] <= self.recipe.ray.retries
        if not again and outcome.row and self.quarantine and shard not in self._quarantined:
            self._quarantined.add(shard)
            again = True
        self.log.write("shard retried" if again else "shard failed", shard=shard, reason=outcome.failure)
        if again:
            self.progress.retry()
            self._queue.append(shard)  # at the back, so that it is another worker's
        else:
            self._failures[shard] = outcome.failure

    def _bury(self, actor: Any, reason: str, culprit: int | None = None) -> None:
        """The actor died: its shards go back to the front of the queue, unless the one it worked on has used up its retries."""
        lost = [(task, shard) for task, (owner, shard) in self._tasks.items() if owner is actor]
        for task, _ in lost:
            del self._tasks[task]
        shards = [shard for _, shard in lost]
        at_work = shards[0] if culprit is None else culprit
        self._deaths[at_work] = self._deaths.get(at_work, 0) + 1
        self._barren += 1
        self.log.write("worker died", shards=shards, reason=reason, times=self._deaths[at_work])
        self._end(actor)
        back = [shard for shard in shards if shard is not None]
        # a node that vanishes is offered to new workers until the cluster knows: that says nothing about the teacher
        if self._deaths[at_work] > self.recipe.ray.retries and not (at_work is None and self._loaded):
            cause = f"{reason}; out of memory? fewer ray.workers or a smaller teacher.micro_batch need less"
            message = f"its worker died {self._deaths[at_work]} times ({cause})"
            if at_work is None:
                raise WorkError(f"no worker starts: {message}")
            self._failures[at_work] = f"shard {at_work}: {message}"
            back.remove(at_work)
        elif self._barren > max(BARREN, 4 * self._count):
            raise WorkError(f"{self._barren} workers died one after another and no shard was made, last: {reason}; what is committed stays")
        self.progress.retry(len(back))
        self._suspects.update(back)
        self._queue.extendleft(reversed(back))
        if at_work is None:
            self._starts.append(time.monotonic() + min(2.0 ** self._deaths[None], LONGEST_PAUSE))
        elif self._queue:
            self._start()
