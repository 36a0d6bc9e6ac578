"""The training loop.

Contract: the same recipe and dataset give the same sequence of global batches, times and masks on any number of
processes; on CPU with the same number of processes the weights are bit-equal, however often the run was stopped and
resumed. The loss is the sum over rows divided by the global count of valid tokens.
The loop waits for a GPU only where figures are logged, at an evaluation and at a checkpoint, and measures speed there. (A student that counts
its masked positions waits for that count, once a micro-batch.)
"""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from noise.compiled import compiled
from noise.seal import copy_tokenizer
from noise.storage import read_json, write_text
from trainer import checkpoint, distributed, heldout, setup
from trainer.average import Average
from trainer.chance import Chance
from trainer.config import OptimConfig, TrainConfig
from trainer.data import Batch, Dataset, Place, batches
from trainer.guard import Guard
from trainer.metrics import Metrics, Window, check_wandb
from trainer.recipe import recipe_of, refuse_other, refuse_other_order
from trainer.students import parameters, save_student


def train(config: TrainConfig) -> None:
    """Train one student, or continue where it stopped, or say that it is done. Raises ValueError for people."""
    output = Path(config.output)
    check_wandb(config)
    dataset = setup.open_training(config.data)
    if _is_done(config, output, dataset):
        print(f"{output} is trained already ({config.optim.steps} steps); remove the folder to train it anew")
        return
    with distributed.joined(config.device, config.threads) as world:
        _Run(config, output, dataset, world).train()


