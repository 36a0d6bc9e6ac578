"""What decides the numbers of a dataset, and which documents make which shard.

`make_plan` reads the corpus and hashes the teacher; it loads neither the teacher's weights nor Ray. `write_plan` is
idempotent: planning again changes nothing, planning something else into the same folder is refused field by field.
"""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import Any

from noise.dataset import Plan
from noise.folder import Folder, Where
from noise.identity import Identity, default_seed, differences
from noise.lineage import parts
from noise.shard import FORMAT_VERSION
from noise.sketch import Codec
from noise.storage import DatasetError, canonical_json, sha256_text
from pipeline import config
from pipeline.claim import check, claim
from pipeline.corpus import Corpus, CorpusFile, corpus_settings
from pipeline.divide import ShardInput, divide
from pipeline.packing import Packer
from pipeline.tokenizer import Tokenizer, check_tokenizer, copy_tokenizer, find_tokenizer


def make_plan(recipe: config.Recipe) -> tuple[Plan, Corpus, Tokenizer]:
    """The plan of a recipe. Raises DatasetError, ValueError for a corpus, tokenizer or teacher that cannot be used."""
    corpus = Corpus.open(recipe.corpus)
    tokenizer = Tokenizer(find_tokenizer(recipe))
    identity = settings(recipe, tokenizer)
    shards = divide(corpus, recipe.packing.shard_characters)
    if not shards:
        raise corpus.nothing_found()
    identity["corpus"] = corpus.identity()
    identity["shards"] |= {"count": len(shards), "boundaries_sha256": boundaries_hash(shards)}
    identity["seed"] = str(recipe.noise.seed if recipe.noise.seed is not None else default_seed(identity))
    model = recipe.teacher.model if identity["teacher"] is not None else None
    about = environment(model, corpus, numerics(recipe.teacher)) | stated(recipe.card)
    return Plan(identity, about, [asdict(shard) for shard in shards]), corpus, tokenizer


def settings(recipe: config.Recipe, tokenizer: Tokenizer) -> Identity:
    """The identity without what reading the corpus decides: its files, the number and boundaries of shards, the seed."""
    teacher, vocab_size = _teacher(recipe, tokenizer)
    codec = Codec(vocab_size, recipe.noise.epsilon, recipe.noise.draws)
    return {
        "format_version": FORMAT_VERSION,
        "compression": recipe.noise.compression,
        "extraction": recipe.noise.extraction,
        "vocab_size": vocab_size,
        "block_length": recipe.packing.block_length,
        "epsilon": codec.epsilon,
        "draws": codec.draws,
        "corpus": corpus_settings(recipe.corpus),
        "tokenizer": tokenizer.identity(),
        "packing": packer(recipe.packing, tokenizer).identity(),
        "teacher": teacher,
        "shards": {"characters": recipe.packing.shard_characters},
    }


def boundaries_hash(shards: list[ShardInput], first_file: int = 0) -> str:
    """sha256 of where shards begin and end, (file, ordinal), files counted from `first_file` on."""
    places = [[(file - first_file, ordinal) for file, ordinal in (shard.start[:2], shard.stop)] for shard in shards]
    return sha256_text(canonical_json(places))


def numerics(teacher: config.Teacher) -> dict[str, Any]:
    """What decides bits on one machine beside the identity."""
    used = {"micro_batch": teacher.micro_batch, "attention": teacher.attention, "threads": teacher.threads}
    return used | {name: value for name in ("compile", "packed", "device_map") if (value := getattr(teacher, name))}


def _teacher(recipe: config.Recipe, tokenizer: Tokenizer) -> tuple[dict[str, Any] | None, int]:
    """(identity of the teacher or None, width of the vocabulary)."""
    if recipe.noise.extraction == "none":
        return None, len(tokenizer)
    identity, width = describe_teacher(recipe.teacher, "packing.block_length", recipe.packing.block_length)
    if not recipe.packing.attention_across_documents:
        identity |= {"attention_across_documents": False, "positions_restart": True, "documents_begin_with": "bos"}
    return identity, width


