"""What a run will cost, before it starts: parameters, memory, FLOPs, GPU-hours. No dataset, no GPU and no weights are needed.

    python -m trainer estimate --config recipes/paper/lm1b_mdlm_gumbel.yaml --vocab_size 50257 --block_length 128
    python -m trainer estimate --config recipes/paper/owt_mdlm.yaml --gpu h200 --gpus 16 --mfu 0.4 --optim.micro_batch 64

Parameters are counted on the student itself, made on the meta device. FLOPs are those of the matrix products (trainer/flops.py),
memory is a formula (trainer/memory.py); tests hold both against torch. GPU-hours follow from the GPU's peak on its data sheet and from
the share of it that training reaches (model FLOPs utilisation), which is an assumption and no measurement. Waiting for data, evaluation
and making the noise are not in it. V and L are the dataset's where it is there, else --vocab_size and --block_length.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from trainer import flops, memory
from trainer.config import StudentConfig, TrainConfig
from trainer.data import open_data
from trainer.distributed import World
from trainer.layout import layout
from trainer.setup import shares
from trainer.students import build


@dataclass(frozen=True)
class Gpu:
    """Data sheet of one GPU: dense peaks, FLOP/s, of bfloat16 and of float32 without tensor cores; memory in bytes."""

    bfloat16: float
    float32: float
    memory: float


GPUS = {"a100": Gpu(312e12, 19.5e12, 80e9), "h100": Gpu(989e12, 67e12, 80e9), "h200": Gpu(989e12, 67e12, 141e9)}
NOISE = ("input.", "drafts.", "readout.")


@dataclass(frozen=True)
class Where:
    """On what it would run."""

    gpu: str = "h100"
    gpus: int = 8
    mfu: float = 0.35

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            raise ValueError(f"--gpu is {self.gpu!r}; it is one of {', '.join(GPUS)}")
        if self.gpus < 1 or not 0 < self.mfu <= 1:
            raise ValueError(f"--gpus is {self.gpus} and --mfu {self.mfu}; give at least one GPU, and a share of its peak in (0, 1]")


@dataclass(frozen=True)
class Estimate:
    """Figures of one run."""

    vocab_size: int
    block_length: int
    parameters: int
    of_noise: int
    """Parameters that a student without noise and drafts would not have."""
    micro_batch: int
    steps: int
    tokens: float
    """Positions with noise that the whole run sees."""
    step_flops: float
    memory: dict[str, float]
    """Bytes on one GPU, by what they are for."""
    seconds: float
    """Of one step on all GPUs together."""
    where: Where

    @property
    def gpu_hours(self) -> float:
        return self.seconds * self.steps * self.where.gpus / 3600

    @property
    def total_memory(self) -> float:
        return sum(self.memory.values())


def positions(config: StudentConfig, block_length: int) -> tuple[int, float, int]:
    """(slots that the layers see of a row, positions that get logits on average, and at most)."""
    valid = block_length - 1
    if config.kind == "ar":
        return valid, valid, valid
    if config.kind == "bd3lm":
        slots = len(layout(block_length, config.block_size, config.shift, torch.device("cpu")).position_M)
        return slots, valid * sum(config.clip) / 2, valid
    if config.kind == "mtp":
        return block_length, config.predict, config.predict
    return block_length, valid / 2, valid


def estimate(config: TrainConfig, vocab_size: int, block_length: int, where: Where) -> Estimate:
    """Raises ValueError where the recipe cannot run on that many GPUs, or its student cannot be made from its settings alone."""
    student = config.student
    if student.kind == "medusa":
        raise ValueError("student.kind is medusa, whose shape is its backbone's; this command takes the other kinds")
    _, micro = shares(config.optim, World(0, where.gpus, torch.device("cpu")))
    with torch.device("meta"):
        made = build(student, vocab_size, block_length)
    counts = {name: parameter.numel() for name, parameter in made.named_parameters()}
    slots, predicted, most = positions(student, block_length)
    bfloat16 = config.precision != "float32"
    step_flops = config.optim.global_batch * flops.training(student, vocab_size, slots, predicted)
    trained = sum(counts.values())
    parts = memory.states(trained, config.optim.ema > 0, where.gpus)
    parts |= {"bfloat16 copies": memory.copies(student, vocab_size, trained)} if bfloat16 else {}
    parts |= {name: micro * size for name, size in memory.kept(student, vocab_size, slots, most, bfloat16).items()}
    parts |= memory.passing(student, vocab_size, micro * most, bfloat16)
    peak = GPUS[where.gpu].bfloat16 if bfloat16 else GPUS[where.gpu].float32
    return Estimate(
        vocab_size=vocab_size,
        block_length=block_length,
        parameters=trained,
        of_noise=sum(count for name, count in counts.items() if name.startswith(NOISE)),
        micro_batch=micro,
        steps=config.optim.steps,
        tokens=float(config.optim.steps) * config.optim.global_batch * (block_length - 1),
        step_flops=step_flops,
        memory=parts,
        seconds=step_flops / (peak * where.mfu * where.gpus),
        where=where,
    )


def lines(config: TrainConfig, found: Estimate) -> list[str]:
    """The figures as they are printed."""
    student, where, gpu = config.student, found.where, GPUS[found.where.gpu]
    noise = f", of which noise and drafts {found.of_noise / 1e6:,.1f} M" if found.of_noise else ""
    peak = gpu.bfloat16 if config.precision != "float32" else gpu.float32
    fits = "fits" if found.total_memory <= gpu.memory else "does not fit: lower optim.micro_batch"
    return [
        f"{config.output}: {student.kind}, {student.layers} layers of {student.hidden}, V = {found.vocab_size:,}, L = {found.block_length:,}",
        f"parameters   {found.parameters / 1e6:,.1f} M{noise}",
        f"steps        {found.steps:,} of {config.optim.global_batch:,} rows; {found.tokens / 1e9:,.1f} G tokens in all",
        f"FLOPs        {found.step_flops:.2e} a step, {found.step_flops * found.steps:.2e} in all",
        f"memory       at most {found.total_memory / 1e9:,.1f} GB on each GPU at micro_batch {found.micro_batch}; "
        f"{where.gpu} has {gpu.memory / 1e9:,.0f} GB: {fits}",
        *(f"    {size / 1e9:8.2f} GB  {name}" for name, size in found.memory.items()),
        f"GPU-hours    {found.gpu_hours:,.0f} on {where.gpu}; {where.gpus} of them: {found.gpu_hours / where.gpus:,.1f} hours, "
        f"{found.seconds:.3f} s a step",
        f"assumed, not measured: {where.mfu:.0%} of the peak of {peak / 1e12:,.1f} TFLOP/s (--mfu); data, evaluation and making noise take nothing",
    ]


def run(arguments: list[str], parse: Callable[[list[str]], TrainConfig]) -> int:
    """The command; `parse` reads a recipe with its overrides. Raises ValueError for people."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer estimate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog="Every other option is the recipe's: --config RECIPE, --optim.micro_batch 16, ...",
    )  # fmt: skip
    parser.add_argument("--gpu", default=Where.gpu, help=f"One of {', '.join(GPUS)}; default %(default)s.")
    parser.add_argument("--gpus", type=int, default=Where.gpus, help="How many; default %(default)s.")
    parser.add_argument("--mfu", type=float, default=Where.mfu, help="Share of the peak that training reaches: an assumption; default %(default)s.")
    parser.add_argument("--vocab_size", type=int, help="Width of the teacher's logits; default: the dataset's.")
    parser.add_argument("--block_length", type=int, help="Positions of a row; default: the dataset's.")
    ours, recipe = parser.parse_known_args(arguments)
    config = parse(recipe)
    shape = _shape(config, ours)
    print("\n".join(lines(config, estimate(config, *shape, Where(ours.gpu, ours.gpus, ours.mfu)))))
    return 0


def _shape(config: TrainConfig, given: Any) -> tuple[int, int]:
    """(V, L)"""
    if given.vocab_size and given.block_length:
        return given.vocab_size, given.block_length
    try:
        dataset = open_data(config.data)
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}\nfor an estimate without it, give --vocab_size and --block_length") from None
    return given.vocab_size or dataset.codec.vocab_size, given.block_length or dataset.block_length
