"""Students of a teacher that is known exactly: does noise make parallel sampling more consistent? Computed, not judged.

A Markov chain (see markov) writes a noise dataset; students that differ in `noise` alone are trained on it with the same
rows, order, masks, steps, initial seed and size; each is sampled at several numbers of function evaluations (NFE); and of
every sample set it is known which transitions the teacher allows, and how the joint of adjacent tokens should look.

    python -m eval chain --config recipes/demo_chain.yaml

Every finished piece is a file under the output folder: interrupted at any moment, the same command continues.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any, Literal

import torch

from eval import samples, tables
from eval.causal import folder_identity
from eval.chain_figures import LIMIT, Report, report
from eval.markov import BOS, ExactMarginals, MarkovTeacher, write_dataset
from eval.metrics import Array
from eval.sampler import Decoding, blank_rows, sample
from eval.study import draw_rows, load_masked, sample_request
from trainer.config import DataConfig, NoiseConfig, OptimConfig, StudentConfig, TrainConfig


@dataclass
class ChainConfig:
    """Students of an exactly known teacher: a Markov chain."""

    output: str
    """Folder of chain.json, chain.md and everything they are made of."""
    systems: dict[str, NoiseConfig]
    """Name -> how that student sees the noise; everything else is shared."""
    against: dict[str, list[str]] = field(default_factory=dict)
    """System -> the systems that it is compared with: its twin without noise, its control with independent noise. All are compared with the limit."""
    chain: MarkovTeacher = field(default_factory=MarkovTeacher)
    """The teacher."""
    length: int = 16
    """Tokens of a row after BOS."""
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
    temperatures: list[float] = field(default_factory=lambda: [1.0])
    """Trace every student's sampled output."""
    noise_temperatures: list[float] = field(default_factory=lambda: [1.0])
    """Trace the argmax of students with a readout."""
    sequences: int = 1024
    """Sequences of every figure."""
    replicates: int = 1000
    """Bootstrap replicates behind every interval."""
    seed: int = 1
    """Names texts, initial weights, order, masks and samples."""
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
        if not self.nfe or not 1 <= min(self.nfe) <= max(self.nfe) <= self.length or len(set(self.nfe)) < len(self.nfe):
            raise ValueError(f"nfe is {self.nfe}; give numbers from 1 to length {self.length}, each once")
        for name, least in (("sequences", 2), ("replicates", 20), ("length", 2), ("rows", 1), ("heldout_rows", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        for name in ("temperatures", "noise_temperatures"):
            if not getattr(self, name) or len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; give at least one value, each once")

    @property
    def folder(self) -> Path:
        return Path(self.output)

    def training(self, name: str) -> TrainConfig:
        """One system's run: only the noise and the folder are its own."""
        every = max(1, self.optim.steps // 10)
        return TrainConfig(
            output=str(self.folder / "students" / name),
            data=DataConfig(path=str(self.folder / "dataset"), heldout=str(self.folder / "heldout")),
            student=replace(self.model, noise=self.systems[name]), optim=self.optim, seed=self.seed, device=self.device,
            threads=1, log_every=every, eval_every=0, checkpoint_every=every, keep_checkpoints=1, tensorboard=False,
        )  # fmt: skip

    def decodings(self, output: str) -> list[Decoding]:
        """The points of one output: sampled ones are traced by temperature, argmax by noise temperature."""
        if output == "sample":
            return [Decoding(nfe, temperature=value) for nfe in self.nfe for value in self.temperatures]
        return [Decoding(nfe, noise_temperature=value, output="argmax") for nfe in self.nfe for value in self.noise_temperatures]

    def compared_with(self, name: str) -> list[str]:
        return [*self.against.get(name, []), LIMIT] if self.systems[name].kind == "gumbel" else self.against.get(name, [])

    def outputs(self, name: str) -> list[str]:
        """argmax where a readout makes it the sample; sampling there adds noise twice, and is shown for comparison."""
        return ["sample", "argmax"] if self.systems[name].readout else ["sample"]


def build(config: ChainConfig) -> Report:
    """Make the dataset, the students and the samples that are missing, and compute every figure."""
    # one thread: what is computed here is small, and training takes its threads itself
    write_dataset(config.folder / "dataset", config.chain, config.rows, config.length + 1, 2 * config.seed, config.draws)
    write_dataset(config.folder / "heldout", config.chain, config.heldout_rows, config.length + 1, 2 * config.seed + 1, config.draws)
    workers = min(len(config.systems), config.workers or (1 if config.device != "cpu" and torch.cuda.is_available() else os.cpu_count() or 1))
    if workers == 1:
        for name in config.systems:
            make_system(config, name)
    else:
        _make_all(config, workers)
    sets = {
        (name, output): {decoding: sampled(config, name, decoding) for decoding in config.decodings(output)}
        for name in config.systems
        for output in config.outputs(name)
    }
    return report(config, sets, {nfe: limit_samples(config, nfe) for nfe in config.nfe})


def _make_all(config: ChainConfig, workers: int) -> None:
    """Every system in its own process, `workers` at a time. When one fails or this process is stopped, all stop."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_follow_parent) as pool:
        made = {pool.submit(_make_system_or_leave, config, name): name for name in config.systems}
        try:
            for count, future in enumerate(as_completed(made), start=1):
                future.result()
                print(f"chain: {made[future]} is done, {count} of {len(made)}", file=sys.stderr, flush=True)
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


def _make_system_or_leave(config: ChainConfig, name: str) -> None:
    try:
        make_system(config, name)
    except KeyboardInterrupt:
        os._exit(130)  # the checkpoint is written; the pool must not hand this worker the next system


def make_system(config: ChainConfig, name: str) -> None:
    """Train one student and draw all its samples, or find them made."""
    from trainer.loop import train

    train(config.training(name))
    for output in config.outputs(name):
        for decoding in config.decodings(output):
            sampled(config, name, decoding)


def sampled(config: ChainConfig, name: str, decoding: Decoding) -> Array:
    """Tokens int32 [S, L] of a trained student; drawn once."""
    folder = config.folder / "students" / name
    request = sample_request(folder_identity(folder), asdict(decoding), config.seed, BOS, config.length + 1, config.sequences)
    path = tables.piece(config.folder / "samples", f"{name}-nfe{decoding.nfe}-{decoding.output}", request)

    @functools.cache
    def student() -> Any:
        return load_masked(str(folder), _device(config))

    def draw(sequence_id_B: torch.Tensor) -> torch.Tensor:
        return draw_rows(student(), decoding, config.seed, BOS, _device(config), sequence_id_B)

    return samples.obtain(path, request, config.sequences, 256, draw)


def limit_samples(config: ChainConfig, nfe: int) -> Array:
    """Tokens int32 [S, L] of exact marginals."""
    limit = ExactMarginals(config.chain, config.length + 1)
    rows_BL = blank_rows(limit, config.sequences, limit.block_length, BOS)
    drawn: Array = sample(limit, rows_BL, torch.arange(config.sequences), config.seed, Decoding(nfe)).numpy()
    return drawn


def _device(config: ChainConfig) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
