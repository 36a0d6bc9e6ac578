"""What a run will cost, before it starts: parameters, memory, FLOPs, GPU-hours. No dataset, no GPU and no weights are needed.

Parameters are counted on the student itself, made on the meta device; the frozen backbone of `medusa` is made there from its config alone
(skeleton.py). FLOPs are those of the matrix products (flops.py) and memory is a formula (memory.py), both in heads_cost.py for heads on a
frozen backbone; tests hold them against torch. GPU-hours follow from the GPU's peak on its data sheet and from the share of it that training
reaches (model FLOPs utilisation), which is an assumption and no measurement. Waiting for data, evaluation and making the noise are not in it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from trainer import flops, heads_cost, memory
from trainer.config import NoiseConfig, StudentConfig, TrainConfig
from trainer.distributed import World
from trainer.frozen import Frozen
from trainer.layout import layout
from trainer.setup import shares
from trainer.skeleton import Skeleton, skeleton
from trainer.students import build, parameters
from trainer.students.medusa import Medusa


@dataclass(frozen=True)
class Gpu:
    """Data sheet of one GPU: dense peaks, FLOP/s, of bfloat16 and of float32 without tensor cores; memory in bytes."""

    bfloat16: float
    float32: float
    memory: float

    def peak(self, bfloat16: bool) -> float:
        return self.bfloat16 if bfloat16 else self.float32


GPUS = {"a100": Gpu(312e12, 19.5e12, 80e9), "h100": Gpu(989e12, 67e12, 80e9), "h200": Gpu(989e12, 67e12, 141e9)}


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
    frozen_flops: float
    """Those of them that are the frozen backbone's."""
    frozen_seconds: float
    """Those of `seconds`."""
    memory: dict[str, float]
    """Bytes on one GPU, by what they are for."""
    seconds: float
    """Of one step on all GPUs together."""
    where: Where
    backbone: Skeleton | None
    """The frozen one."""

    @property
    def gpu_hours(self) -> float:
        return self.seconds * self.steps * self.where.gpus / 3600

    @property
    def total_memory(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.total_memory <= GPUS[self.where.gpu].memory


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


def known_positions(config: StudentConfig, block_length: int, predicted: float) -> float:
    """Positions of a row whose noise stands beside the token, on average: all that bd3lm has in its clean half, else those that are not predicted."""
    valid = block_length - 1
    return (valid if config.kind == "bd3lm" else valid - predicted) if config.noise.known else 0


@dataclass(frozen=True)
class Cost:
    """What follows from the student alone, however many GPUs there are."""

    trained: int
    flops: float
    """Of the student's training, of one row."""
    frozen_flops: float
    """Of the frozen backbone's forward, of one row."""
    memory: dict[str, float]
    """Bytes beside weights and optimizer."""


def estimate(config: TrainConfig, vocab_size: int, block_length: int, where: Where, backbone: Skeleton | None = None) -> Estimate:
    """Raises ValueError where the recipe cannot run on that many GPUs, or its student cannot be made from its settings alone.

    backbone: a `medusa` student's; the one that its settings name where it is not given.
    """
    student, optim = config.student, config.optim
    _, micro = shares(optim, World(0, where.gpus, torch.device("cpu")))
    bfloat16 = config.precision != "float32"
    if student.kind == "medusa":
        backbone = backbone or skeleton(student.medusa)
        cost = _of_heads(student, backbone, vocab_size, block_length, micro, bfloat16)
    else:
        cost = _of_student(student, vocab_size, block_length, micro, bfloat16)
    twin = _made(replace(student, noise=NoiseConfig()), vocab_size, block_length, backbone)
    gpu = GPUS[where.gpu]
    rate = optim.global_batch / (where.mfu * where.gpus)
    frozen_seconds = rate * cost.frozen_flops / gpu.peak(backbone is None or backbone.bytes == 2)
    return Estimate(
        vocab_size=vocab_size,
        block_length=block_length,
        parameters=cost.trained,
        of_noise=cost.trained - parameters(twin),
        micro_batch=micro,
        steps=optim.steps,
        tokens=float(optim.steps) * optim.global_batch * (block_length - 1),
        step_flops=optim.global_batch * (cost.flops + cost.frozen_flops),
        frozen_flops=optim.global_batch * cost.frozen_flops,
        frozen_seconds=frozen_seconds,
        memory=memory.states(cost.trained, optim.ema > 0, where.gpus) | cost.memory,
        seconds=rate * cost.flops / gpu.peak(bfloat16) + frozen_seconds,
        where=where,
        backbone=backbone,
    )


def _made(student: StudentConfig, vocab_size: int, block_length: int, backbone: Skeleton | None) -> Any:
    """The student on the meta device."""
    with torch.device("meta"):
        if backbone is None:
            return build(student, vocab_size, block_length)
        return Medusa(student, vocab_size, block_length, Frozen.bare(student.medusa, backbone.model, vocab_size, block_length))


def _of_student(student: StudentConfig, vocab_size: int, block_length: int, micro: int, bfloat16: bool) -> Cost:
    trained = parameters(_made(student, vocab_size, block_length, None))
    slots, predicted, most = positions(student, block_length)
    parts = {"bfloat16 copies": memory.copies(student, vocab_size, trained)} if bfloat16 else {}
    parts |= {name: micro * size for name, size in memory.kept(student, vocab_size, slots, most, bfloat16).items()}
    parts |= memory.passing(student, vocab_size, micro * most, bfloat16)
    return Cost(trained, flops.training(student, vocab_size, slots, predicted, known_positions(student, block_length, predicted)), 0.0, parts)


def _of_heads(student: StudentConfig, backbone: Skeleton, vocab_size: int, block_length: int, micro: int, bfloat16: bool) -> Cost:
    made = _made(student, vocab_size, block_length, backbone)
    copied = heads_cost.copies(made, backbone, parameters(made), bfloat16)
    heads = {"copies in another dtype": copied} if copied else {}
    heads |= {name: micro * size for name, size in heads_cost.kept(made, block_length, bfloat16).items()}
    heads |= heads_cost.passing(made, micro, block_length, bfloat16)
    before = {"activations of the backbone, before the heads keep less": heads_cost.activations(backbone, micro, block_length)}
    parts = {"frozen backbone": float(backbone.bytes * backbone.parameters)}
    parts |= heads if sum(heads.values()) >= sum(before.values()) else before
    return Cost(parameters(made), heads_cost.training(made, block_length), heads_cost.of_backbone(backbone, block_length), parts)
