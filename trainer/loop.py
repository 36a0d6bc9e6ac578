"""The training loop.

Contract: the same recipe and dataset give the same sequence of global batches, times and masks on any number of
processes; on CPU with the same number of processes the weights are bit-equal, however often the run was stopped and
resumed. The loss is the sum over rows divided by the global count of valid tokens.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from noise.compiled import compiled
from noise.identity import differences
from noise.storage import DatasetError, read_json, write_text
from trainer import checkpoint, distributed
from trainer.chance import Chance
from trainer.config import OptimConfig, TrainConfig
from trainer.data import Batch, NoiseDataset, Place, batches, unigram
from trainer.metrics import Metrics
from trainer.students import Student, build, parameters, save_student, start_from

NOT_IDENTITY = (
    "output", "data", "device", "threads", "compile", "log_every", "eval_every", "eval_rows", "checkpoint_every", "keep_checkpoints", "tensorboard",
)  # fmt: skip
"""Settings that may change between a run and its resumption, and optim.micro_batch; the data are identified by their root hash."""


def train(config: TrainConfig) -> None:
    """Train one student, or continue where it stopped, or say that it is done. Raises ValueError for people."""
    output = Path(config.output)
    dataset = NoiseDataset(config.data.path, config.data.check_hashes, config.data.open_shards)
    if _is_done(config, output, dataset):
        print(f"{output} is trained already ({config.optim.steps} steps); remove the folder to train it anew")
        return
    world = distributed.start(config.device, config.threads)
    try:
        _Run(config, output, dataset, world).train()
    finally:
        distributed.stop()


def recipe_of(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide the numbers of a run."""
    recipe: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    recipe["optim"].pop("micro_batch")
    return {name: value for name, value in recipe.items() if name not in NOT_IDENTITY}


def _is_done(config: TrainConfig, output: Path, dataset: NoiseDataset) -> bool:
    if not (output / "student.json").exists():
        return False
    about = read_json(output / "student.json")
    _refuse_other(output, recipe_of(config), about.get("recipe"), dataset.manifest.root_hash, about.get("provenance", {}).get("root_hash"))
    return True


def _refuse_other(where: Path, recipe: dict[str, Any], theirs: Any, root_hash: str, their_root: Any) -> None:
    changed = differences(recipe, theirs) + ([] if root_hash == their_root else [f"dataset root_hash: {root_hash} here, {their_root} there"])
    if changed:
        raise DatasetError(f"{where} holds another run:\n  " + "\n  ".join(changed) + "\nset another --output, or remove that folder")


def learning_rate(optim: OptimConfig, step: int) -> float:
    """Rate of step 1, 2, ...: linear warm-up, then the schedule."""
    if step <= optim.warmup:
        return optim.lr * step / max(1, optim.warmup)
    progress = (step - optim.warmup) / max(1, optim.steps - optim.warmup)
    if optim.schedule == "cosine":
        return optim.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
    return optim.lr * (1 - progress) if optim.schedule == "linear" else optim.lr


