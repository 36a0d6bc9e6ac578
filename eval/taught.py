"""Students of an exact teacher, equal in all but their noise: their datasets, their training, their samples.

What the studies of known truth share (chain, truth). Students that differ in `noise` alone are trained on one noise dataset with
the same rows, order, masks, steps, initial seed and size, several at a time in processes of one thread, and sampled.
Every finished piece is a file under the output folder: interrupted at any moment, the same command continues.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any, Literal

import torch

from eval import samples, tables
from eval.causal import folder_identity
from eval.decoding import Decoding
from eval.exact import BOS, ExactTeacher, write_dataset
from eval.metrics import Array
from eval.study import device_of, draw_rows, load_masked, sample_request
from trainer.config import DataConfig, NoiseConfig, OptimConfig, StudentConfig, TrainConfig

LIMIT = "limit"
"""The name of what no student without noise can pass."""
KNOWS_NOTHING = ("none", "independent")
"""Kinds of noise that say nothing of the text."""


@dataclass(kw_only=True)
class TaughtConfig:
    """What the students of an exact teacher share."""

    output: str
    """Folder of the figures and of everything they are made of."""
    systems: dict[str, NoiseConfig]
    """Name -> how that student sees the noise; everything else is shared."""
    against: dict[str, list[str]] = field(default_factory=dict)
    """System -> its twin without noise, its control with independent noise. Systems that see the teacher's noise are compared with the limit too."""
    rows: int = 32768
    """Training rows."""
    heldout_rows: int = 512
    """Held-out rows."""
    draws: int = 1
    """Draws of noise a row."""
    model: StudentConfig = field(default_factory=StudentConfig)
    """What all students share; its noise is left alone."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """How all students are trained."""
    nfe: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    """Numbers of function evaluations."""
    sequences: int = 1024
    """Sequences of every figure."""
    workers: int = 0
    """Students trained at a time, each with one thread; 0: one a CPU core (one where there is a GPU)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""

    def __post_init__(self) -> None:
        unknown = [name for line in self.against.items() for name in (line[0], *line[1]) if name not in self.systems]
        if unknown or not self.systems or LIMIT in self.systems:
            raise ValueError(f"against names {unknown}; systems are {list(self.systems)}, at least one and none called {LIMIT!r}")
        if self.model.kind != "mdlm" or self.model.noise != NoiseConfig():
            raise ValueError("model must be of kind mdlm and without noise; each of the systems has its own noise")
        if not self.nfe or min(self.nfe) < 1 or len(set(self.nfe)) < len(self.nfe):
            raise ValueError(f"nfe is {self.nfe}; give numbers from 1 up, each once")
        self.systems = {name: replace(self.model, noise=noise).noise for name, noise in self.systems.items()}  # a kind alone is all parts
        for name, least in (("sequences", 2), ("rows", 1), ("heldout_rows", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")

    @property
    def folder(self) -> Path:
        return Path(self.output)

    def compared_with(self, name: str) -> list[str]:
        """The system's twins and controls, and the limit where its noise knows the text."""
        return self.against.get(name, []) + ([] if self.systems[name].kind in KNOWS_NOTHING else [LIMIT])


@dataclass(frozen=True)
class Taught:
    """The students of one teacher and one seed, kept in one folder."""

    config: TaughtConfig
    folder: Path
    teacher: ExactTeacher
    length: int
    """Tokens of a row after BOS."""
    seed: int
    """Names texts, initial weights, order, masks and samples."""

    def write_datasets(self) -> None:
        """The training rows and the held-out ones, each a noise dataset."""
        config, block_length = self.config, self.length + 1
        write_dataset(self.folder / "dataset", self.teacher, config.rows, block_length, 2 * self.seed, config.draws)
        write_dataset(self.folder / "heldout", self.teacher, config.heldout_rows, block_length, 2 * self.seed + 1, config.draws)

    def student(self, name: str) -> Path:
        return self.folder / "students" / name

    def training(self, name: str) -> TrainConfig:
        """One system's run: only the noise and the folder are its own."""
        config = self.config
        every = max(1, config.optim.steps // 10)
        return TrainConfig(
            output=str(self.student(name)),
            data=DataConfig(path=str(self.folder / "dataset"), heldout=str(self.folder / "heldout")),
            student=replace(config.model, noise=config.systems[name]), optim=config.optim, seed=self.seed, device=config.device,
            threads=1, log_every=every, eval_every=0, checkpoint_every=every, keep_checkpoints=1, tensorboard=False,
        )  # fmt: skip

    def make(self, name: str, decodings: list[Decoding]) -> None:
        """Train one student and draw all its samples, or find them made."""
        from trainer.loop import train

        train(self.training(name))
        for decoding in decodings:
            self.sampled(name, decoding)

    def sampled(self, name: str, decoding: Decoding) -> Array:
        """Tokens int32 [S, L] of a trained student; drawn once."""
        config, device = self.config, device_of(self.config.device)
        request = sample_request(folder_identity(self.student(name)), decoding.request(), self.seed, BOS, self.length + 1, config.sequences)
        path = tables.piece(self.folder / "samples", f"{name}-nfe{decoding.nfe}-{decoding.output}", request)

        @functools.cache
        def student() -> Any:
            return load_masked(str(self.student(name)), device)

        def draw(sequence_id_B: torch.Tensor) -> torch.Tensor:
            return draw_rows(student(), decoding, self.seed, BOS, device, sequence_id_B)

        return samples.obtain(path, request, config.sequences, 256, draw)


def make_all(jobs: Mapping[str, Callable[[], None]], workers: int, device: str) -> None:
    """Every job in this process or, where several are to run at a time, in a process of its own; 0 workers: one a core, one where there is a GPU."""
    # one thread each: what is computed is small, and training takes its threads itself
    workers = min(len(jobs), workers or (1 if device_of(device) == "cuda" else os.cpu_count() or 1))
    if workers == 1:
        for job in jobs.values():
            job()
    else:
        _make_in_processes(jobs, workers)


def _make_in_processes(jobs: Mapping[str, Callable[[], None]], workers: int) -> None:
    """`workers` at a time. When one fails or this process is stopped, all stop."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_follow_parent) as pool:
        made = {pool.submit(_do_or_leave, job): name for name, job in jobs.items()}
        try:
            for count, future in enumerate(as_completed(made), start=1):
                future.result()
                print(f"{made[future]} is done, {count} of {len(made)}", file=sys.stderr, flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in active_children():
                child.terminate()  # SIGTERM: a trainer writes its checkpoint first
            raise


def _follow_parent() -> None:
    """A worker whose parent was killed stops, so that it never trains beside its successor."""

    def watch() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    torch.set_num_threads(1)
    threading.Thread(target=watch, daemon=True).start()


def _do_or_leave(job: Callable[[], None]) -> None:
    try:
        job()
    except KeyboardInterrupt:
        os._exit(130)  # the checkpoint is written; the pool must not hand this worker the next job
