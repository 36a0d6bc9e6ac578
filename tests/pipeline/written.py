"""A world whose teachers write: models of two families, prompts, and datasets made in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from noise.commit import commit_shard
from noise.dataset import Manifest, open_shard
from noise.shard import Rows
from pipeline import config, prompts
from pipeline.generate import Choice, Generation
from pipeline.plan import write_plan
from pipeline.teacher import Teacher
from tests.pipeline.world import VOCAB, WORDS, World

BLOCK = 16
WIDE = VOCAB + 12
"""The teachers' logits are wider than the tokenizer is long."""


def save_model(folder: Path, kind: str, vocab_size: int = WIDE) -> Path:
    """A small model of the family `kind` whose distributions are far from uniform."""
    import transformers

    torch.manual_seed(3)
    if kind == "gpt2":
        settings: Any = transformers.GPT2Config(vocab_size=vocab_size, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.6)
    else:
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        settings = transformers.LlamaConfig(vocab_size=vocab_size, max_position_embeddings=64, initializer_range=0.6, **shape)
    transformers.AutoModelForCausalLM.from_config(settings).save_pretrained(str(folder))
    return folder


def make_world(root: Path) -> World:
    """Two teachers, gpt2 and llama, a tokenizer, and prompts of several lengths."""
    made = World(root)
    assert made.run("tokenizer") == 0
    lines = [json.dumps({"text": " ".join(WORDS[number : number + number % 4 + 1])}) for number in range(12)]  # 1 to 4 words
    (made.root / "prompts.jsonl").write_text("\n".join(lines))
    save_model(made.root / "gpt2", "gpt2")
    save_model(made.root / "llama", "llama")
    return made


def plan(world: World, name: str, teacher: dict[str, Any] | None = None, corpus: dict[str, Any] | None = None, **changes: Any) -> Generation:
    """A dataset that is planned, with its teacher in this process."""
    settings = {"rows": 30, "block_length": BLOCK, "shard_rows": 12} | changes
    recipe = config.GenerateRecipe(
        output=str(world.root / name),
        corpus=config.Corpus(**corpus or {}),
        tokenizer=config.Tokenizer(path=str(world.root / "tokenizer"), vocab_size=VOCAB),
        teacher=config.Teacher(**{"model": str(world.root / "llama"), "micro_batch": 5, **(teacher or {})}),
        generate=config.Generate(**settings),
    )
    fresh, found, tokenizer = prompts.make_plan(recipe)
    standing = write_plan(recipe, fresh, tokenizer)
    return Generation(Path(recipe.output), standing, found, tokenizer, Teacher(recipe.teacher, standing.identity["vocab_size"]))


def finish(job: Generation) -> Path:
    for shard in range(len(job.plan.shards)):
        job.extract(shard)
    Manifest.write(job.folder, job.plan)
    return job.folder


def from_prompts(world: World, name: str, **changes: Any) -> Generation:
    corpus = {"files": str(world.root / "prompts.jsonl"), "split": "all"}
    return plan(world, name, corpus=corpus, **({"prompts": "corpus", "rows": None, "samples": 2, "prompt_tokens": 9} | changes))


def rows_of(folder: Path) -> Rows:
    manifest = Manifest.read(folder)
    return Rows.concatenate([rows for receipt in manifest.receipts for rows in open_shard(folder, receipt, manifest.identity)])


def forge(job: Generation, shard: int, rows: Rows) -> None:
    """Put other rows in a finished dataset's shard, with a receipt and manifest that agree."""
    (job.folder / "shards" / f"{shard:05d}.json").unlink()
    commit_shard(job.folder, job.plan.metadata(shard), [rows], 0)
    Manifest.write(job.folder, job.plan)


def choice_of(job: Generation) -> Choice:
    return Choice.of(job.plan.identity, job.tokenizer, torch.device("cpu"))
