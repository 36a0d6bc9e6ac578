"""What noise adds to a student's training step: from the sketch, and from a teacher in the loop.

    python -m benchmarks.decode
    python -m benchmarks.decode --dtype bfloat16 --micro_batch 16 --block_length 1024     (on a GPU)

A step is forward and backward of an MDLM student of GPT-2's size on random rows, with about half of the positions masked:

* no noise: the student's twin; floor: the same, and the bare product of an [N, V] matrix with weights [V, H], with the weights' gradient;
* input: softmax(g) through V x H weights (the paper), the noise decoded from the sketch a chunk at a time, and again in backward;
* input, made: the same, with g and softmax(g) as [N, V] in memory;
* readout: a learned scale times g added to the logits, and nothing at the input; made once, or streamed;
* teacher in the loop: `input, made` with g from a GPT-2 of the same size, by dense extraction as first published.

Beside them: the decoder alone and the machine's limits for it (as in benchmarks/encode.py). About three minutes on 2 cores.
Shapes: B rows, L positions, N masked positions, V vocabulary, H hidden.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import encode as encoder
from benchmarks import machine, results
from noise import philox
from noise.sketch import Codec, Sketch, encode
from trainer.chance import Chance
from trainer.config import NoiseConfig, StudentConfig
from trainer.data import Batch
from trainer.streamed import chunk
from trainer.students.mdlm import MDLM

Figures = dict[str, Any]
INPUT = NoiseConfig(kind="gumbel", input="replace")
READOUT = NoiseConfig(kind="gumbel", readout=True)


@dataclass
class Config:
    """The student and the work. The defaults are GPT-2's."""

    layers: int = 12
    """Transformer layers, of student and teacher."""
    hidden: int = 768
    """Width."""
    heads: int = 12
    """Attention heads."""
    vocab_size: int = 50257
    """Entries."""
    dtype: str = "float32"
    """float32, or bfloat16 for autocast and the teacher's weights."""
    micro_batch: int = 2
    """Rows B."""
    block_length: int = 256
    """Positions L."""
    rounds: int = 5
    """Times are medians over so many rounds."""
    teacher: bool = True
    """Whether to measure a teacher in the loop as well."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu or cuda."""
    output: str = "benchmarks/results/decode.json"
    """Where the figures go."""


class Made(MDLM):
    """A student whose noise is [N, V] in memory before it is used."""

    def _noise(self, *arguments: Any) -> Any:
        return super()._noise(*arguments).dense()


class InTheLoop(MDLM):
    """A student whose noise comes from the teacher, in every step."""

    make: Callable[[], Tensor]

    def _noise(self, batch: Batch, chance: Chance, where_N: Tensor, noise_of: Batch | None) -> Any:
        return self.make()[where_N]