def _is_done(config: TrainConfig, output: Path, dataset: Dataset) -> bool:
    if not (output / "student.json").exists():
        return False
    about = read_json(output / "student.json")
    refuse_other(output, recipe_of(config), about.get("recipe", {}), dataset.manifest.root_hash, about.get("provenance", {}).get("root_hash"))
    return True


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

    def __init__(self, config: TrainConfig, output: Path, dataset: Dataset, world: distributed.World):
        self.config, self.output, self.dataset, self.world = config, output, dataset, world
        self.share, self.micro = setup.shares(config.optim, world)
        self.recipe, self.root_hash = recipe_of(config), dataset.manifest.root_hash
        folder, self.said = self._checkpoint_to_continue()
        self.student, started_from = setup.new_student(config, dataset, start=folder is None)
        held = setup.open_heldout(config, dataset)
        self.heldout = heldout.Heldout(held, config.eval_rows, config.seed, world, self.micro) if held is not None else None
        self.best_by = heldout.figure(self.student, self.heldout) if config.keep_best else ""
        self.student.to(world.device)
        self.optimizer = setup.new_optimizer(self.student, config.optim)
        self.average = Average(self.student, config.optim.ema) if config.optim.ema else None
        if folder is None:
            state = checkpoint.State(0, 0, 0, self.recipe, self.root_hash)
            self.said += [f"{output.name}: {parameters(self.student):,} parameters, {len(dataset):,} rows", *started_from]
        else:
            state = self._resume(folder)
            self.said += [f"{output.name}: resumed at step {state.step}"]
        self.step, self.place, self.judged = state.step, Place(state.epoch, state.consumed), state.heldout
        objective = config.student.objective
        unknowing = (objective.nelbo + objective.token_kd) * math.log(self.student.vocab_size)
        self.guard = Guard(world, config.optim.explode, unknowing, state.recent)
        if config.compile:
            for part in self.student.compiled_parts:
                part.forward = compiled(part.forward)  # type: ignore[method-assign]
        self.model: Any = DistributedDataParallel(self.student) if world.size > 1 else self.student
        self.stopping = self.stopped = False  # a signal came; all processes agreed to end early

    def _checkpoint_to_continue(self) -> tuple[Path | None, list[str]]:
        """The newest whole checkpoint, which process 0 chooses for all, and what to say of others."""
        found, said = checkpoint.newest(self.output) if self.world.rank == 0 else (None, [])
        step = int(self.world.sum([float(checkpoint.step_of(found)) if found else 0.0])[0])
        return next((path for path in checkpoint.checkpoints(self.output) if checkpoint.step_of(path) == step), None), said

    def _resume(self, folder: Path) -> checkpoint.State:
        state = checkpoint.read_state(folder)
        refuse_other(folder, self.recipe, state.recipe, self.root_hash, state.root_hash)
        refuse_other_order(folder, self.dataset.order_name, state.order)
        average = checkpoint.restore(folder, self.student, self.optimizer)
        if self.average is not None and average is not None:
            self.average.load(average, state.step)
        return state

    def train(self) -> None:
        config = self.config
        if self.world.rank == 0:
            self.output.mkdir(parents=True, exist_ok=True)
            write_text(self.output / "recipe.yaml", yaml.safe_dump(asdict(config), sort_keys=False))
        self.metrics = Metrics(self.output, self.step, config, self.world.rank == 0)
        for line in self.said:
            self.metrics.say(line)
        with self._signals(), contextlib.closing(self.metrics), self._within_memory():
            self._steps()
            if not self.stopped:
                self._finish()
        if self.stopped:
            raise KeyboardInterrupt

    def _steps(self) -> None:
        config, steps = self.config, self.config.optim.steps
        world, pin = self.world, self.world.device.type == "cuda"
        source = batches(self.dataset, config.seed, config.optim.global_batch, self.place, world.rank, world.size, config.data.ahead, pin, pin)
        window = Window(self.student.figure_names, self.world)
        while self.step < steps:
            with window.waiting():
                batch, place = next(source)
            tokens = self.world.sum([batch.tokens()])[0]
            norm = self._one_step(batch, tokens, window)
            self.step, self.place, self.judged = self.step + 1, place, {}
            last = self.step == steps
            evaluate = last or _due(self.step, config.eval_every)
            stop = self.world.any(self.stopping)
            save = stop or last or _due(self.step, config.checkpoint_every)
            if evaluate or save or self.guard.full or _due(self.step, config.log_every):
                self.guard.look()
            if last or _due(self.step, config.log_every):
                self._log(window.figures() | {"lr": learning_rate(config.optim, self.step), "grad_norm": float(norm)})
            with window.apart():
                if evaluate:
                    self.judged = self._evaluate()
                if save or self._is_best():
                    self._checkpoint()
            if stop and not last:
                self.stopped = True
                self.metrics.say(f"{self.output.name}: stopped at step {self.step}; the same command continues here")
                return

    def _one_step(self, batch: Batch, tokens: float, window: Window) -> Tensor:
        """Forward, backward and update of one global batch; returns the gradient's norm, on the device."""
        config, optim = self.config, self.config.optim
        chance = Chance(config.seed, self.step + 1, optim.global_batch)
        torch.manual_seed((config.seed * 1_000_003 + self.step * self.world.size + self.world.rank) % 2**63)  # dropout
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(optim, self.step + 1)
        pieces, losses = batch.split(self.micro), []
        for number, piece in enumerate(pieces, start=1):
            wait = number < len(pieces) and self.world.size > 1
            with self.model.no_sync() if wait else contextlib.nullcontext(), self._autocast():
                loss, figures = self._backward(piece.to(self.world.device), chance, self.world.size / tokens)
            losses.append(loss)
            window.add(figures)
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), optim.clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update()
        self.guard.watch(self.step + 1, tokens, torch.stack(losses), norm, batch.sequence_id_B)
        window.tokens += int(tokens)
        return norm

    def _backward(self, piece: Batch, chance: Chance, scale: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward and backward of one micro-batch; returns its loss and figures, without gradient."""
        loss, figures = self.model(piece, chance)
        (loss * scale).backward()
        return loss.detach(), figures

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        kind = self.world.device.type
        wanted = self.config.precision
        on = wanted == "bfloat16" or (wanted == "auto" and kind == "cuda")
        return torch.autocast(kind, torch.bfloat16) if on else contextlib.nullcontext()

    def _log(self, figures: dict[str, float]) -> None:
        self.metrics.log(self.step, "train", figures)
        self.metrics.show(self.step, figures, [*self.student.figure_names, "tokens/s"])

    def _evaluate(self) -> dict[str, float]:
        """Held-out figures of the averaged weights; none without a held-out dataset."""
        if self.heldout is None:
            return {}
        self.student.eval()
        with self.average.in_place() if self.average is not None else contextlib.nullcontext():
            figures = self.heldout.figures(self.student, self._autocast)
        self.student.train()
        self.student.after_heldout(figures)
        self.metrics.log(self.step, "heldout", figures)
        listed = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
        self.metrics.say(f"{self.output.name}: held-out {listed}{heldout.reminder(self.student)}")
        return figures

    def _is_best(self) -> bool:
        """Whether this step's evaluation is below those of all checkpoints. Every process asks, so that all save or none."""
        if self.best_by not in self.judged:
            return False
        best = checkpoint.best(self.output, self.best_by) if self.world.rank == 0 else None
        better = self.world.rank == 0 and (best is None or self.judged[self.best_by] < checkpoint.read_state(best).heldout[self.best_by])
        return self.world.any(better)

    def _checkpoint(self) -> None:
        if self.world.rank == 0:
            place = self.place
            state = checkpoint.State(
                self.step, place.epoch, place.consumed, self.recipe, self.root_hash, self.guard.recent, self.judged, order=self.dataset.order_name
            )
            average = self.average.state() if self.average is not None else None
            checkpoint.save(self.output, state, self.student, average, self.optimizer, self.config.keep_checkpoints, self.best_by)
        self.world.sum([0.0])  # nobody goes on before the checkpoint stands

    def _finish(self) -> None:
        if self.world.rank:
            return
        weights = self.student.own_state() | (self.average.state() if self.average is not None else {})
        tokenizer = self.dataset.tokenizer
        if tokenizer is not None:  # Hugging Face looks for it beside the weights
            copy_tokenizer(tokenizer, self.output if self.config.student.kind == "ar" else self.output / "tokenizer")
        identity = self.dataset.manifest.identity
        provenance = {"dataset": self.dataset.address, "identity": identity, "root_hash": self.root_hash, "heldout": self.judged}
        save_student(self.output, self.student, weights, self.recipe, provenance)
        self.metrics.say(f"{self.output.name}: saved in {self.output}")

    @contextlib.contextmanager
    def _within_memory(self) -> Iterator[None]:
        """Out of memory in a step or in an evaluation, whose batches are micro-batches too, is ValueError with the way out."""
        try:
            yield
        except torch.OutOfMemoryError:
            smaller = next((size for size in range(self.micro // 2, 0, -1) if self.share % size == 0), 0)
            way_out = (
                f"--optim.micro_batch {smaller} keeps the global batch of {self.config.optim.global_batch}" if smaller else "use a smaller student"
            )
            raise ValueError(f"out of memory with micro-batches of {self.micro} rows; {way_out}") from None

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


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
