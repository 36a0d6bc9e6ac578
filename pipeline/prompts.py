"""What decides the numbers of a dataset that the teacher writes, and which prompts make which shard.

The counterpart of `plan` for generation: reads the prompts and hashes the teacher, loads neither weights nor Ray.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from noise.dataset import Plan
from noise.identity import Identity, default_seed
from noise.shard import FORMAT_VERSION
from noise.sketch import Codec
from noise.storage import DatasetError, canonical_json, sha256_text
from pipeline import config
from pipeline.corpus import Corpus
from pipeline.divide import divide
from pipeline.generate import ids_hash, masked_ids
from pipeline.plan import describe_teacher, environment, numerics, stated
from pipeline.tokenizer import Tokenizer, find_tokenizer


def make_plan(recipe: config.GenerateRecipe) -> tuple[Plan, Corpus, Tokenizer]:
    """The plan of a recipe. Raises DatasetError, ValueError for prompts, tokenizer or teacher that cannot be used."""
    rule = recipe.generate
    corpus = Corpus.open(recipe.corpus) if rule.prompts == "corpus" else Corpus(recipe.corpus, "", [])
    shards = _from_prompts(corpus, rule) if rule.prompts == "corpus" else _from_bos(rule)
    if not shards:
        raise corpus.nothing_found()
    tokenizer = Tokenizer(find_tokenizer(recipe))
    teacher, vocab_size = describe_teacher(recipe.teacher, "generate.block_length", rule.block_length)
    _check_special("BOS", tokenizer.bos, vocab_size)
    if rule.stop == "eos":
        _check_special("EOS", tokenizer.eos, vocab_size)
    masked = masked_ids(tokenizer, vocab_size, rule.special_tokens, rule.stop)
    codec = Codec(vocab_size)
    identity: Identity = {
        "format_version": FORMAT_VERSION,
        "extraction": "sequential",
        "vocab_size": vocab_size,
        "block_length": rule.block_length,
        "epsilon": codec.epsilon,
        "draws": codec.draws,
        "corpus": corpus.identity() if rule.prompts == "corpus" else {"files": []},
        "tokenizer": tokenizer.identity(),
        "generation": {
            "prompts": rule.prompts,
            "samples": (rule.samples or 1) if rule.prompts == "corpus" else None,
            "prompt_tokens": rule.prompt_tokens,
            "first": "bos",
            "stop": rule.stop,
            "special_tokens": rule.special_tokens,
            "masked_ids": {"count": len(masked), "sha256": ids_hash(masked)},
        },
        "teacher": teacher,
        "shards": {
            "count": len(shards),
            "rows": sum(shard["rows"] for shard in shards),
            "at_least": rule.shard_rows,
            "boundaries_sha256": sha256_text(canonical_json([[shard["rows"], *_edges(shard)] for shard in shards])),
        },
    }
    identity["seed"] = str(rule.seed if rule.seed is not None else default_seed(identity))
    about = environment(recipe.teacher.model, corpus, numerics(recipe.teacher)) | stated(recipe.card)
    return Plan(identity, about, shards), corpus, tokenizer


def _check_special(name: str, token: int, vocab_size: int) -> None:
    if token >= vocab_size:
        raise DatasetError(f"the tokenizer's {name} is {token}, not below the teacher's width {vocab_size}: it does not belong to this teacher")


def _from_bos(rule: config.Generate) -> list[dict[str, Any]]:
    assert rule.rows is not None
    return [{"rows": min(rule.shard_rows, rule.rows - start)} for start in range(0, rule.rows, rule.shard_rows)]


def _edges(shard: dict[str, Any]) -> list[Any]:
    return [shard["start"][:2], shard["stop"]] if "start" in shard else []


def _from_prompts(corpus: Corpus, rule: config.Generate) -> list[dict[str, Any]]:
    """Shards of the documents whose rows reach `shard_rows`; the last may be smaller."""
    samples = rule.samples or 1
    return [asdict(shard) | {"rows": shard.documents * samples} for shard in divide(corpus, rule.shard_rows, measure=lambda _: samples)]
