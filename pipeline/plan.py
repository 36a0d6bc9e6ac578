"""What decides the numbers of a dataset, and which documents make which shard.

`make_plan` reads the corpus and hashes the teacher; it loads neither the teacher's weights nor Ray. `write_plan` is
idempotent: planning again changes nothing, planning something else into the same folder is refused field by field.
"""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from noise.dataset import Identity, Plan, default_seed, differences
from noise.shard import FORMAT_VERSION
from noise.sketch import Codec
from noise.storage import DatasetError, canonical_json, sha256_text
from pipeline import config
from pipeline.corpus import CLEANUP, Corpus, CorpusFile
from pipeline.tokenizer import Tokenizer, copy_tokenizer, find_tokenizer

ENTRIES_WORTH_COMPILING = 1e9  # measured on 2 slow cores: eager 75 ns an entry, compiled 25, compilation 20 to 50 s


@dataclass(frozen=True)
class ShardInput:
    """The documents of one shard: from `start` up to, not including, `stop`."""

    start: tuple[int, int, int]
    """(file, ordinal in it, byte offset in it)"""
    stop: tuple[int, int]
    documents: int
    characters: int

    @classmethod
    def from_json(cls, value: Any) -> ShardInput:
        file, ordinal, offset = value["start"]
        return cls((file, ordinal, offset), (value["stop"][0], value["stop"][1]), value["documents"], value["characters"])


def make_plan(recipe: config.Recipe) -> tuple[Plan, Corpus, Tokenizer]:
    """The plan of a recipe. Raises DatasetError, ValueError for a corpus, tokenizer or teacher that cannot be used."""
    corpus = Corpus.open(recipe.corpus)
    shards = list(divide(corpus, recipe.packing.shard_characters))
    if not shards:
        raise corpus.nothing_found()
    tokenizer = Tokenizer(find_tokenizer(recipe))
    teacher, vocab_size = _teacher(recipe, tokenizer)
    codec = Codec(vocab_size, recipe.noise.epsilon, recipe.noise.draws)
    identity: Identity = {
        "format_version": FORMAT_VERSION,
        "extraction": recipe.noise.extraction,
        "vocab_size": vocab_size,
        "block_length": recipe.packing.block_length,
        "epsilon": codec.epsilon,
        "draws": codec.draws,
        "corpus": {
            "files": [asdict(file) for file in corpus.files],
            "text_field": recipe.corpus.text_field,
            "clean_up": CLEANUP,
            "held_out": recipe.corpus.held_out,
            "split": recipe.corpus.split,
        },
        "tokenizer": tokenizer.identity(),
        "packing": {"policy": recipe.packing.policy, "first": "bos", "after_document": "eos"},
        "teacher": teacher,
        "shards": {
            "count": len(shards),
            "characters": recipe.packing.shard_characters,
            "boundaries_sha256": sha256_text(canonical_json([(shard.start[:2], shard.stop) for shard in shards])),
        },
    }
    identity["seed"] = str(recipe.noise.seed if recipe.noise.seed is not None else default_seed(identity))
    numerics = {
        "micro_batch": recipe.teacher.micro_batch,
        "attention": recipe.teacher.attention,
        "threads": recipe.teacher.threads,
        "compile": _compile(recipe, vocab_size, sum(shard.characters for shard in shards)),
    }
    return Plan(identity, _environment(recipe, corpus, numerics), [asdict(shard) for shard in shards]), corpus, tokenizer


def _compile(recipe: config.Recipe, vocab_size: int, characters: int) -> bool:
    """Whether the encoder is compiled: as the recipe says, else where about that many entries make up for a worker's compilation."""
    if recipe.noise.compile is not None:
        return recipe.noise.compile
    return characters / 4 * vocab_size * recipe.noise.draws > ENTRIES_WORTH_COMPILING


def _teacher(recipe: config.Recipe, tokenizer: Tokenizer) -> tuple[dict[str, Any] | None, int]:
    """(identity of the teacher or None, width of the vocabulary)."""
    if recipe.noise.extraction == "none":
        return None, len(tokenizer)
    from pipeline import teacher

    identity, width, folder = teacher.describe(recipe.teacher)
    limit = teacher.longest_block(folder)
    if limit is not None and recipe.packing.block_length > limit:
        raise DatasetError(
            f"packing.block_length is {recipe.packing.block_length}, but the teacher {folder} has {limit} positions; shorten the blocks"
        )
    return identity, width


def divide(corpus: Corpus, characters: int) -> list[ShardInput]:
    """Shards of at least `characters` characters each (the last may be smaller), cut between documents."""
    shards: list[ShardInput] = []
    start, documents, total = (0, 0, 0), 0, 0
    cut = False
    for document in corpus.documents():
        place = (document.file, document.ordinal, document.offset)
        if cut:  # the shard ends where the next one's first document begins
            shards.append(ShardInput(start, place[:2], documents, total))
            start, documents, total, cut = place, 0, 0, False
        documents, total = documents + 1, total + len(document.text)
        cut = total >= characters
    if documents:
        shards.append(ShardInput(start, (len(corpus.files), 0), documents, total))
    return shards


def _environment(recipe: config.Recipe, corpus: Corpus, numerics: dict[str, Any]) -> dict[str, Any]:
    """Where the plan was made. `numerics` decides bits on one machine, so resuming keeps to it."""
    import torch
    import transformers

    return {
        "numerics": numerics,
        "teacher": recipe.teacher.model if recipe.noise.extraction != "none" else None,
        "corpus_root": corpus.root,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def write_plan(recipe: config.Recipe, plan: Plan, tokenizer: Tokenizer) -> Plan:
    """Write plan.json and tokenizer/, or find them there. Returns the plan that stands.

    Raises DatasetError by field when the folder holds a plan of another identity or other numerics.
    """
    folder = Path(recipe.output)
    plan.write(folder)
    standing = Plan.read(folder)
    changed = differences(plan.environment["numerics"], standing.environment.get("numerics"), "teacher")
    if changed and recipe.noise.extraction != "none":
        raise DatasetError(
            f"{folder} was begun with other settings, and floating point depends on them: {'; '.join(changed)}; "
            "restore them, or choose another output folder"
        )
    copy_tokenizer(tokenizer.folder, folder / "tokenizer")
    return standing


def corpus_of(recipe: config.Recipe, plan: Plan, root: str) -> Corpus:
    """The corpus as a worker reads it: the plan's files under this machine's root."""
    files = [CorpusFile(**file) for file in plan.identity["corpus"]["files"]]
    return Corpus(recipe.corpus, root, files)
