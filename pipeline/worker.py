"""One worker: a teacher held by a process, and the shards that it is given.

Two shards are in its hands at a time, each in a thread: while one has the teacher, the other is read, tokenised and packed,
or hashed and committed. So the teacher waits for neither, and no byte depends on it.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass

from noise.dataset import Plan
from noise.folder import Folder
from noise.receipt import Receipt
from noise.storage import DatasetError
from pipeline.config import Work
from pipeline.extract import Job
from pipeline.generate import Generation
from pipeline.making import Making, RowError
from pipeline.memory import is_out_of_memory, release
from pipeline.plan import corpus_of, documents_apart
from pipeline.tokenizer import Tokenizer

THREADS = 2
"""Shards in a worker's hands."""


@dataclass(frozen=True)
class Outcome:
    """What a worker says of one shard, or of loading its teacher."""

    receipt: Receipt | None = None
    failure: str = ""
    fatal: bool = False
    """The failure is of the machine or the whole job, not of this shard's data."""
    again: bool = False
    """The failure may not come again, on another machine or later."""
    row: bool = False
    """The failure is one row's."""
    micro_batch: int | None = None
    """Rows that went forward at once where the plan's micro-batch did not fit."""
    began: float = 0.0
    """Seconds since the epoch, by the worker's clock."""
    seconds: float = 0.0
    """From its beginning to its receipt, waiting for the teacher's turn included."""
    teacher_seconds: float = 0.0
    """In the teacher and the encoder."""
    teacher_processor_seconds: float = 0.0
    """Of the thread that calls them, in the same."""
    beside_seconds: float = 0.0
    """Processor time of everything else: reading, tokenising, packing, writing, hashing."""
    host: str = ""
    pid: int = 0


class Worker:
    """The body of an actor."""

    def __init__(self, recipe: Work, roots: list[str], cores: list[int] | None = None):
        self._recipe, self._roots, self._cores = recipe, roots, cores

    def load(self) -> Outcome:
        """Read plan, tokenizer and teacher."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._take_place()
        try:
            folder = Folder.of(self._recipe.output)
            plan = Plan.read(folder)
            import torch

            from pipeline.teacher import Teacher, check_unchanged

            check_unchanged(self._recipe.teacher, plan.identity["teacher"])
            device = "cuda" if torch.cuda.is_available() else "cpu"
            if device == "cuda" and 0 < (self._recipe.ray.gpus or 1) < 1:  # so that one worker's appetite is not another's failure
                torch.cuda.set_per_process_memory_fraction(self._recipe.ray.gpus)
            teacher = Teacher(self._recipe.teacher, plan.identity["vocab_size"], device, documents_apart(plan.identity))
            kind = Generation if plan.identity["extraction"] == "sequential" else Job
            self._job = kind(folder, plan, corpus_of(self._recipe, plan, self._roots), Tokenizer(folder.fetched("tokenizer")), teacher)
        except (DatasetError, OSError) as error:
            return Outcome(failure=str(error), fatal=True)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            way_out = "take a narrower teacher.dtype, fewer workers, or spread it over several GPUs (teacher.device_map)"
            return Outcome(failure=f"the teacher does not fit in the memory of {socket.gethostname()}: {way_out}", fatal=True)
        return Outcome()

    def largest_micro_batch(self) -> Outcome:
        """The largest that fits here."""
        self._take_place()
        try:
            return Outcome(micro_batch=self._job.largest_micro_batch())
        except MemoryError as error:
            return Outcome(failure=str(error), fatal=True)

    def extract(self, shard: int, quarantine: bool = False) -> Outcome:
        self._take_place()
        began, clock, processor, making = time.time(), time.monotonic(), time.thread_time(), Making(shard, quarantine)
        try:
            receipt = self._job.extract(shard, making)
        except MemoryError as error:
            release()
            return Outcome(failure=str(error) or f"shard {shard}: memory is short", again=True)
        except OSError as error:
            return Outcome(failure=f"shard {shard}: {error.strerror or error}", fatal=True)
        except RowError as error:
            return Outcome(failure=str(error), again=error.again, row=True)
        except ValueError as error:
            return Outcome(failure=str(error))
        return Outcome(
            receipt,
            micro_batch=making.micro_batch,
            began=round(began, 3),
            seconds=round(time.monotonic() - clock, 3),
            teacher_seconds=round(making.seconds, 3),
            teacher_processor_seconds=round(making.processor_seconds, 3),
            beside_seconds=round(time.thread_time() - processor - making.processor_seconds, 3),
            host=socket.gethostname(),
            pid=os.getpid(),
        )

    def _take_place(self) -> None:
        """Threads and cores of the calling thread: Ray takes another for each call."""
        import torch

        torch.set_num_threads(self._recipe.teacher.threads)
        if self._cores is not None:
            os.sched_setaffinity(0, self._cores)
