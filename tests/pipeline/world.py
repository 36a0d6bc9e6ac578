"""A small world for the pipeline: a corpus of made-up prose, a tokenizer trained on it, a tiny teacher, and the command line in this process."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch

from noise.dataset import Manifest
from noise.storage import sha256_file
from pipeline import plan, prompts
from pipeline.__main__ import main, parse
from pipeline.config import Recipe
from pipeline.extract import Job
from pipeline.generate import Generation
from pipeline.stages import _per_token
from pipeline.teacher import Teacher

VOCAB, BLOCK = 320, 24
WORDS = [
    "river",
    "stone",
    "lantern",
    "quiet",
    "morning",
    "copper",
    "garden",
    "letter",
    "window",
    "harbour",
    "silver",
    "winter",
    "orchard",
    "thunder",
    "meadow",
    "candle",
]


def texts(count: int, seed: int = 0) -> list[str]:
    """Documents of a few hundred characters, no two equal."""
    chance = random.Random(seed)
    return [f"Document {number}: " + " ".join(chance.choices(WORDS, k=chance.randint(5, 60))) + ".\n" for number in range(count)]


def write_corpus(folder: Path, count: int = 40) -> str:
    """One text file a document; returns the glob."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts(count)):
        (folder / f"{number:03d}.txt").write_text(text)
    return str(folder / "*.txt")


def save_teacher(folder: Path, vocab_size: int = VOCAB, poison: str | None = None, tokenizer: Path | None = None) -> Path:
    """A tiny Llama; where `poison` is a text, the embedding of its first token is NaN."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, max_position_embeddings=64, initializer_range=0.5, **shape))
    if poison is not None:
        token = AutoTokenizer.from_pretrained(str(tokenizer))(poison, add_special_tokens=False)["input_ids"][0]
        model.model.embed_tokens.weight.data[token] = torch.nan
    model.save_pretrained(str(folder))
    return folder


class World:
    """Folders of one test, and the options that name them."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str] | None = None):
        self.root, self.capsys = root, capsys
        self.files = write_corpus(root / "corpus")
        self.output = root / "dataset"

    def options(self, **changes: object) -> list[str]:
        """The command line's options; `noise__draws=2` is --noise.draws 2."""
        values: dict[str, object] = {
            "output": self.output,
            "corpus.files": self.files,
            "corpus.held_out": 0.1,
            "tokenizer.path": self.root / "tokenizer",
            "tokenizer.vocab_size": VOCAB,
            "packing.block_length": BLOCK,
            "packing.shard_characters": 1000,
            "teacher.micro_batch": 4,
        } | {name.replace("__", "."): value for name, value in changes.items()}
        return [f"--{name}={'null' if value is None else value}" for name, value in values.items()]

    def run(self, command: str, **changes: object) -> int:
        return main([command, *self.options(**changes)])

    def recipe(self, **changes: object) -> Recipe:
        return parse(["extract", *self.options(**changes)])[1]

    def refusal(self, command: str, **changes: object) -> tuple[int, str]:
        """(exit code, the one line on stderr that begins with error) of a command that must fail."""
        assert self.capsys is not None
        self.capsys.readouterr()
        code = self.run(command, **changes)
        errors = [line for line in self.capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert code != 0 and len(errors) == 1
        return code, errors[0]

    def hashes(self) -> dict[str, str]:
        return shard_hashes(self.output)


def shard_hashes(dataset: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted((dataset / "shards").iterdir())}


def environment() -> dict[str, str]:
    """For subprocesses: the checkout importable, nothing compiled, one thread."""
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}


def make_here(arguments: list[str]) -> None:
    """The dataset as one process makes it, without Ray, shard after shard from the last to the first."""
    command, recipe, _ = parse(arguments)
    fresh, corpus, tokenizer = (prompts if command == "generate" else plan).make_plan(recipe)
    standing = plan.write_plan(recipe, fresh, tokenizer)
    torch.set_num_threads(recipe.teacher.threads)
    teacher = Teacher(recipe.teacher, standing.identity["vocab_size"])
    job = (Generation if command == "generate" else Job)(Path(recipe.output), standing, corpus, tokenizer, teacher)
    for shard in reversed(range(len(standing.shards))):
        job.extract(shard)
    Manifest.write(job.folder, standing, _per_token)