class _Run:
    """One run's parts, in the order in which they are used."""

    def __init__(self, config: TrainConfig, output: Path, dataset: NoiseDataset, world: distributed.World):
        self.config, self.output, self.dataset, self.world = config, output, dataset, world
        optim = config.optim
        if optim.global_batch % world.size:
            raise ValueError(f"optim.global_batch is {optim.global_batch}, not a multiple of the {world.size} processes")
        self.share = optim.global_batch // world.size
        self.micro = optim.micro_batch or self.share
        if self.share % self.micro:
            raise ValueError(
                f"optim.global_batch {optim.global_batch} is not processes {world.size} x optim.micro_batch {self.micro} x a whole accumulation"
            )
        self.recipe, self.root_hash = recipe_of(config), dataset.manifest.root_hash
        torch.manual_seed(config.seed)
        self.student: Student = build(config.student, dataset.codec.vocab_size, dataset.block_length)
        if dataset.extraction == "none" and config.student.noise.kind == "gumbel":
            raise ValueError(
                f"data.path {dataset.folder} has tokens but no noise (extraction: none); set student.noise.kind to none or extract with a teacher"
            )
        self.heldout = NoiseDataset(config.data.heldout, config.data.check_hashes) if config.data.heldout else None
        self._check_heldout()
        self.started_from = start_from(self.student, Path(config.student.init_from)) if config.student.init_from else []
        noise_input = getattr(self.student, "input", None)
        if noise_input is not None and config.student.noise.prior == "unigram":
            noise_input.log_unigram_V.copy_(unigram(dataset))
        self.student.to(world.device)
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(), lr=optim.lr, betas=(optim.betas[0], optim.betas[1]), weight_decay=optim.weight_decay, foreach=True
        )
        self.average = AveragedModel(self.student, multi_avg_fn=_average(optim.ema)) if optim.ema else None
        self.step, self.place = 0, Place()
        self._resume()
        if config.compile:
            for layer in self.student.model.layers:
                layer.forward = compiled(layer.forward)
        self.model: Any = DistributedDataParallel(self.student) if world.size > 1 else self.student
        self.stopping = self.stopped = False  # a signal came; all processes agreed to end early

    def _check_heldout(self) -> None:
        if self.heldout is None:
            return
        ours, theirs = self.dataset.manifest.identity, self.heldout.manifest.identity
        changed = [
            line
            for name in ("vocab_size", "block_length", "extraction", "tokenizer", "teacher")
            for line in differences(ours.get(name), theirs.get(name), name)
        ]
        if changed:
            raise DatasetError(f"data.heldout {self.heldout.folder} does not fit data.path {self.dataset.folder}: " + "; ".join(changed))

    def _resume(self) -> None:
        found = checkpoint.checkpoints(self.output)
        if not found:
            return
        state = checkpoint.read_state(found[-1])
        _refuse_other(found[-1], self.recipe, state.recipe, self.root_hash, state.root_hash)
        average = checkpoint.restore(found[-1], self.student, self.optimizer)
        if self.average is not None and average is not None:
            self.average.module.load_state_dict(average)
            self.average.n_averaged.fill_(state.step)
        self.step, self.place = state.step, Place(state.epoch, state.consumed)

    def train(self) -> None:
        config, optim = self.config, self.config.optim
        if self.world.rank == 0:
            self.output.mkdir(parents=True, exist_ok=True)
            write_text(self.output / "recipe.yaml", yaml.safe_dump(asdict(config), sort_keys=False))
        self.metrics = Metrics(self.output, self.step, optim.steps, config.tensorboard, self.world.rank == 0)
        if not self.step:
            for line in [f"{self.output.name}: {parameters(self.student):,} parameters, {len(self.dataset):,} rows", *self.started_from]:
                self.metrics.say(line)
        else:
            self.metrics.say(f"{self.output.name}: resumed at step {self.step}")
        with self._signals(), contextlib.closing(self.metrics):
            self._steps()
            if not self.stopped:
                self._finish()
        if self.stopped:
            raise KeyboardInterrupt

    def _steps(self) -> None:
        config, optim = self.config, self.config.optim
        source = batches(self.dataset, config.seed, optim.global_batch, self.place, self.world.rank, self.world.size)
        seen: dict[str, float] = {}
        since, waited, tokens = time.monotonic(), 0.0, 0
        while self.step < optim.steps:
            before = time.monotonic()
            batch, place = next(source)
            waited += time.monotonic() - before
            count = self.world.sum([batch.tokens()])[0]
            norm = self._one_step(batch, count, seen)
            self.step, self.place, tokens = self.step + 1, place, tokens + int(count)
            if self.step % config.log_every == 0 or self.step == optim.steps:
                sums = dict(zip(seen, self.world.sum(list(seen.values())), strict=True))
                now = time.monotonic()
                figures = {name: value / tokens for name, value in sums.items()}
                figures |= {
                    "lr": learning_rate(optim, self.step),
                    "grad_norm": norm,
                    "tokens/s": tokens / (now - since),
                    "waiting": waited / (now - since),
                }
                self.metrics.log(self.step, "train", figures)
                self.metrics.show(self.step, {name: figures[name] for name in (*sums, "tokens/s")})
                seen, since, waited, tokens = {}, now, 0.0, 0
            if config.eval_every and self.step % config.eval_every == 0 and self.step < optim.steps:
                self._evaluate()
            stop = self.world.any(self.stopping)
            if stop or (config.checkpoint_every and self.step % config.checkpoint_every == 0) or self.step == optim.steps:
                self._checkpoint()
            if stop and self.step < optim.steps:
                self.stopped = True
                self.metrics.say(f"{self.output.name}: stopped at step {self.step}; the same command continues here")
                return

    def _one_step(self, batch: Batch, count: float, seen: dict[str, float]) -> float:
        config, optim = self.config, self.config.optim
        chance = Chance(config.seed, self.step + 1, optim.global_batch)
        torch.manual_seed((config.seed * 1_000_003 + self.step * self.world.size + self.world.rank) % 2**63)  # dropout
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(optim, self.step + 1)
        pieces = batch.split(self.micro)
        for number, piece in enumerate(pieces, start=1):
            wait = number < len(pieces) and self.world.size > 1
            with self.model.no_sync() if wait else contextlib.nullcontext(), self._autocast():
                figures = self._backward(piece.to(self.world.device), chance, self.world.size / count)
            for name, value in figures.items():
                seen[name] = seen.get(name, 0.0) + float(value)
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), optim.clip or math.inf)
        if not math.isfinite(float(norm)):
            ids = ", ".join(str(int(number) % 2**64) for number in batch.sequence_id_B[:8])
            raise ValueError(
                f"the gradient of step {self.step + 1} is not finite; the batch has sequence ids {ids}, ...; lower optim.lr or look at these rows. "
                "The last checkpoint stands."
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.student)
        return float(norm)

    def _backward(self, piece: Batch, chance: Chance, scale: float) -> dict[str, Tensor]:
        """Forward and backward of one micro-batch; returns its figures."""
        figures: dict[str, Tensor]
        try:
            loss, figures = self.model(piece, chance)
            (loss * scale).backward()
        except torch.OutOfMemoryError:
            smaller = next((size for size in range(self.micro // 2, 0, -1) if self.share % size == 0), 0)
            way_out = (
                f"--optim.micro_batch {smaller} keeps the global batch of {self.config.optim.global_batch}" if smaller else "use a smaller student"
            )
            raise ValueError(f"out of memory with micro-batches of {self.micro} rows; {way_out}") from None
        return figures

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        kind = self.world.device.type
        wanted = self.config.precision
        on = wanted == "bfloat16" or (wanted == "auto" and kind == "cuda")
        return torch.autocast(kind, torch.bfloat16) if on else contextlib.nullcontext()

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """Held-out loss of the averaged weights, with each row's own noise and, as a probe, with another row's."""
        if self.heldout is None:
            return {}
        student: Any = self.average.module if self.average is not None else self.student
        student.eval()
        rows = min(self.config.eval_rows, len(self.heldout))
        chance = Chance(self.config.seed, 0, rows)
        sums: dict[str, float] = {"tokens": 0.0}
        probes = (False, True) if self.config.student.noise.kind == "gumbel" and rows > 1 else (False,)
        for start in range(self.world.rank * self.micro, rows, self.world.size * self.micro):
            at = np.arange(start, min(start + self.micro, rows))
            batch = self.heldout.batch(at, 0, at).to(self.world.device)
            sums["tokens"] += batch.tokens()
            for other in probes:
                neighbour = self.heldout.batch((at + 1) % rows).to(self.world.device) if other else None
                with self._autocast():
                    _, figures = student(batch, chance, neighbour)
                for name, value in figures.items():
                    key = name + ("_other_noise" if other else "")
                    sums[key] = sums.get(key, 0.0) + float(value)
        student.train()
        names = sorted(self._figure_names(probes))
        values = self.world.sum([sums["tokens"]] + [sums.get(name, 0.0) for name in names])
        figures = {name: value / values[0] for name, value in zip(names, values[1:], strict=True)}
        self.metrics.log(self.step, "heldout", figures)
        note = "  (posterior noise knows the text: no likelihood bound)" if len(probes) > 1 else ""
        self.metrics.say(f"{self.output.name}: held-out " + "  ".join(f"{name} {value:.4f}" for name, value in figures.items()) + note)
        return figures

    def _figure_names(self, probes: tuple[bool, ...]) -> list[str]:
        names = ["nll"] if self.config.student.kind == "ar" else ["nelbo", *(f"draft_{layer}" for layer in self.config.student.noise.drafts)]
        return [name + ("_other_noise" if other else "") for name in names for other in probes]

    def _checkpoint(self) -> None:
        if self.world.rank == 0:
            state = checkpoint.State(self.step, self.place.epoch, self.place.consumed, self.recipe, self.root_hash)
            average = self.average.module.state_dict() if self.average is not None else None
            checkpoint.save(self.output, state, self.student, average, self.optimizer, self.config.keep_checkpoints)
        self.world.sum([0.0])  # nobody goes on before the checkpoint stands

    def _finish(self) -> None:
        heldout = self._evaluate()
        if self.world.rank:
            return
        weights = (self.average.module if self.average is not None else self.student).state_dict()
        tokenizer = self.dataset.folder / "tokenizer"
        if tokenizer.exists() and self.config.student.kind == "ar":
            shutil.copytree(tokenizer, self.output, dirs_exist_ok=True)
        identity = self.dataset.manifest.identity
        provenance = {"dataset": str(self.dataset.folder), "identity": identity, "root_hash": self.root_hash, "heldout": heldout}
        save_student(self.output, self.student, weights, self.recipe, provenance)
        self.metrics.say(f"{self.output.name}: saved in {self.output}")

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the current step, write a checkpoint and stop."""

        def handler(*_: object) -> None:
            self.stopping = True

        before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old)


def _average(decay: float) -> Any:
    @torch.no_grad()
    def update(averages: list[Tensor], currents: list[Tensor], count: Tensor | int) -> None:
        n = int(count)
        torch._foreach_lerp_(averages, currents, 1 - min(decay, (1 + n) / (10 + n)))

    return update
