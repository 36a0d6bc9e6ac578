"""README.md of a dataset: what it is, how to load it, what is not known about it.

The YAML header makes `datasets.load_dataset(path)` find the shards. Only what the dataset itself knows is stated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from noise.dataset import Manifest, Plan, identity_hash
from noise.storage import write_text

EXTRACTIONS = {
    "parallel": "posterior noise of existing text under the teacher (one forward pass)",
    "sequential": "text that the teacher wrote from the noise",
    "none": "tokens alone: no teacher, no noise",
}

CARD = """---
configs:
- config_name: default
  data_files: "shards/*.arrow"
tags:
- gumbel-distillation
---
# Gumbel noise dataset

{rows:,} rows of {block_length} positions, {tokens:,} positions with noise; {extraction}.

| | |
|---|---|
{table}

## Reading it

    from datasets import load_dataset
    rows = load_dataset("path/of/this/folder")["train"]

Columns: `sequence_id`, `input_ids`, `length` (what follows is padding), `log_prob` (the teacher's, of each token, in nats),
`kept` (sketch entries at each position), `index` and `code` (the entries, position after position). Noise is rebuilt from the
seed, the sequence id and the position; the kept entries say where the teacher moved it.

## Where it comes from

{origin}

Licence of the text: not stated. Licence of the teacher: not stated. Personal or sensitive content: not examined.
"""


def write_card(folder: Path, plan: Plan, manifest: Manifest) -> None:
    identity, totals = manifest.identity, manifest.totals
    rows = {
        "identity hash": f"`{identity_hash(identity)}`",
        "root hash": f"`{manifest.root_hash}`",
        "extraction": identity["extraction"],
        "vocabulary": f"{identity['vocab_size']:,}",
        "seed": f"`{identity['seed']}`",
        "epsilon, draws": f"{identity['epsilon']}, {identity['draws']}",
        "shards, bytes": f"{len(manifest.receipts):,}, {totals['bytes']:,}",
        "kept entries": f"{totals['kept']:,}",
    }
    text = CARD.format(
        rows=totals["rows"],
        block_length=identity["block_length"],
        tokens=totals["tokens"],
        extraction=EXTRACTIONS[identity["extraction"]],
        table="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        origin=origin(plan.identity, plan.environment),
    )
    write_text(folder / "README.md", text)


def origin(identity: dict[str, Any], environment: dict[str, Any]) -> str:
    """Corpus and teacher in words, from identity and environment."""
    corpus, teacher = identity["corpus"], identity["teacher"]
    files = ", ".join(f"`{file['path']}`" for file in corpus["files"][:5]) + (
        f" and {len(corpus['files']) - 5} more" if len(corpus["files"]) > 5 else ""
    )
    lines = [f"Corpus: {files}; split `{corpus['split']}` (held out: {corpus['held_out']})."]
    if teacher is not None:
        revision = teacher["revision"] or "none, a local folder"
        lines.append(
            f"Teacher: `{environment['teacher']}`, revision {revision}, weights sha256 `{teacher['weights_sha256']}`, "
            f"{teacher['dtype']}, temperature {teacher['temperature']}."
        )
    return "\n".join(lines)
