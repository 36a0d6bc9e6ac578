"""What extraction adds to the teacher's forward: ours, and dense extraction as first published.

    python -m benchmarks.encode
    python -m benchmarks.encode --layers 36 --hidden 1280 --heads 20 --dtype bfloat16 --micro_batch 16 --block_length 1024     (GPT-2-Large, on a GPU)

Random weights, random tokens: neither changes the work. A micro-batch of rows goes through the pipeline's own code:

* forward: the teacher's logits, chunk by chunk, thrown away;
* sketch: the same, with everything that a shard's rows need (`pipeline.extract.rows_with_noise`);
* published: the same logits, all at once, then probabilities, their logarithm, dense Gumbels and the dense posterior in float32.

Beside the times: how far the encoder alone is from the machine's limit, the larger of reading the logits once at memory
bandwidth and making V/4 Philox blocks at the rate of bare 32-bit products (one core); and the memory that each needs
beyond the forward. About two minutes on 2 cores. Shapes: B rows, L positions, N = B (L - 1), V vocabulary.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import machine, results
from noise import philox
from noise.shard import FORMAT_VERSION, ShardMetadata
from noise.sketch import Codec, encode, normaliser

Figures = dict[str, Any]


@dataclass
class Config:
    """The teacher and the work. The defaults are GPT-2's."""

    layers: int = 12
    """Transformer layers."""
    hidden: int = 768
    """Width."""
    heads: int = 12
    """Attention heads."""
    dtype: str = "float32"
    """Of weights and activations."""
    vocab_sizes: list[int] = field(default_factory=lambda: [2048, 50257, 151936])
    """One row of the table each."""
    micro_batch: int = 2
    """Rows B."""
    block_length: int = 256
    """Positions L."""
    epsilon: float = 0.125
    """Of the sketch."""
    draws: int = 1
    """Of the sketch."""
    rounds: int = 5
    """Times are medians over so many rounds."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu or cuda."""
    output: str = "benchmarks/results/encode.json"
    """Where the figures go."""

    def codec(self, vocab_size: int) -> Codec:
        return Codec(vocab_size, self.epsilon, self.draws)


