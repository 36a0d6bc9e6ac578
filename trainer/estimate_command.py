"""The estimate as a command. V and L are the dataset's where it is there, else --vocab_size (or the backbone's) and --block_length.

    python -m trainer estimate --config recipes/paper/lm1b_mdlm_gumbel.yaml --vocab_size 50257 --block_length 128
    python -m trainer estimate --config recipes/paper/owt_mdlm.yaml --gpu h200 --gpus 16 --mfu 0.4 --optim.micro_batch 64
    python -m trainer estimate --config recipes/medusa_vicuna_7b.yaml --backbone_config vicuna-7b --block_length 512
    python -m trainer estimate --recipes recipes/paper/owt_*.yaml --vocab_size 50257 --block_length 1024      (a table)

FLOPs are those of matrix products; memory is an upper bound for eager execution; GPU-hours rest on --mfu, an assumption and no measurement,
and leave out waiting for data, evaluation and making the noise.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from trainer.config import StudentConfig, TrainConfig
from trainer.data import open_data
from trainer.estimate import GPUS, Estimate, Where, estimate
from trainer.skeleton import WAYS_OUT, Skeleton, skeleton

TABLE = ["| recipe | steps | parameters | memory a GPU | GPU-hours |", "|---|---|---|---|---|"]


def lines(config: TrainConfig, found: Estimate) -> list[str]:
    """The figures as they are printed."""
    where, gpu, backbone = found.where, GPUS[found.where.gpu], found.backbone
    noise = f", of which noise and drafts {found.of_noise / 1e6:,.1f} M" if found.of_noise else ""
    peak = f"{gpu.peak(config.precision != 'float32') / 1e12:,.1f} TFLOP/s"
    frozen, forward = [], ""
    if backbone is not None:
        dtype = config.student.medusa.dtype
        frozen = [f"backbone     {backbone.parameters / 1e6:,.1f} M in {dtype}, frozen; its shape: {backbone.source}"]
        peak += f", of {gpu.peak(backbone.bytes == 2) / 1e12:,.1f} for the backbone in {dtype}"
        forward = (
            f"; the backbone's forward is {found.frozen_flops / found.step_flops:.0%} of them, {found.frozen_seconds / found.seconds:.0%} of the time"
        )
    return [
        f"{config.output}: {_kind(config.student, backbone)}, V = {found.vocab_size:,}, L = {found.block_length:,}",
        *frozen,
        f"parameters   {found.parameters / 1e6:,.1f} M{' trained' if backbone else ''}{noise}",
        f"steps        {found.steps:,} of {config.optim.global_batch:,} rows; {found.tokens / 1e9:,.1f} G tokens in all",
        f"FLOPs        {found.step_flops:.2e} a step, {found.step_flops * found.steps:.2e} in all{forward}",
        f"memory       at most {found.total_memory / 1e9:,.1f} GB on each GPU at micro_batch {found.micro_batch}; "
        f"{where.gpu} has {gpu.memory / 1e9:,.0f} GB: {'fits' if found.fits else 'does not fit: lower optim.micro_batch'}",
        *(f"    {size / 1e9:8.2f} GB  {name}" for name, size in found.memory.items()),
        f"GPU-hours    {_hours(found.gpu_hours)} on {where.gpu}; {where.gpus} of them: {found.gpu_hours / where.gpus:,.1f} hours, "
        f"{found.seconds:.3f} s a step",
        f"assumed, not measured: {where.mfu:.0%} of the peak of {peak} (--mfu); data, evaluation and making noise take nothing",
    ]


def _kind(student: StudentConfig, backbone: Skeleton | None) -> str:
    if backbone is None:
        return f"{student.kind}, {student.layers} layers of {student.hidden}"
    return f"{student.kind}, {student.medusa.heads_count} heads of {backbone.hidden} on {student.medusa.backbone}"


def row(name: str, found: Estimate) -> str:
    """A line of the table."""
    cells = (f"{found.steps:,}", f"{found.parameters / 1e6:,.1f} M", f"{found.total_memory / 1e9:,.1f} GB{'' if found.fits else ', too much'}")
    return f"| {name} | {' | '.join(cells)} | {_hours(found.gpu_hours)} |"


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.1f}" if hours >= 0.05 else "under 0.1"


def run(arguments: list[str], parse: Callable[[list[str]], TrainConfig]) -> int:
    """The command; `parse` reads a recipe with its overrides. Raises ValueError for people."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer estimate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog="Every other option is the recipe's: --config RECIPE, --optim.micro_batch 16, ...",
    )  # fmt: skip
    parser.add_argument("--gpu", default=Where.gpu, help=f"One of {', '.join(GPUS)}; default %(default)s.")
    parser.add_argument("--gpus", type=int, default=Where.gpus, help="How many; default %(default)s.")
    parser.add_argument("--mfu", type=float, default=Where.mfu, help="Share of the peak that training reaches: an assumption; default %(default)s.")
    parser.add_argument("--vocab_size", type=int, help="Width of the teacher's logits; default: the dataset's, or a medusa student's backbone's.")
    parser.add_argument("--block_length", type=int, help="Positions of a row; default: the dataset's.")
    parser.add_argument(
        "--backbone_config", default="",
        help=f"medusa: {WAYS_OUT.removeprefix('give --backbone_config: ')}; default: the backbone's own, or of these the one that has its name.",
    )  # fmt: skip
    parser.add_argument(
        "--recipes", nargs="+", help="Several recipes instead of one --config, a line each; files that train no student are left out."
    )
    ours, rest = parser.parse_known_args(arguments)
    if ours.recipes is None:
        print("\n".join(lines(*_estimated(parse(rest), ours))))
        return 0
    print("\n".join(TABLE))
    refused = 0
    for path in map(Path, ours.recipes):
        try:
            if _trains(path):
                print(row(path.stem, _estimated(parse(["--config", str(path), *rest]), ours)[1]))
        except (ValueError, OSError, yaml.YAMLError) as error:
            refused += 1
            print(f"{path}: {error}", file=sys.stderr)
    return int(refused > 0)


def _trains(path: Path) -> bool:
    """Whether a recipe is this package's."""
    recipe = yaml.safe_load(path.read_text())
    return isinstance(recipe, dict) and isinstance(recipe.get("student"), dict)


def _estimated(config: TrainConfig, given: Any) -> tuple[TrainConfig, Estimate]:
    backbone = None
    if config.student.kind == "medusa":
        backbone = skeleton(config.student.medusa, given.backbone_config)
    elif given.backbone_config and given.recipes is None:
        raise ValueError(
            f"--backbone_config is {given.backbone_config}, but student.kind is {config.student.kind}, which has no frozen backbone; drop it"
        )
    vocab_size, block_length = _shape(config, given, backbone)
    return config, estimate(config, vocab_size, block_length, Where(given.gpu, given.gpus, given.mfu), backbone)


def _shape(config: TrainConfig, given: Any, backbone: Skeleton | None) -> tuple[int, int]:
    """(V, L)"""
    vocab_size = given.vocab_size or (backbone.vocab_size if backbone is not None else None)
    if vocab_size and given.block_length:
        return vocab_size, given.block_length
    try:
        dataset = open_data(config.data)
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}\nfor an estimate without it, give --vocab_size and --block_length") from None
    return given.vocab_size or dataset.codec.vocab_size, given.block_length or dataset.block_length
