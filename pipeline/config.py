"""The recipe of a dataset: every setting, with its default and its help.

A recipe is a YAML file of these fields; the command line overrides any of them by its dotted name. A key that is not
here is an error. What is resolved is saved beside the artefact as recipe.yaml.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from noise.secrets import refuse_secrets
from noise.storage import DatasetError


class WorkError(RuntimeError):
    """Work that was begun and failed. The message is for people; what is committed stays."""


class DamageError(DatasetError):
    """What is wrong with a dataset, one line a file."""

    def __init__(self, lines: list[str]):
        more = f"; and {len(lines) - 1} more files are damaged" if len(lines) > 1 else ""
        super().__init__(lines[0] + more)
        self.lines = lines


AUTO: Literal["auto"] = "auto"
"""A micro-batch that the first worker finds."""
DTYPES = ("float32", "bfloat16", "float16", "float64")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass
class Corpus:
    """Which text."""

    files: str | list[str] | None = None
    """Path, glob, URI (s3://, gs://, hf://datasets/OWNER/NAME/..., with globs) or a list: text, .jsonl, .parquet, .arrow, also .gz and .zst; or a
    folder of datasets.save_to_disk. null = `dataset`, or else the prose that every Python carries."""
    dataset: str | None = None
    """Dataset of the Hugging Face hub by name; its own files are read, at a commit, with the columns they have."""
    dataset_config: str | None = None
    """Configuration of that dataset, where it has several."""
    dataset_split: str = "train"
    """Its split, as its authors made it; also which split of a folder of datasets.save_to_disk that has several."""
    dataset_revision: str | None = None
    """Branch, tag or commit of that dataset."""
    text_field: str = "text"
    """Column with the text, in all formats but text files."""
    ids_field: str | None = None
    """Column with token ids instead of text, taken as they are; they must be the tokenizer's. An id counts as 4 characters of a shard."""
    clean_up: str = "none"
    """none: text as it is. lm1b: undo the tokenisation of the One Billion Word Benchmark, as published diffusion models do."""
    held_out: float = 0.05
    """Share of documents, chosen by their content, that training never sees."""
    split: str = "train"
    """Which documents: train, held_out or all."""

    def __post_init__(self) -> None:
        _one_of("corpus.split", self.split, ("train", "held_out", "all"))
        _one_of("corpus.clean_up", self.clean_up, ("none", "lm1b"))
        if not 0 <= self.held_out < 1:
            raise ValueError(f"corpus.held_out is {self.held_out}; it is a share of the documents, in [0, 1)")
        if self.split == "held_out" and self.held_out == 0:
            raise ValueError("corpus.split is held_out but corpus.held_out is 0: there is nothing to read")
        for pattern in [self.files] if isinstance(self.files, str) else self.files or []:
            refuse_secrets("corpus.files", pattern)
        if self.files is not None and self.dataset is not None:
            raise ValueError(f"corpus.files and corpus.dataset ({self.dataset!r}) are both set; take one")
        if self.dataset is None and (self.dataset_config, self.dataset_revision) != (None, None):
            raise ValueError("corpus.dataset_config or corpus.dataset_revision is set, but corpus.dataset is null; name the dataset, or drop them")
        if self.ids_field is not None and self.clean_up != "none":
            raise ValueError(f"corpus.clean_up is {self.clean_up}, but corpus.ids_field takes ids, which have no text to clean; set it to none")


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
    """concat: documents, each with EOS behind it, follow each other and are cut in blocks that begin with BOS. pad: each has rows of its own."""
    block_end: str = "none"
    """eos: every block ends in an EOS of its own behind the tokens, as published code wraps text. none: its last token is a document's."""
    tail: str = "pad"
    """concat: the last block of a shard is padded (pad), or dropped where it is not full (drop), as published code does."""
    long_documents: str = "split"
    """pad: a document longer than a row goes on in the next row (split), or loses the rest (cut)."""
    attention_across_documents: bool = True
    """Whether the teacher, predicting a document, sees those before it in the row. false: it reads each alone, behind BOS, from position 0."""
    shard_characters: int = 4_000_000
    """A shard ends with the document that reaches this many characters; what `tail` says happens there."""

    def __post_init__(self) -> None:
        _one_of("packing.policy", self.policy, ("concat", "pad"))
        _one_of("packing.block_end", self.block_end, ("none", "eos"))
        _one_of("packing.tail", self.tail, ("pad", "drop"))
        _one_of("packing.long_documents", self.long_documents, ("split", "cut"))
        if not 2 <= self.block_length <= 2**24:
            raise ValueError(f"packing.block_length is {self.block_length}; it must be in [2, 2^24]")
        if self.block_end == "eos" and self.block_length < 3:
            raise ValueError("packing.block_length is 2 and packing.block_end is eos: BOS and EOS leave no room for text")
        _at_least("packing.shard_characters", self.shard_characters, 1)
        if self.policy == "pad" and self.tail == "drop":
            raise ValueError("packing.tail is drop, but packing.policy pad has no tail; set it to pad")
        if self.policy == "concat" and self.long_documents == "cut":
            raise ValueError("packing.long_documents is cut, but packing.policy concat loses nothing of a document; set it to split")


@dataclass
class Teacher:
    """Whose noise."""

    model: str | None = None
    """Folder or hub id of a causal LM with safetensors weights."""
    revision: str | None = None
    """Branch, tag or commit on the hub; it is resolved to a commit."""
    dtype: str = "float32"
    """Of weights and activations: float32, bfloat16, float16, or float64 (to generate and replay exactly). What is stored is float32 always."""
    attention: str = "sdpa"
    """Attention implementation: sdpa, eager, flash_attention_2, ..."""
    micro_batch: int | Literal["auto"] = 16
    """Rows in one forward pass. Part of the plan: floating point differs between batch shapes. auto: the first worker finds how many fit, once."""
    threads: int = 1
    """CPU threads of a worker's teacher. Part of the plan, so bytes do not depend on the number of workers."""
    compile: bool = False
    """torch.compile of the forward pass over rows that exist. Part of the plan: it changes the last bits."""
    packed: bool = False
    """On CPUs, in float32: lay the weights out once for oneDNN, which takes a second copy of the output layer. Forwards are faster where torch's own
    product does not suit the processor (benchmarks/packed.py). Part of the plan: it changes the last bits."""
    device_map: str | None = None
    """Spread one teacher over a worker's GPUs (ray.gpus): auto, balanced, ... as in transformers; needs accelerate. Part of the plan."""
    temperature: float = 1.0
    """The logits are divided by it."""

    def __post_init__(self) -> None:
        refuse_secrets("teacher.model", self.model or "")
        _one_of("teacher.dtype", self.dtype, DTYPES)
        if self.micro_batch != AUTO:
            _at_least("teacher.micro_batch", self.micro_batch, 1)
        _at_least("teacher.threads", self.threads, 1)
        if self.packed and (self.dtype != "float32" or self.device_map is not None):
            raise ValueError(
                f"teacher.packed is true with teacher.dtype {self.dtype} and device_map {self.device_map}, but packed weights are float32 on a CPU; "
                "set teacher.packed to false, or teacher.dtype to float32 and device_map to null"
            )
        if self.packed and self.compile:
            raise ValueError("teacher.packed and teacher.compile are both true, and a packed layer is not compiled; set one of them to false")
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
    compression: str = "none"
    """Of the shards: none (mapped, read without copying) or zstd (smaller; a reader holds what it has read in memory)."""
    seed: int | None = None
    """Seed of the noise stream, 64 bits; null = derived from everything else in the dataset's identity."""

    def __post_init__(self) -> None:
        _one_of("noise.extraction", self.extraction, ("parallel", "none"))
        _one_of("noise.compression", self.compression, ("none", "zstd"))
        _seed("noise.seed", self.seed)


@dataclass
class Generate:
    """What the teacher writes from the noise."""

    prompts: str = "bos"
    """bos: every row begins with BOS alone. corpus: with BOS and a document of `corpus`, which is given and has no noise."""
    rows: int | None = None
    """How many rows, where they begin with BOS alone."""
    samples: int | None = None
    """Rows a document, each with noise of its own, where documents are the prompts; null = 1."""
    prompt_tokens: int | None = None
    """Only the first so many tokens of a document are its prompt; null = all, which must leave room to write."""
    block_length: int = 32
    """Positions in a row, BOS and prompt included."""
    stop: str = "eos"
    """eos: EOS ends the row. never: rows fill the block, and EOS is a token like any other."""
    special_tokens: str = "allowed"
    """allowed, or masked: the teacher cannot choose the tokenizer's special tokens (but EOS, where it ends the row)."""
    shard_rows: int = 4096
    """Rows in a shard, at least: a document's rows stay together."""
    seed: int | None = None
    """Seed of the noise stream, 64 bits; null = derived from everything else in the dataset's identity."""

    def __post_init__(self) -> None:
        _one_of("generate.prompts", self.prompts, ("bos", "corpus"))
        _one_of("generate.stop", self.stop, ("eos", "never"))
        _one_of("generate.special_tokens", self.special_tokens, ("allowed", "masked"))
        for name, least in (("rows", 1), ("samples", 1), ("prompt_tokens", 1), ("shard_rows", 1)):
            value = getattr(self, name)
            if value is not None:
                _at_least(f"generate.{name}", value, least)
        if not 2 <= self.block_length <= 2**24:
            raise ValueError(f"generate.block_length is {self.block_length}; it must be in [2, 2^24]")
        for name, of in (("rows", "bos"), ("samples", "corpus"), ("prompt_tokens", "corpus")):
            if getattr(self, name) is not None and self.prompts != of:
                raise ValueError(f"generate.{name} is {getattr(self, name)} but generate.prompts is {self.prompts}, where it means nothing; drop it")
        _seed("generate.seed", self.seed)


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
    """GPUs of one worker; null = 1 where there are GPUs, else 0. 0.5: two workers share one, half its memory each."""
    pinned: bool = False
    """Each worker on cores of its own, `cpus` of them; on one machine."""
    retries: int = 3
    """How often a shard is tried again after its worker died, or failed in a way that may not come again."""

    def __post_init__(self) -> None:
        if self.workers is not None:
            _at_least("ray.workers", self.workers, 1)
        _at_least("ray.retries", self.retries, 0)
        if self.cpus < 0 or (self.gpus or 0) < 0 or self.cpus + (1 if self.gpus is None else self.gpus) == 0:
            raise ValueError(f"ray.cpus is {self.cpus} and ray.gpus is {self.gpus}: a worker needs some of either")
        if self.gpus is not None and self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(f"ray.gpus is {self.gpus}; above 1 it must be a whole number, since a worker shares only one GPU with others")
        if self.pinned and (self.address != "local" or self.cpus != int(self.cpus) or self.cpus < 1):
            raise ValueError(f"ray.pinned needs ray.address local and whole ray.cpus; they are {self.address!r} and {self.cpus}")


@dataclass
class Card:
    """What people should be told, and only its makers know. Nothing here changes a byte of the shards."""

    title: str = ""
    """Name of the dataset, for its card."""
    corpus_license: str = ""
    """Licence of the text, as the hub spells it (cc-by-4.0, mit, other); empty: the card says that it is not stated."""
    teacher_license: str = ""
    """Licence of the teacher, and with it of what it wrote."""


@dataclass
class Work:
    """What every dataset needs, however its text came about."""

    output: str = "runs/dataset"
    """Folder of the dataset."""
    corpus: Corpus = field(default_factory=Corpus)
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    teacher: Teacher = field(default_factory=Teacher)
    ray: Ray = field(default_factory=Ray)
    card: Card = field(default_factory=Card)

    def __post_init__(self) -> None:
        if self.output.startswith("hf://"):
            raise ValueError(f"output is {self.output}: a dataset is not made on the hub; make it in a folder or on a store, then `push` it there")

    def teacher_brings_tokenizer(self) -> bool:
        """Whether teacher.model is a hub id, or a folder with a tokenizer in it."""
        if self.teacher.model is None:
            return False
        folder = Path(self.teacher.model)
        if folder.is_dir():
            return any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))
        return HUB_ID.fullmatch(self.teacher.model) is not None


@dataclass
class Recipe(Work):
    """Everything about one dataset of text that exists."""

    packing: Packing = field(default_factory=Packing)
    noise: Noise = field(default_factory=Noise)


@dataclass
class GenerateRecipe(Work):
    """Everything about one dataset of text that the teacher writes."""

    generate: Generate = field(default_factory=Generate)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher.compile:
            raise ValueError("teacher.compile is true, but the teacher writes token by token, which is not compiled; set it to false")
        if self.generate.prompts == "bos" and self.generate.rows is None:
            raise ValueError("generate.rows is null: say how many rows to write, or take the corpus for prompts (generate.prompts: corpus)")
        if self.generate.prompts == "bos" and self.corpus != Corpus():
            raise ValueError("corpus is set, but generate.prompts is bos, so nothing of it would be read; set generate.prompts to corpus, or drop it")


def _seed(name: str, value: int | None) -> None:
    if value is not None and not 1 <= value < 2**64:
        raise ValueError(f"{name} is {value}; it must be in [1, 2^64)")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")