def gpt2(config: Config, vocab_size: int, folder: Path) -> str:
    """Save a GPT-2 of this size with random weights; returns its folder."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    settings = GPT2Config(
        vocab_size=vocab_size, n_positions=config.block_length, n_embd=config.hidden, n_layer=config.layers, n_head=config.heads,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(settings).to(getattr(torch, config.dtype)).save_pretrained(folder)
    return str(folder)


def published(logits_NV: Tensor, token_N: Tensor) -> Tensor:
    """Dense posterior Gumbels, float32 [N, V], by the formulas as first published."""
    log_p_NV = logits_NV.float().softmax(-1).log()
    zeta_NV = -torch.log(-torch.log(torch.rand_like(log_p_NV)))
    zeta0_N1 = -torch.log(-torch.log(torch.rand(len(token_N), 1, device=token_N.device)))
    g_NV = -torch.log(torch.exp(-zeta_NV) + log_p_NV.exp() * torch.exp(-zeta0_N1))
    return g_NV.scatter(1, token_N[:, None], zeta0_N1 - log_p_NV.gather(1, token_N[:, None]))


def measure(config: Config, vocab_size: int, device: torch.device, limits: Figures) -> Figures:
    """One row of the table."""
    from pipeline import config as recipe
    from pipeline.extract import rows_with_noise
    from pipeline.teacher import CHUNK_ENTRIES, Teacher

    B, L = config.micro_batch, config.block_length
    codec = config.codec(vocab_size)
    metadata = ShardMetadata(FORMAT_VERSION, "1", codec.epsilon, codec.step, codec.draws, vocab_size, L, "parallel", 0, "0" * 64)
    with tempfile.TemporaryDirectory() as folder:
        teacher = Teacher(recipe.Teacher(model=gpt2(config, vocab_size, Path(folder)), dtype=config.dtype), vocab_size, str(device))
    ids_BL = torch.randint(vocab_size, (B, L), generator=torch.Generator().manual_seed(1))
    at_N = torch.arange(B * L).view(B, L)[:, 1:].flatten()
    sequence_id_B, length_B = np.arange(B, dtype=np.uint64), np.full(B, L, np.int32)
    token_N = ids_BL.flatten()[at_N].to(device)

    def forward() -> None:
        for _ in teacher.scores(ids_BL, at_N - 1):
            pass

    def dense() -> None:
        published(torch.cat([scores_NV for _, scores_NV in teacher.scores(ids_BL, at_N - 1)]), token_N)

    works: dict[str, Callable[[], object]] = {
        "forward": forward,
        "sketch": lambda: rows_with_noise(metadata, sequence_id_B, ids_BL.numpy().astype(np.int32), length_B, teacher=teacher),
        "published": dense,
    }
    times = machine.rounds(works, config.rounds, device)
    peak = {name: machine.peak_memory(work, device) for name, work in works.items()}
    figures: Figures = {
        "vocab_size": vocab_size,
        "positions": B * (L - 1),
        "tokens_a_second": {name: B * (L - 1) / machine.median(values) for name, values in times.items()},
        "over_forward": {name: machine.ratio(times, name, "forward") - 1 for name in ("sketch", "published")},
        "peak_bytes_beyond_forward": {name: max(0, peak[name] - peak["forward"]) for name in ("sketch", "published")},
        "chunk_bytes": CHUNK_ENTRIES * torch.empty(0, dtype=getattr(torch, config.dtype)).element_size(),
    }
    return figures | _encoder_alone(codec, device, limits, getattr(torch, config.dtype))


def _encoder_alone(codec: Codec, device: torch.device, limits: Figures, dtype: torch.dtype) -> Figures:
    """Microseconds a position of the encoder on logits that are there, of its parts, and of its limits; one thread on a CPU."""
    count = max(1, 2**21 // codec.vocab_size) * (16 if device.type == "cuda" else 1)
    logits_NV = (3 * torch.randn(count, codec.vocab_size, generator=torch.Generator().manual_seed(2))).to(device, dtype)
    token_N, place_N = torch.zeros(count, dtype=torch.int64, device=device), torch.arange(count)
    rows_N5 = philox.rows(1, place_N, place_N).to(device)
    normaliser_N = normaliser(logits_NV)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = {
            "normaliser": machine.best(lambda: normaliser(logits_NV), device) / count,
            "encode": machine.best(lambda: encode(logits_NV, token_N, rows_N5, codec, normaliser_N), device) / count,
        }
    finally:
        torch.set_num_threads(threads)
    least = {
        "bandwidth": codec.vocab_size * logits_NV.element_size() / limits["bytes_a_second"],
        "integer": codec.draws * -(-codec.vocab_size // 4) * machine.PRODUCTS_A_BLOCK / limits["products_a_second"],
    }
    stream = machine.native_stream(codec.vocab_size) if device.type == "cpu" else None
    micro = {name: 1e6 * value for name, value in (one | least | ({"stream": stream * codec.draws} if stream else {})).items()}
    return {"microseconds_a_position": micro, "over_limit": one["encode"] / max(least.values())}


def run(config: Config) -> Figures:
    """Measure every vocabulary, write the JSON, return its figures."""
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device)
    limits = {"bytes_a_second": machine.bandwidth(device), "products_a_second": machine.products(device)}
    figures = {"device": str(device), "limits": limits, "vocabularies": [measure(config, size, device, limits) for size in config.vocab_sizes]}
    settings = {name: value for name, value in asdict(config).items() if name != "output"}
    results.write(Path(config.output), settings, figures)
    return figures


def show(config: Config, figures: Figures) -> None:
    """Print the table."""
    limits = figures["limits"]
    title = f"{config.layers} layers of {config.hidden}, {config.dtype}, {config.micro_batch} x {config.block_length} tokens, {figures['device']}"
    caption = (
        f"limit: {limits['bytes_a_second'] / 1e9:.1f} GB/s, {limits['products_a_second'] / 1e9:.2f} G products/s"
        f"{' on one core' if figures['device'] == 'cpu' else ''}; memory: beyond the forward's own, MB"
    )
    columns = ("V", "forward, tokens/s", "+ sketch", "+ published", "encode, us", "of it stream", "limit, us", "over limit", "memory", "published")
    rows = []
    for row in figures["vocabularies"]:
        micro, memory = row["microseconds_a_position"], row["peak_bytes_beyond_forward"]
        least = "bandwidth" if micro["bandwidth"] > micro["integer"] else "integer"
        rows.append([
            f"{row['vocab_size']:,}", f"{row['tokens_a_second']['forward']:,.0f}", f"{row['over_forward']['sketch']:+.1%}",
            f"{row['over_forward']['published']:+.1%}", f"{micro['encode']:.2f}", f"{micro['stream']:.2f}" if "stream" in micro else "",
            f"{micro[least]:.2f} {least}", f"{row['over_limit']:.2f}x", f"{memory['sketch'] / 1e6:.0f}", f"{memory['published'] / 1e6:.0f}",
        ])  # fmt: skip
    results.show(title, columns, rows, caption)


def main(arguments: list[str] | None = None) -> int:
    return results.command("encode", __doc__ or "", Config, lambda config: show(config, run(config)), arguments)


if __name__ == "__main__":
    sys.exit(main())