def packer(packing: config.Packing, tokenizer: Tokenizer) -> Packer:
    rule = (packing.policy, packing.block_end, packing.tail, packing.long_documents)
    return Packer(tokenizer.bos, tokenizer.eos, packing.block_length, *rule)


def documents_apart(identity: Identity) -> tuple[int, int] | None:
    """(EOS, BOS) where the teacher reads each document alone, else None."""
    if (identity["teacher"] or {}).get("attention_across_documents", True):
        return None
    return identity["tokenizer"]["eos"], identity["tokenizer"]["bos"]


def describe_teacher(settings: config.Teacher, name: str, block_length: int) -> tuple[dict[str, Any], int]:
    """(identity of the teacher, width of the vocabulary). Raises DatasetError when it has fewer positions than `name`, a block, needs."""
    from pipeline import teacher

    identity, width, folder = teacher.describe(settings)
    limit = teacher.longest_block(folder)
    if limit is not None and block_length > limit:
        raise DatasetError(f"{name} is {block_length}, but the teacher {folder} has {limit} positions; shorten the blocks")
    return identity, width


def environment(teacher: str | None, corpus: Corpus, numerics: dict[str, Any]) -> dict[str, Any]:
    """Where the plan was made. `numerics` decides bits on one machine, so resuming keeps to it."""
    import torch
    import transformers

    return {
        "numerics": numerics,
        "teacher": teacher,
        "corpus_roots": corpus.roots,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def stated(card: config.Card) -> dict[str, Any]:
    """What the recipe says for the dataset's card."""
    said = {name: value for name, value in asdict(card).items() if value}
    return {"card": said} if said else {}


def write_plan(recipe: config.Work, plan: Plan, tokenizer: Tokenizer) -> Plan:
    """Write plan.json and tokenizer/, or find them there. Returns the plan that stands.

    Raises DatasetError by field when the folder holds a plan of another identity or other numerics, by file when it holds somebody's own.
    """
    folder = Folder.of(recipe.output)
    claim(folder, plan)
    standing = Plan.read(folder)
    check_numerics(plan.environment["numerics"], standing, folder)
    copy_tokenizer(tokenizer.folder, folder, standing.identity)
    return standing


def check_plan(recipe: config.Work, plan: Plan) -> None:
    """For a dry run: raises DatasetError where `write_plan` would, and writes nothing."""
    folder = Folder.of(recipe.output)
    if not check(folder, plan):
        check_numerics(plan.environment["numerics"], Plan.read(folder), folder)
    check_tokenizer(folder, plan.identity)


def check_numerics(ours: dict[str, Any], standing: Plan, folder: Where) -> None:
    """Raises DatasetError by field when a plan was made with other numerics, and floating point is in its shards."""
    theirs = {name: value for name, value in standing.environment["numerics"].items() if value}
    if ours["micro_batch"] == config.AUTO:
        ours = ours | {"micro_batch": theirs["micro_batch"]}
    changed = differences(ours, theirs, "teacher")
    if changed and standing.identity["extraction"] != "none":
        raise DatasetError(
            f"{folder} was begun with other settings, and floating point depends on them: {'; '.join(changed)}; "
            "restore them, or choose another output folder"
        )


def settle_micro_batch(folder: Where, rows: int) -> int:
    """Write into a plan that leaves its micro-batch to be found how many rows fit. Returns what stands: another may have been first."""
    standing = Plan.read(folder)
    numerics = standing.environment["numerics"]
    if numerics["micro_batch"] == config.AUTO:
        numerics["micro_batch"] = rows
        standing.rewrite(folder)
    return int(numerics["micro_batch"])


def corpus_of(recipe: config.Work, plan: Plan, roots: list[str]) -> Corpus:
    """The corpus as a worker reads it: the files of each of the plan's parts under its root on this machine."""
    of_parts = [[CorpusFile(**file) for file in part["corpus"]["files"]] for part in parts(plan.identity)]
    return Corpus.chain([Corpus(recipe.corpus, root, files) for root, files in zip(roots, of_parts, strict=True)])