def random_batch(config: Config, device: torch.device) -> Batch:
    """Random rows with the sketch of a teacher whose likely tokens have about the probabilities of a language model's."""
    B, L, V = config.micro_batch, config.block_length, config.vocab_size
    codec, random = Codec(V), torch.Generator().manual_seed(1)
    ids_BL = torch.randint(V, (B, L), generator=random)
    place_N = torch.arange(B * L)
    rows_N5 = philox.rows(7, place_N // L, place_N % L)
    parts: list[Sketch] = []
    for rows_n5, token_n in zip(rows_N5.split(64), ids_BL.flatten().split(64), strict=True):
        logits_nV = 3 * torch.randn(len(token_n), V, generator=random)
        parts.append(encode(logits_nV, token_n, rows_n5, codec, logits_nV.logsumexp(1)))
    sketch = Sketch(*(torch.cat(tensors) for tensors in zip(*(part.tensors() for part in parts), strict=True)))
    row_B, nought_B = torch.arange(B), torch.zeros(B, dtype=torch.int64)
    batch = Batch(
        ids_BL, torch.full((B,), L), row_B, torch.full((B,), 7), nought_B, nought_B, row_B, sketch, "parallel", codec, False
    )  # fmt: skip
    return batch.to(device)


def step(student: MDLM, batch: Batch, dtype: str, more: Callable[[], Tensor] | None = None) -> None:
    """Forward and backward."""
    device = batch.length_B.device.type
    with torch.autocast(device, dtype=torch.bfloat16) if dtype == "bfloat16" else nullcontext():
        loss = student(batch, Chance(1, 1, len(batch.length_B)))[0]
        if more is not None:
            loss = loss + more()
    loss.backward()
    student.zero_grad(set_to_none=True)


def works(config: Config, batch: Batch, device: torch.device) -> dict[str, Callable[[], object]]:
    """The steps by name."""

    def student(kind: type[MDLM], noise: NoiseConfig) -> Any:
        torch.manual_seed(0)
        settings = StudentConfig(layers=config.layers, hidden=config.hidden, heads=config.heads, noise=noise)
        return kind(settings, config.vocab_size, config.block_length).to(device)

    def one(kind: type[MDLM], noise: NoiseConfig) -> Callable[[], object]:
        made = student(kind, noise)
        return lambda: step(made, batch, config.dtype)

    twin = student(MDLM, NoiseConfig())
    weight_HV = torch.randn(config.hidden, config.vocab_size, device=device, requires_grad=True)
    share_NV = torch.rand(masked(batch), config.vocab_size, device=device)

    def product() -> Tensor:
        weight_HV.grad = None
        return torch.nn.functional.linear(share_NV, weight_HV).sum()

    named: dict[str, Callable[[], object]] = {
        "no noise": lambda: step(twin, batch, config.dtype),
        "floor": lambda: step(twin, batch, config.dtype, product),
        "input": one(MDLM, INPUT),
        "input, made": one(Made, INPUT),
        "readout": one(MDLM, READOUT),
        "readout, streamed": one(MDLM, NoiseConfig(kind="gumbel", readout=True, stream=True)),
    }
    if config.teacher:
        looped = student(InTheLoop, INPUT)
        looped.make = in_the_loop(config, batch, device)
        named["teacher in the loop"] = lambda: step(looped, batch, config.dtype)
    return named


def masked(batch: Batch) -> int:
    """N of the step."""
    chance = Chance(1, 1, len(batch.length_B))
    return int((chance.masked(batch.sequence_id_B, chance.times(batch.place_B), batch.input_ids_BL.shape[1]) & batch.valid_BL).sum())


def in_the_loop(config: Config, batch: Batch, device: torch.device) -> Callable[[], Tensor]:
    """Dense extraction from a GPT-2, as first published: g of all positions, float32 [B L, V]."""
    from transformers import AutoModelForCausalLM

    size = encoder.Config(layers=config.layers, hidden=config.hidden, heads=config.heads, dtype=config.dtype, block_length=config.block_length)
    with tempfile.TemporaryDirectory() as folder:
        saved = encoder.gpt2(size, config.vocab_size, Path(folder))
        teacher = AutoModelForCausalLM.from_pretrained(saved, dtype=getattr(torch, config.dtype)).to(device).eval()

    @torch.no_grad()
    def make() -> Tensor:
        logits_BLV = teacher(input_ids=batch.input_ids_BL, use_cache=False).logits.roll(1, 1)  # of the token at t, from t - 1
        return encoder.published(logits_BLV.flatten(0, 1), batch.input_ids_BL.flatten())

    return make


def alone(config: Config, device: torch.device) -> Figures:
    """Microseconds a position of the decoder, and its limits; one thread on a CPU."""
    count = 4096 if device.type == "cuda" else 40
    batch = random_batch(Config(vocab_size=config.vocab_size, micro_batch=1, block_length=count), device)
    lazy = batch.lazy_noise_at(torch.arange(count, device=device))
    threads, size = torch.get_num_threads(), chunk(lazy, device)
    torch.set_num_threads(1)
    try:
        ceiling_N = lazy.ceiling()
        times = {
            "g": machine.best(lazy.dense, device) / count,
            "g in chunks": machine.best(lambda: [None for _ in lazy.chunks(size)], device) / count,
            "exp(g) in chunks": machine.best(lambda: [None for _ in lazy.rates(size, ceiling_N)], device) / count,
        }
    finally:
        torch.set_num_threads(threads)
    limits = {"bytes_a_second": machine.bandwidth(device), "products_a_second": machine.products(device)}
    least = {
        "bandwidth": config.vocab_size * 4 / limits["bytes_a_second"],
        "integer": -(-config.vocab_size // 4) * machine.PRODUCTS_A_BLOCK / limits["products_a_second"],
    }
    micro = {name: 1e6 * value for name, value in (times | least).items()}
    return {"limits": limits, "microseconds_a_position": micro, "over_limit": times["exp(g) in chunks"] / max(least.values())}


def run(config: Config) -> Figures:
    """Measure, write the JSON, return the figures."""
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device)
    batch = random_batch(config, device)
    named = works(config, batch, device)
    times = machine.rounds(named, config.rounds, device)
    steps = {
        name: {
            "seconds": machine.median(values),
            "over_floor": machine.ratio(times, name, "floor"),
            "over_loop": machine.ratio(times, name, "teacher in the loop") if config.teacher else None,
            "peak_bytes": machine.peak_memory(named[name], device),
        }
        for name, values in times.items()
    }
    figures = {"device": str(device), "positions": config.micro_batch * config.block_length, "masked": masked(batch), "steps": steps}
    if config.teacher:  # of what noise costs: our share of a teacher's
        figures["noise_over_loops_noise"] = machine.median(
            [(ours - none) / (loop - none) for ours, loop, none in zip(times["input"], times["teacher in the loop"], times["no noise"], strict=True)]
        )
    figures["decoder"] = alone(config, device)
    settings = {name: value for name, value in asdict(config).items() if name != "output"}
    results.write(Path(config.output), settings, figures)
    return figures


def show(config: Config, figures: Figures) -> None:
    """Print the tables."""
    rows = [
        [
            name,
            f"{row['seconds']:.3f}",
            f"{row['over_floor']:.3f}",
            f"{row['over_loop']:.3f}" if config.teacher else "",
            f"{row['peak_bytes'] / 1e6:,.0f}",
        ]
        for name, row in figures["steps"].items()
    ]
    title = (
        f"A step of {config.layers} layers of {config.hidden}, V = {config.vocab_size:,}, {figures['positions']} positions, "
        f"{figures['masked']} masked, {figures['device']}"
    )
    share = f"; input's noise costs {figures['noise_over_loops_noise']:.2f} of the loop's" if config.teacher else ""
    results.show(title, ("step", "seconds", "over floor", "over loop", "peak memory, MB"), rows, f"medians of {config.rounds} rounds{share}")
    micro = figures["decoder"]["microseconds_a_position"]
    caption = f"exp(g) in chunks takes {figures['decoder']['over_limit']:.1f}x the larger limit"
    results.show("The decoder alone, us a position", tuple(micro), [[f"{value:.1f}" for value in micro.values()]], caption)


def main(arguments: list[str] | None = None) -> int:
    return results.command("decode", __doc__ or "", Config, lambda config: show(config, run(config)), arguments)


if __name__ == "__main__":
    sys.exit(main())
