"""What noise adds to a student: parameters, and FLOPs a token, by option, for students of well-known sizes. No GPU, a few seconds.

    python -m benchmarks.noise_cost
    python -m benchmarks.noise_cost --length 128 --rank 128

Parameters are counted on the modules themselves, made on the meta device, so they are the trainer's own. FLOPs are those of
the matrix products of one forward: trainer/flops.py has the formula, which a test holds against torch's counter on a small student.

All positions are masked here (a call at NFE 1, or training at t = 1): the most that noise can cost. What is not a product
(softmax, making the noise, another marginal) costs V operations a token: benchmarks.decode measures it. A student has its
namesake's layers, width, MLP and vocabulary; its keys and values are not shared and its head is tied, so its total differs.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from trainer.config import NoiseConfig, StudentConfig
from trainer.flops import forward, noise_flops
from trainer.students import build, parameters


@dataclass(frozen=True)
class Size:
    """A student's shape, and what its namesake has in all."""

    layers: int
    hidden: int
    heads: int
    mlp: int
    vocab_size: int
    namesake: float
    """Parameters of the model of that name, embeddings and head included."""

    def student(self, noise: NoiseConfig) -> StudentConfig:
        return StudentConfig(layers=self.layers, hidden=self.hidden, heads=self.heads, mlp=self.mlp, noise=noise)


SIZES = {
    "GPT-2 small": Size(12, 768, 12, 0, 50_257, 124.4e6),
    "Llama 3.2 1B": Size(16, 2048, 32, 8192, 128_256, 1.236e9),
    "Llama 2 7B": Size(32, 4096, 32, 11_008, 32_000, 6.738e9),
    "Qwen2.5 0.5B": Size(24, 896, 14, 4864, 151_936, 0.494e9),
    "Qwen2.5 7B": Size(28, 3584, 28, 18_944, 152_064, 7.616e9),
    "Qwen 7B": Size(32, 4096, 32, 11_008, 151_936, 7.721e9),
}
"""Qwen 7B is the one of which the method's critics say that V x H is 8.9%: of 7 billion."""


@dataclass
class Config:
    """Which students, and in blocks of which length."""

    sizes: list[str] = field(default_factory=lambda: list(SIZES))
    """Names of sizes known here."""
    length: int = 1024
    """Block length L."""
    rank: int = 64
    """Rank of the low-rank projection."""
    output: str = "benchmarks/results/noise_cost.json"
    """Where the figures go."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.sizes if name not in SIZES]
        if unknown or not self.sizes:
            raise ValueError(f"sizes names {unknown}; give some of {', '.join(SIZES)}")
        if self.length < 2:
            raise ValueError(f"length is {self.length}; it must be at least 2")


def options(layers: int, rank: int) -> dict[str, NoiseConfig]:
    """What is compared; a draft stands in the middle, three at the quarters."""
    middle, quarters = [max(1, layers // 2)], sorted({max(1, layers * part // 4) for part in (1, 2, 3)})
    return {
        "input, own (paper)": NoiseConfig("gumbel", "replace"),
        f"input, rank {rank}": NoiseConfig("gumbel", "replace", projection="low_rank", rank=rank),
        "input, tied": NoiseConfig("gumbel", "replace", projection="tied"),
        "input, tied + unigram, added": NoiseConfig("gumbel", "add", projection="tied", prior="unigram"),
        "readout": NoiseConfig("gumbel", readout=True),
        "draft": NoiseConfig("gumbel", drafts=middle),
        "draft that restarts": NoiseConfig("gumbel", drafts=middle, draft_restart=True),
        "three drafts": NoiseConfig("gumbel", drafts=quarters),
        "draft without noise": NoiseConfig(drafts=middle),
        "input, own + readout": NoiseConfig("gumbel", "replace", readout=True),
        "input, tied + readout": NoiseConfig("gumbel", "replace", projection="tied", readout=True),
        "input, own + readout + draft": NoiseConfig("gumbel", "replace", readout=True, drafts=middle),
        "input, tied + readout + draft": NoiseConfig("gumbel", "replace", projection="tied", readout=True, drafts=middle),
        "all parts, ours (added, tied, unigram, restart)": NoiseConfig(
            "gumbel", "add", projection="tied", prior="unigram", readout=True, drafts=middle, draft_restart=True
        ),
    }


def count(config: StudentConfig, vocab_size: int, length: int) -> int:
    """Parameters of the student itself, none of which is allocated."""
    with torch.device("meta"):
        return parameters(build(config, vocab_size, length))


def price(config: Config, name: str) -> dict[str, Any]:
    """One size: its student without noise, and every option's addition to it."""
    size = SIZES[name]
    plain, length = size.student(NoiseConfig()), config.length
    own, products = count(plain, size.vocab_size, length), forward(plain, size.vocab_size, length, length) / length
    rows = []
    for option, noise in options(size.layers, config.rank).items():
        added = count(size.student(noise), size.vocab_size, length) - own
        more = noise_flops(noise, size.hidden, size.vocab_size)
        shares = {"of_student": added / own, "of_namesake": added / size.namesake, "of_forward": more / products}
        rows.append({"option": option, "parameters": added, "flops": more, **shares})
    table = size.vocab_size * size.hidden
    return {"name": name, **asdict(size), "parameters": own, "flops": products, "table": table, "table_of_student": table / own, "options": rows}


def run(config: Config) -> list[dict[str, Any]]:
    """Price every size, write the JSON, return its rows."""
    rows = [price(config, name) for name in config.sizes]
    results.write(Path(config.output), asdict(config), {"sizes": rows})
    return rows


COLUMNS = ["option", "parameters", "of the student", "of its namesake", "FLOPs a token", "of the forward"]


def show(config: Config) -> None:
    for row in run(config):
        cells = [
            [option["option"], f"+{option['parameters']:,}", f"{option['of_student']:.2%}", f"{option['of_namesake']:.2%}",
             f"+{option['flops'] / 1e6:,.1f} M", f"{option['of_forward']:.1%}"]
            for option in row["options"]
        ]  # fmt: skip
        caption = f"V x H = {row['vocab_size']:,} x {row['hidden']:,} = {row['table'] / 1e6:,.1f} M; L = {config.length:,}, all masked"
        results.show(f"{row['name']}: {row['parameters'] / 1e6:,.1f} M, {row['flops'] / 1e6:,.0f} MFLOPs a token", COLUMNS, cells, caption)


if __name__ == "__main__":
    sys.exit(results.command("noise_cost", (__doc__ or "").splitlines()[0], Config, show, None))
