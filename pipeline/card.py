"""README.md of a dataset: what it is, how to load it, what is not known about it.

The YAML header makes `datasets.load_dataset(path)` find the shards. Only what the dataset itself knows is stated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from noise import lineage
from noise.dataset import Manifest, Plan
from noise.folder import Folder, Where
from noise.identity import identity_hash
from noise.lineage import roots
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

HERE, PUBLISHED = "shards/*.arrow", "shards/**/*.arrow"
"""Where the header finds the shards, and where it does once they are in subfolders."""
UNSTATED = "not stated"

CARD = """# {title}

{rows:,} rows of {block_length} positions, {tokens:,} positions with noise: {extraction}.

| | |
|---|---|
{table}

{guarantee}

## Reading it

Columns: `sequence_id`, `input_ids`, `length` (what follows is padding), `log_prob` (the teacher's, of each token, in nats),
`kept` (sketch entries at each position), {entries}. Noise is rebuilt from the
seed, the sequence id and the position; {noise}.

With the project that made it, to train a student, or to check every byte:

    python -m trainer --config recipes/demo_mdlm_gumbel.yaml --data.path THIS_FOLDER --data.root_hash {root_hash}
    python -m pipeline verify THIS_FOLDER

With Hugging Face datasets:

    from datasets import load_dataset
    rows = load_dataset("THIS_FOLDER")["train"]

With pyarrow and numpy alone, noise and all; `noise(shard("shards/....arrow"), row=0, t=1)` is a float64 array over the vocabulary:

```python
{reader}```

## Where it comes from

{origin}
{left_out}
Licence of the text: {corpus_license}. Licence of the teacher: {teacher_license}. Personal or sensitive content: not examined.
"""

GUARANTEE = """The sketch keeps what the teacher moved by more than epsilon = {epsilon} nats. For every vocabulary entry and each of the {draws}
draws, in float32 up to 1e-5: an entry that is not kept is at most {epsilon} too high and never too low, a kept one at most {step} too low
and never too high, the token's exact; and argmax(log p + g) is the token, always. This measures it:

    python -m pipeline verify THIS_FOLDER --deep 100 --teacher.model TEACHER"""


def write_card(folder: Where, plan: Plan, manifest: Manifest) -> None:
    """Write README.md; licences and title are those of plan.json's environment, and what nobody stated is called so."""
    from huggingface_hub import DatasetCard, DatasetCardData

    identity, totals, said = manifest.identity, manifest.totals, plan.environment.get("card") or {}
    codec, metadata = plan.metadata(0).codec, plan.metadata(0)
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
        title=said.get("title") or "Gumbel noise dataset",
        rows=totals["rows"],
        block_length=identity["block_length"],
        tokens=totals["tokens"],
        extraction=EXTRACTIONS[identity["extraction"]],
        noise=NOISE[identity["extraction"]],
        entries=ENTRIES["entry" in Layout.of(metadata).entries],
        table="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        guarantee=GUARANTEE.format(epsilon=codec.epsilon, draws=codec.draws, step=codec.step) if identity["extraction"] == "parallel" else "",
        root_hash=manifest.root_hash,
        reader=Path(__file__).with_name("bare_reader.py").read_text(),
        origin=origin(plan.identity, plan.environment),
        left_out=quarantine(manifest),
        corpus_license=said.get("corpus_license") or UNSTATED,
        teacher_license=said.get("teacher_license") or UNSTATED,
    )
    header = DatasetCardData(
        license=said.get("corpus_license") or None,
        pretty_name=said.get("title") or None,
        tags=["gumbel-distillation"],
        configs=[{"config_name": "default", "data_files": HERE}],
        teacher_license=said.get("teacher_license") or None,
    )
    Folder.of(folder).put("README.md", str(DatasetCard(f"---\n{header.to_yaml()}\n---\n{text}")).encode())


def published(content: bytes) -> bytes:
    """The card of a dataset whose shards are in subfolders."""
    return content.replace(f"data_files: {HERE}".encode(), f"data_files: {PUBLISHED}".encode(), 1)


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
    paths = [file["path"] for root in roots(identity) for file in root["corpus"]["files"]]
    files = ", ".join(f"`{path}`" for path in paths[:5]) + (f" and {len(paths) - 5:,} more" if len(paths) > 5 else "")
    kind = "Prompts" if "generation" in identity else "Corpus"
    lines = [f"{kind}: {files}; split `{corpus.get('split', 'several')}` (held out: {corpus.get('held_out', 'several')})."] if paths else []
    if "parents" in identity:
        lines.append(f"History: {lineage.in_words(identity)}; the identities before it are in manifest.json.")
    if teacher is not None:
        revision = teacher["revision"] or "none, a local folder"
        lines.append(
            f"Teacher: `{environment.get('teacher', 'named in the parents')}`, revision {revision}, weights sha256 `{teacher['weights_sha256']}`, "
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
