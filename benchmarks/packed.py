"""What a forward of a causal LM takes on a CPU with its weights laid out once (pipeline/packed.py), and as torch has them, in the same run.

    python -m benchmarks.packed

A GPT-2 of random weights, float32, reads some tokens behind a KV cache of 64: one (plain sampling), as many as a draft and one (exact drafting
judges them), and whole rows without a cache (extraction). Each time is a median over rounds in which both take their turns. What matters
to drafting is the ratio of several tokens to one. Under a minute on one core.
"""

from __future__ import annotations

import copy
import functools
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, results
from pipeline.packed import pack

CACHED = 64


@dataclass
class Config:
    """The model and the work. The defaults are GPT-2's."""

    layers: int = 12
    """Transformer layers."""
    hidden: int = 768
    """Width."""
    heads: int = 12
    """Attention heads."""
    vocab_size: int = 50257
    """Entries."""
    tokens: list[int] = field(default_factory=lambda: [1, 2, 5, 9])
    """Tokens of a forward behind a cache; the first is what the others are compared with."""
    rows: int = 2
    """Rows of a whole forward."""
    length: int = 512
    """Their positions."""
    threads: int = 1
    """Of torch."""
    rounds: int = 9
    """Times are medians over so many rounds."""
    output: str = "benchmarks/results/packed.json"
    """Where the figures go."""

    def __post_init__(self) -> None:
        if not self.tokens or min(self.tokens) < 1:
            raise ValueError(f"tokens is {self.tokens}; give at least one number, each from 1 up")


def measure(config: Config) -> dict[str, Any]:
    """Seconds of each forward, and the ratios."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"n_layer": config.layers, "n_embd": config.hidden, "n_head": config.heads, "vocab_size": config.vocab_size}
    plain = GPT2LMHeadModel(GPT2Config(n_positions=max(CACHED + max(config.tokens), config.length), **shape)).eval()
    packed = copy.deepcopy(plain)
    pack(packed, "packed", "run it on a processor")
    cpu, works = torch.device("cpu"), {}
    for name, model in (("plain", plain), ("packed", packed)):
        for tokens in config.tokens:
            works[f"{name}, {tokens} tokens"] = functools.partial(_behind, model, _cached(model), tokens)
        works[f"{name}, whole rows"] = functools.partial(_whole, model, config.rows, config.length)
    times = machine.rounds(works, config.rounds, cpu)
    seconds = {name: machine.median(values) for name, values in times.items()}
    kinds = [f"{tokens} tokens" for tokens in config.tokens] + ["whole rows"]
    return {
        "seconds": seconds,
        "packed_over_plain": {kind: machine.ratio(times, f"packed, {kind}", f"plain, {kind}") for kind in kinds},
        "over_the_first": {
            name: {kind: machine.ratio(times, f"{name}, {kind}", f"{name}, {kinds[0]}") for kind in kinds[:-1]} for name in ("plain", "packed")
        },
    }


@torch.inference_mode()
def _cached(model: Any) -> Any:
    return model(input_ids=torch.zeros(1, CACHED, dtype=torch.int64), use_cache=True).past_key_values


@torch.inference_mode()
def _behind(model: Any, cache: Any, tokens: int) -> None:
    """Tokens behind the cache, which is as it was afterwards."""
    model(input_ids=torch.zeros(1, tokens, dtype=torch.int64), past_key_values=cache, use_cache=True)
    cache.crop(-tokens)


@torch.inference_mode()
def _whole(model: Any, rows: int, length: int) -> None:
    model(input_ids=torch.zeros(rows, length, dtype=torch.int64), use_cache=False, logits_to_keep=1)


def run(config: Config) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        figures = measure(config)
    finally:
        torch.set_num_threads(before)
    results.write(Path(config.output), asdict(config), figures)
    rows = []
    for kind, value in figures["packed_over_plain"].items():
        own = [f"{figures['over_the_first'][name][kind]:.2f}" if kind in figures["over_the_first"][name] else "" for name in ("plain", "packed")]
        seconds = [f"{figures['seconds'][f'{name}, {kind}']:.4f}" for name in ("plain", "packed")]
        rows.append([kind, *seconds, f"{value:.2f}", *own])
    head = ["a forward over", "plain, s", "packed, s", "packed / plain", f"plain / its {config.tokens[0]}", f"packed / its {config.tokens[0]}"]
    results.show(f"{config.layers} layers of {config.hidden}, V {config.vocab_size:,}, {config.threads} thread(s)", head, rows, "medians over rounds")


def main(arguments: list[str] | None = None) -> int:
    return results.command("packed", __doc__ or "", Config, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
