"""README.md of a dataset: what it is, how to load it, what is not known about it.

The YAML header makes `datasets.load_dataset(path)` find the shards. Only what the dataset itself knows is stated.
"""

from __future__ import annotations

from typing import Any

from noise.dataset import Manifest, Plan
from noise.folder import Folder, Where
from noise.identity import identity_hash, parts
from noise.shard import Layout
from pipeline.inspect import left_out

EXTRACTIONS = {
    "parallel": "posterior noise of existing text under the teacher (one forward pass)",
    "sequential": "text that the teacher wrote from the noise",
    "none": "tokens alone: no teacher, no noise",
}

NOISE = {
    "parallel": "the kept entries say where the teacher moved it",
    "sequential": "nothing is kept, since it is the very noise that the teacher wrote from.\n"
    "A position has noise if its `log_prob` is below 0: BOS, prompts and padding have 0",
    "none": "here there is none",
}

ENTRIES = {
    False: "`index` and `code` (the entries, position after position)",
    True: "`entry` (the entries, position after position: `index << 8 | code`)",
}

CARD = """---
configs:
- config_name: default
  data_files: "shards/*.arrow"
tags:
- gumbel-distillation
---
# Gumbel noise dataset

{rows:,} rows of {block_length} positions, {tokens:,} positions with noise: {extraction}.

| | |
|---|---|
{table}

## Reading it

    from datasets import load_dataset
    rows = load_dataset("path/of/this/folder")["train"]

Columns: `sequence_id`, `input_ids`, `length` (what follows is padding), `log_prob` (the teacher's, of each token, in nats),
`kept` (sketch entries at each position), {entries}. Noise is rebuilt from the
seed, the sequence id and the position; {noise}.

## Where it comes from

{origin}
{left_out}
Licence of the text: not stated. Licence of the teacher: not stated. Personal or sensitive content: not examined.
"""


def write_card(folder: Where, plan: Plan, manifest: Manifest) -> None:
    identity, totals = manifest.identity, manifest.totals
    rows = {
        "identity hash": f"`{identity_hash(identity)}`",
        "root hash": f"`{manifest.root_hash}`",
        "extraction": identity["extraction"],
        "vocabulary": f"{identity['vocab_size']:,}",
        "seed": f"`{identity['seed']}`",
        "epsilon, draws": f"{identity['epsilon']}, {identity['draws']}",
        "format version, compression": f"{identity['format_version']}, {identity.get('compression', 'none')}",
        "shards, bytes": f"{len(manifest.receipts):,}, {totals['bytes']:,}",
        "kept entries": f"{totals['kept']:,}",
    }
    text = CARD.format(
        rows=totals["rows"],
        block_length=identity["block_length"],
        tokens=totals["tokens"],
        extraction=EXTRACTIONS[identity["extraction"]],
        noise=NOISE[identity["extraction"]],
        entries=ENTRIES["entry" in Layout.of(plan.metadata(0)).entries],
        table="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        origin=origin(plan.identity, plan.environment),
        left_out=quarantine(manifest),
    )
    Folder.of(folder).put("README.md", text.encode())


def quarantine(manifest: Manifest) -> str:
    """The rows that were left out, the first twenty by name; "" where there are none."""
    totals, rows = manifest.totals, left_out(manifest)
    if not rows:
        return ""
    more = [f"* and {len(rows) - 20:,} more, in manifest.json"] if len(rows) > 20 else []
    head = f"{len(rows):,} rows ({totals['tokens_quarantined']:,} tokens) could not be encoded and are left out:"
    return "\n".join(["", head, "", *(f"* {row}" for row in rows[:20]), *more, ""])


def origin(identity: dict[str, Any], environment: dict[str, Any]) -> str:
    """Corpus and teacher in words, from identity and environment."""
    corpus, teacher = identity["corpus"], identity["teacher"]
    paths = [file["path"] for part in parts(identity) for file in part["corpus"]["files"]]
    files = ", ".join(f"`{path}`" for path in paths[:5]) + (f" and {len(paths) - 5:,} more" if len(paths) > 5 else "")
    kind = "Prompts" if "generation" in identity else "Corpus"
    lines = [f"{kind}: {files}; split `{corpus['split']}` (held out: {corpus['held_out']})."] if paths else []
    if teacher is not None:
        revision = teacher["revision"] or "none, a local folder"
        lines.append(
            f"Teacher: `{environment['teacher']}`, revision {revision}, weights sha256 `{teacher['weights_sha256']}`, "
            f"{teacher['dtype']}, temperature {teacher['temperature']}."
        )
    if "generation" in identity:
        lines.append(written(identity["generation"]))
    return "\n".join(lines)


def written(rule: dict[str, Any]) -> str:
    """How the teacher wrote the text, in words."""
    begin = "BOS alone" if rule["prompts"] == "bos" else "BOS and a prompt"
    if rule["prompt_tokens"]:
        begin += f" (its first {rule['prompt_tokens']} tokens)"
    end = "EOS ends a row" if rule["stop"] == "eos" else "Rows fill the block, whatever EOS they hold"
    masked = rule["masked_ids"]["count"]
    return (
        f"The text is the teacher's: every row begins with {begin}, and the next token is argmax(log p + g). {end}. "
        f"{masked:,} ids could not be chosen (those the tokenizer does not have{', and special tokens' * (rule['special_tokens'] == 'masked')})."
    )
