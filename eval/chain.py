"""Students of a teacher that is known exactly: does noise make parallel sampling more consistent? Computed, not judged.

A Markov chain (see markov) writes a noise dataset; students that differ in `noise` alone are trained on it with the same
rows, order, masks, steps, initial seed and size; each is sampled at several numbers of function evaluations (NFE); and of
every sample set it is known which transitions the teacher allows, and how the joint of adjacent tokens should look.

    python -m eval chain --config recipes/demo_chain.yaml

`build` returns what chain.json holds, format version 1:

    settings, truth, teacher     truth is exact; teacher is the same figures of the teacher's own rollouts
    systems          name -> {noise, parameters, outputs: output -> nfe -> {points: [decoding + figures], matched}}
                     matched: {valid, position, clamped}: the share of valid transitions where entropy is the teacher's
    comparisons      [{nfe, system, output, against, difference, above_zero}]: valid shares at matched entropy, subtracted

Figures are {valid, entropy, rollout_prefix, pair_distance}. Intervals are {value, low, high}: 95%, paired bootstrap.
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

import numpy as np
import torch

from eval import samples, tables
from eval.causal import folder_identity
from eval.frontier import Frontier, Matched, match
from eval.markov import BOS, MarkovTeacher, write_dataset
from eval.metrics import Array, Interval, bootstrap_weights, pooled_entropy
from eval.sampler import Decoding
from eval.study import draw_rows, load_masked, sample_request
from trainer.config import DataConfig, NoiseConfig, OptimConfig, StudentConfig, TrainConfig

FORMAT_VERSION = 1
Report = dict[str, Any]


@dataclass
class ChainConfig:
    """Students of an exactly known teacher: a Markov chain."""

    output: str
    """Folder of chain.json, chain.md and everything they are made of."""
    systems: dict[str, NoiseConfig]
    """Name -> how that student sees the noise; everything else is shared."""
    baseline: str = "none"
    """The system that the others are compared with."""
    control: str = ""
    """The system with independent noise; the others are compared with it as well."""
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
        for name in [self.baseline] + ([self.control] if self.control else []):
            if name not in self.systems:
                raise ValueError(f"baseline or control is {name!r}, which is not among the systems: {', '.join(self.systems)}")
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

    def decodings(self, name: str, output: str) -> list[Decoding]:
        """The points of one output: sampled ones are traced by temperature, argmax by noise temperature."""
        if output == "sample":
            return [Decoding(nfe, temperature=value) for nfe in self.nfe for value in self.temperatures]
        return [Decoding(nfe, noise_temperature=value, output="argmax") for nfe in self.nfe for value in self.noise_temperatures]

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
    return _Figures(config).report()


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
        for decoding in config.decodings(name, output):
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


def _device(config: ChainConfig) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device


class _Figures:
    """Every figure of the report, from samples that exist."""

    def __init__(self, config: ChainConfig):
        self.config, self.chain = config, config.chain
        self.weights_RS = bootstrap_weights(config.sequences, config.replicates, config.seed)
        self.possible_VV, self.joint_VV = (self.chain.transition_VV > 0).numpy(), self.chain.joint_VV.numpy()
        self.teacher_SL = self.chain.rollout(torch.arange(config.sequences), config.length + 1, config.seed).numpy()
        self.teacher_entropy_R = self._entropy(self.teacher_SL)

    def report(self) -> Report:
        config, chain = self.config, self.chain
        sets = {
            (name, output): {decoding: sampled(config, name, decoding) for decoding in config.decodings(name, output)}
            for name in config.systems for output in config.outputs(name)
        }  # fmt: skip
        matched = {(*key, nfe): self._match([ids for at, ids in found.items() if at.nfe == nfe]) for key, found in sets.items() for nfe in config.nfe}
        return {
            "format_version": FORMAT_VERSION,
            "settings": asdict(config),
            "truth": {"entropy": chain.entropy, "entropy_rate": chain.entropy_rate, "valid": 1.0},
            "teacher": self.figures(self.teacher_SL),
            "systems": {name: self._system(name, sets, matched) for name in config.systems},
            "comparisons": self._comparisons(matched),
        }

    def figures(self, ids_SL: Array) -> dict[str, Any]:
        """Share of valid transitions, entropy of a token, total variation of the joint of adjacent tokens, and how far the teacher is followed."""
        same_SL = ids_SL[:, 1:] == self.teacher_SL[:, 1:]
        return {
            "valid": asdict(Interval.of(self._valid(ids_SL))),
            "entropy": asdict(Interval.of(self._entropy(ids_SL))),
            "rollout_prefix": asdict(Interval.of(self._mean(np.cumprod(same_SL, axis=1).sum(1)))),
            "pair_distance": pair_distance(ids_SL, self.joint_VV),
        }

    def _valid(self, ids_SL: Array) -> Array:
        return self._mean(self.possible_VV[ids_SL[:, 1:-1], ids_SL[:, 2:]].mean(1))

    def _entropy(self, ids_SL: Array) -> Array:
        return pooled_entropy(ids_SL, np.full(len(ids_SL), ids_SL.shape[1]), self.weights_RS)

    def _mean(self, value_S: Array) -> Array:
        return np.asarray(self.weights_RS.astype(np.float64) @ value_S / len(value_S))

    def _match(self, points: list[Array]) -> Matched:
        # the frontier's quality is here the share of valid transitions, where text has a log-perplexity
        frontier = Frontier(np.stack([self._entropy(ids) for ids in points]), np.stack([self._valid(ids) for ids in points]))
        return match(frontier, self.teacher_entropy_R)

    def _system(self, name: str, sets: dict[Any, dict[Decoding, Array]], matched: dict[Any, Matched]) -> dict[str, Any]:
        outputs: dict[str, Any] = {}
        for output in self.config.outputs(name):
            outputs[output] = {}
            for nfe in self.config.nfe:
                at = matched[name, output, nfe]
                points = [{**asdict(decoding), **self.figures(ids)} for decoding, ids in sets[name, output].items() if decoding.nfe == nfe]
                valid = asdict(Interval.of(at.log_perplexity_R))
                outputs[output][str(nfe)] = {"points": points, "matched": {"valid": valid, "position": at.position, "clamped": at.clamped}}
        return {"noise": asdict(self.config.systems[name]), "outputs": outputs}

    def _comparisons(self, matched: dict[Any, Matched]) -> list[dict[str, Any]]:
        config, found = self.config, []
        for other in [config.baseline] + ([config.control] if config.control else []):
            for name, output, nfe in matched:
                if name in (config.baseline, config.control):
                    continue
                difference = Interval.of(matched[name, output, nfe].log_perplexity_R - matched[other, "sample", nfe].log_perplexity_R)
                found.append({
                    "nfe": nfe, "system": name, "output": output, "against": other,
                    "difference": asdict(difference), "above_zero": difference.low > 0,
                })  # fmt: skip
        return found


def pair_distance(ids_SL: Array, joint_VV: Array) -> float:
    """Total variation between the pooled joint of adjacent tokens after BOS and the true one. Not 0 for a finite exact sample."""
    width = len(joint_VV)
    count = np.bincount(ids_SL[:, 1:-1].ravel().astype(np.int64) * width + ids_SL[:, 2:].ravel(), minlength=width * width)
    return float(np.abs(count.reshape(width, width) / count.sum() - joint_VV).sum() / 2)
