"""How long a driver takes to resume a large dataset, and how much memory: by listing alone, no receipt is opened.

    python -m benchmarks.driver

A corpus of one-line documents is planned into as many shards, all but a few get a receipt, and `extract` is started in a
process of its own and ended when its first shard is made. Seconds count from its start: until it knows what is missing
(`begin` in run.jsonl), until Ray is up and workers can be given shards, and until the first shard is made.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from noise.dataset import Plan
from noise.receipt import Receipt, shard_name
from noise.storage import DatasetError, canonical_json
from pipeline.__main__ import main as pipeline

Figures = dict[str, Any]
STEPS = {"begin": "what is missing is known", "workers": "Ray is up", "shard": "the first shard is made"}


@dataclass
class Config:
    """How large."""

    shards: int = 100_000
    missing: int = 10
    """Shards without a receipt, evenly spaced."""
    output: str = "benchmarks/results/driver.json"
    """Where the figures go."""

    def __post_init__(self) -> None:
        if not 1 <= self.missing <= self.shards:
            raise ValueError(f"missing is {self.missing}; it must be in [1, {self.shards}], the number of shards")


def make_world(folder: Path, config: Config) -> list[str]:
    """A plan, and receipts for nearly all of it. Returns the command's options."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with (folder / "text.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": f"Document number {at} of many."}) + "\n" for at in range(config.shards))
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=64, **shape)).save_pretrained(str(folder / "teacher"))
    values = {
        "output": folder / "dataset", "corpus.files": folder / "text.jsonl", "corpus.split": "all", "tokenizer.path": folder / "tokenizer",
        "tokenizer.vocab_size": 300, "packing.shard_characters": 1, "teacher.model": folder / "teacher", "ray.workers": 1,
    }  # fmt: skip
    options = [f"--{name}={value}" for name, value in values.items()]
    for command in ("tokenizer", "plan"):
        if pipeline([command, *options]) != 0:
            raise DatasetError(f"`python -m pipeline {command}` failed")
    write_receipts(folder / "dataset", config)
    return options


def write_receipts(dataset: Path, config: Config) -> None:
    """Receipts of shards that were never made, for all but the missing ones."""
    count = len(Plan.read(dataset).shards)
    absent = {at * count // config.missing for at in range(config.missing)}
    (dataset / "shards").mkdir()
    for shard in set(range(count)) - absent:
        receipt = Receipt(shard, shard_name(shard), "0" * 64, 4096, 1, 20, 60, 0, 100.0, 30)
        (dataset / "shards" / f"{shard:05d}.json").write_text(canonical_json(receipt.to_json()))


def resume(dataset: Path, options: list[str]) -> Figures:
    """Start the driver; seconds until each step, and the most memory that it had by then."""
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "pipeline", "extract", *options], stderr=subprocess.PIPE, text=True)
    seconds: dict[str, float] = {}
    memory = 0
    try:
        for event in _events(dataset / "run.jsonl", process):
            seconds.setdefault(event, time.monotonic() - began)
            memory = max(memory, _peak(process.pid))
            if event == "shard":
                break
    finally:
        process.kill()
        error = process.communicate()[1]
    if "shard" not in seconds:
        raise DatasetError(f"the driver made no shard: {error.strip().splitlines()[-1] if error.strip() else 'it said nothing'}")
    return {"seconds": {step: seconds[step] for step in STEPS}, "peak_bytes": memory}


def _events(path: Path, process: subprocess.Popen[str]) -> Iterator[str]:
    """The names of the events, as they are written, until the process ends."""
    seen = 0
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            lines = path.read_text().split("\n")[:-1]
            yield from (json.loads(line)["event"] for line in lines[seen:])
            seen = len(lines)
        time.sleep(0.02)


def _peak(pid: int) -> int:
    """Most resident memory so far, bytes; 0 where the system does not tell."""
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def work(config: Config) -> Figures:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = make_world(folder, config)
        figures = resume(folder / "dataset", options) | {"plan_bytes": (folder / "dataset" / "plan.json").stat().st_size}
    results.write(Path(config.output), {name: value for name, value in asdict(config).items() if name != "output"}, figures)
    rows = [(f"seconds until {words}", f"{figures['seconds'][step]:.1f}") for step, words in STEPS.items()]
    rows += [("peak memory, MB", f"{figures['peak_bytes'] / 1e6:,.0f}"), ("plan.json, MB", f"{figures['plan_bytes'] / 1e6:,.1f}")]
    results.show(f"resuming {config.shards:,} shards of which {config.missing:,} are missing", ["the driver", ""], rows, "from the command on")
    return figures


def main(arguments: list[str] | None = None) -> int:
    return results.command("driver", str(__doc__), Config, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
