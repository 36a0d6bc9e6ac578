"""How well a second worker helps, and what a worker does beside its teacher.

    python -m benchmarks.scale

Datasets are extracted by the pipeline as it is, on a local Ray, with every worker pinned to one core, by one worker and by two
in turn, several rounds; ratios are taken within a round, since what disturbs a shared machine disturbs neighbours alike.
What run.jsonl says of every shard gives

* tokens a second, from the first shard's beginning to the last one's end; efficiency = two workers' rate / (2 x one's),
* the same by the processor time that the teacher took, which other people's load on the machine does not touch: what two
  workers lose there is lost in the caches and the memory that they share,
* the share of a worker's time in which its teacher did not run: waiting for shards to be handed out, read or written,
* the share of its processor time that went into everything else (reading, tokenising, packing, writing, hashing). On a GPU that
  is beside the teacher; on one core it is taken from it.

About a minute a run for the default on one slow core.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.machine import median
from noise.storage import DatasetError
from pipeline.__main__ import main as pipeline

Figures = dict[str, Any]


@dataclass
class Config:
    """The teacher and the work."""

    layers: int = 6
    hidden: int = 384
    heads: int = 6
    vocab_size: int = 16384
    """Width of the teacher's logits; text is tokenised into 1,024 of them."""
    block_length: int = 128
    micro_batch: int = 8
    shard_characters: int = 12_000
    shards: int = 12
    """About as many are made by each run."""
    rounds: int = 3
    """Runs of one worker, and of two."""
    output: str = "benchmarks/results/scale.json"
    """Where the figures go."""

    def __post_init__(self) -> None:
        if self.vocab_size < 1024 or self.shards < 4:
            raise ValueError(f"vocab_size is {self.vocab_size} and shards is {self.shards}; they must be at least 1024 and 4")


def make_world(folder: Path, config: Config) -> None:
    """A corpus of so much of the default text, its tokenizer, and a teacher with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from pipeline import embedded

    left = config.shard_characters * config.shards
    with (folder / "text.jsonl").open("w") as file:
        for text in embedded.documents():
            if left > 0 and len(text) < config.shard_characters:
                file.write(json.dumps({"text": text}) + "\n")
                left -= len(text)
    torch.manual_seed(0)
    shape = {"hidden_size": config.hidden, "intermediate_size": 4 * config.hidden, "num_hidden_layers": config.layers}
    settings = LlamaConfig(vocab_size=config.vocab_size, num_attention_heads=config.heads, max_position_embeddings=config.block_length, **shape)
    LlamaForCausalLM(settings).save_pretrained(str(folder / "teacher"))
    run("tokenizer", folder, config)


def run(command: str, folder: Path, config: Config, **changes: object) -> None:
    """One command of the pipeline. Raises DatasetError when it fails; it has said why."""
    values: dict[str, object] = {
        "corpus.files": folder / "text.jsonl",
        "corpus.split": "all",
        "tokenizer.path": folder / "tokenizer",
        "tokenizer.vocab_size": 1024,
        "packing.block_length": config.block_length,
        "packing.shard_characters": config.shard_characters,
        "teacher.model": folder / "teacher",
        "teacher.micro_batch": config.micro_batch,
        "ray.pinned": "true",
    } | {name.replace("__", "."): value for name, value in changes.items()}
    if pipeline([command, *(f"--{name}={value}" for name, value in values.items())]) != 0:
        raise DatasetError(f"`python -m pipeline {command}` failed")


def measure(folder: Path, config: Config, workers: int, name: str) -> Figures:
    """One extraction by so many workers."""
    dataset = folder / name
    run("extract", folder, config, output=dataset, ray__workers=workers)
    events = [json.loads(line) for line in (dataset / "run.jsonl").read_text().splitlines()]
    return of_shards([event for event in events if event["event"] == "shard"])


def of_shards(made: list[Figures]) -> Figures:
    """What the events of a run's shards say."""
    tokens = sum(event["receipt"]["tokens"] for event in made)
    seconds = _span(made)
    of_workers = [[event for event in made if event["pid"] == pid] for pid in sorted({event["pid"] for event in made})]
    held = sum(map(_span, of_workers))
    teacher, processor, beside = (sum(event[name] for event in made) for name in ("teacher_seconds", "teacher_processor_seconds", "beside_seconds"))
    return {
        "workers": len(of_workers),
        "shards": len(made),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_a_second": tokens / seconds,
        "tokens_a_processor_second": tokens / processor,
        "idle": max(0.0, 1 - teacher / held),
        "beside": beside / (beside + processor),
    }


def _span(made: list[Figures]) -> float:
    """Seconds from the first shard's beginning to the last one's end."""
    return float(max(event["began"] + event["seconds"] for event in made) - min(event["began"] for event in made))


def summary(runs: list[dict[str, Figures]]) -> Figures:
    """Medians over the rounds, {"one": figures, "two": figures} each."""
    return {
        "efficiency": median([one["two"]["tokens_a_second"] / (2 * one["one"]["tokens_a_second"]) for one in runs]),
        "efficiency_of_processor_time": median([one["two"]["tokens_a_processor_second"] / one["one"]["tokens_a_processor_second"] for one in runs]),
        **{name: {kind: median([one[name][kind] for one in runs]) for kind in ("tokens_a_second", "idle", "beside")} for name in ("one", "two")},
    }


def work(config: Config) -> Figures:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_world(folder, config)
        runs = [{word: measure(folder, config, workers, f"{word}-{at}") for word, workers in (("one", 1), ("two", 2))} for at in range(config.rounds)]
    figures = {"summary": summary(runs), "rounds": runs}
    results.write(Path(config.output), {name: value for name, value in asdict(config).items() if name != "output"}, figures)
    show(figures)
    return figures


def show(figures: Figures) -> None:
    said = figures["summary"]
    rows = [(name, f"{said[name]['tokens_a_second']:,.0f}", f"{said[name]['idle']:.1%}", f"{said[name]['beside']:.1%}") for name in ("one", "two")]
    results.show(
        "workers, each on a core of its own", ["workers", "tokens/s", "teacher does not run", "processor time beside it"], rows,
        f"efficiency of two {said['efficiency']:.2f}; of the teacher's processor time alone {said['efficiency_of_processor_time']:.2f}",
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    return results.command("scale", str(__doc__), Config, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
