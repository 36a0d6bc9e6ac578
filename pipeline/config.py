"""The recipe of a dataset: every setting, with its default and its help.

A recipe is a YAML file of these fields; the command line overrides any of them by its dotted name. A key that is not
here is an error. What is resolved is saved beside the artefact as recipe.yaml.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path


class WorkError(RuntimeError):
    """Work that was begun and failed. The message is for people; what is committed stays."""


HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass
class Corpus:
    """Which text."""

    files: str | list[str] | None = None
    """Glob or list of globs: text, .jsonl or .parquet, also .gz and .zst; null = the prose that every Python carries."""
    text_field: str = "text"
    """Column with the text, in .jsonl and .parquet."""
    held_out: float = 0.05
    """Share of documents, chosen by their content, that training never sees."""
    split: str = "train"
    """Which documents: train, held_out or all."""

    def __post_init__(self) -> None:
        _one_of("corpus.split", self.split, ("train", "held_out", "all"))
        if not 0 <= self.held_out < 1:
            raise ValueError(f"corpus.held_out is {self.held_out}; it is a share of the documents, in [0, 1)")
        if self.split == "held_out" and self.held_out == 0:
            raise ValueError("corpus.split is held_out but corpus.held_out is 0: there is nothing to read")


@dataclass
class Tokenizer:
    """How text becomes tokens."""

    path: str | None = None
    """Folder of the tokenizer; null = the teacher's own. Giving --teacher.model without --tokenizer.path means null."""
    vocab_size: int = 512
    """Entries of a tokenizer that is trained here: 256 bytes, BOS, EOS, and merges."""

    def __post_init__(self) -> None:
        if self.vocab_size < 258:
            raise ValueError(f"tokenizer.vocab_size is {self.vocab_size}; 256 bytes, BOS and EOS need at least 258")


@dataclass
class Packing:
    """How documents become rows."""

    block_length: int = 32
    """Positions in a row, BOS included."""
    policy: str = "concat"
    """concat: every document ends in EOS, they follow each other, and are cut in blocks that begin with BOS; none is lost."""
    shard_characters: int = 4_000_000
    """A shard ends with the document that reaches this many characters; its last row is padded."""

    def __post_init__(self) -> None:
        _one_of("packing.policy", self.policy, ("concat",))
        if not 2 <= self.block_length <= 2**24:
            raise ValueError(f"packing.block_length is {self.block_length}; it must be in [2, 2^24]")
        _at_least("packing.shard_characters", self.shard_characters, 1)


@dataclass
class Teacher:
    """Whose noise."""

    model: str | None = None
    """Folder or hub id of a causal LM with safetensors weights."""
    revision: str | None = None
    """Branch, tag or commit on the hub; it is resolved to a commit."""
    dtype: str = "float32"
    """Of weights and activations: float32, bfloat16 or float16. Log-probs are float32 always."""
    attention: str = "sdpa"
    """Attention implementation: sdpa, eager, flash_attention_2, ..."""
    micro_batch: int = 16
    """Rows in one forward pass. Part of the plan: floating point differs between batch shapes."""
    threads: int = 1
    """CPU threads of a worker's teacher. Part of the plan, so bytes do not depend on the number of workers."""
    temperature: float = 1.0
    """The logits are divided by it."""

    def __post_init__(self) -> None:
        _one_of("teacher.dtype", self.dtype, ("float32", "bfloat16", "float16"))
        _at_least("teacher.micro_batch", self.micro_batch, 1)
        _at_least("teacher.threads", self.threads, 1)
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"teacher.temperature is {self.temperature}; it must be above 0 and finite")


@dataclass
class Noise:
    """What is kept of the noise."""

    extraction: str = "parallel"
    """parallel: the posterior noise of the corpus under the teacher. none: tokens alone, no teacher."""
    epsilon: float = 0.125
    """Largest error of the noise in nats, from 2^-10 to below ln 2."""
    draws: int = 1
    """Independent draws of noise that the shards serve."""
    compile: bool | None = None
    """Compile the encoder: 20 to 60 seconds a worker, then 3 times faster or more; null = where the corpus is large enough. Part of the plan."""
    seed: int | None = None
    """Seed of the noise stream, 64 bits; null = derived from everything else in the dataset's identity."""

    def __post_init__(self) -> None:
        _one_of("noise.extraction", self.extraction, ("parallel", "none"))
        if self.seed is not None and not 1 <= self.seed < 2**64:
            raise ValueError(f"noise.seed is {self.seed}; it must be in [1, 2^64)")


@dataclass
class Ray:
    """Where the work runs. Nothing here changes a byte of the dataset."""

    address: str = "local"
    """local, auto (the cluster that this machine belongs to), or host:port."""
    workers: int | None = None
    """Actors, each with its own teacher; null = one per GPU, or per share of CPUs where there is no GPU."""
    cpus: float = 1.0
    """CPUs of one worker."""
    gpus: float | None = None
    """GPUs of one worker; null = 1 where there are GPUs, else 0."""
    retries: int = 3
    """How often a shard is tried again after its worker died."""

    def __post_init__(self) -> None:
        if self.workers is not None:
            _at_least("ray.workers", self.workers, 1)
        _at_least("ray.retries", self.retries, 0)
        if self.cpus < 0 or (self.gpus or 0) < 0 or self.cpus + (1 if self.gpus is None else self.gpus) == 0:
            raise ValueError(f"ray.cpus is {self.cpus} and ray.gpus is {self.gpus}: a worker needs some of either")


@dataclass
class Recipe:
    """Everything about one dataset."""

    output: str = "runs/dataset"
    """Folder of the dataset."""
    corpus: Corpus = field(default_factory=Corpus)
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    packing: Packing = field(default_factory=Packing)
    teacher: Teacher = field(default_factory=Teacher)
    noise: Noise = field(default_factory=Noise)
    ray: Ray = field(default_factory=Ray)

    def teacher_brings_tokenizer(self) -> bool:
        """Whether teacher.model is a hub id, or a folder with a tokenizer in it."""
        if self.teacher.model is None:
            return False
        folder = Path(self.teacher.model)
        if folder.is_dir():
            return any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))
        return HUB_ID.fullmatch(self.teacher.model) is not None


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")
