"""What a dataset is, in words or as JSON: identity, totals, what a token costs, what it is good for, and a few of its rows.

Costs the manifest and the plan (100,000 shards: seconds) and a look into at most three shards.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from noise import lineage
from noise.dataset import Manifest, Plan
from noise.folder import Folder, Where
from noise.identity import Identity, identity_hash
from noise.lineage import roots
from noise.receipt import listed
from noise.sketch import Codec
from noise.storage import DatasetError
from pipeline import glimpse
from pipeline.uses import uses


def summary(where: Where, rows: int = 3) -> dict[str, Any]:
    """Identity, state, totals, sizes, uses, and some rows. Raises DatasetError when the folder holds no plan.

    Reads the manifest, the plan and a few record batches, however many shards there are.
    """
    folder = Folder.of(where)
    if not folder.exists("plan.json"):
        raise DatasetError(f"{folder} is not a noise dataset: it has no plan.json")
    plan = Plan.read(folder)
    manifest = Manifest.read(folder) if folder.exists("manifest.json") else None
    value: dict[str, Any] = {
        "folder": str(folder),
        "identity": plan.identity,
        "identity_hash": identity_hash(plan.identity),
        "environment": plan.environment,
        "shards": len(plan.shards),
        "finished": manifest is not None and manifest.identity == plan.identity,
        "uses": [asdict(use) for use in uses(plan.identity)],
    }
    if manifest is None or not value["finished"]:
        return value | {"committed": len(listed(folder))}
    totals = manifest.totals
    value |= {"committed": len(manifest.receipts), "totals": totals, "root_hash": manifest.root_hash}
    if "rows_quarantined" in totals:
        value["quarantined"] = left_out(manifest)
    if totals["tokens"]:
        value["per_token"] = _per_token(manifest)
    seen = glimpse.look(folder, manifest, rows)
    value |= {"looked_at_shards": seen.shards, "rows": glimpse.rows_in_words(seen, folder)}
    return value | ({"kept_by_position": seen.kept_by_position()} if seen.kept_L.any() else {})


def _per_token(manifest: Manifest) -> dict[str, float]:
    identity, totals = manifest.identity, manifest.totals
    codec = Codec(identity["vocab_size"], identity["epsilon"], identity["draws"])
    value = {
        "bytes": totals["bytes"] / totals["tokens"],
        "bytes_dense_fp16": 2 * codec.vocab_size,
        "nll": totals["nll_sum"] / totals["tokens"],
    }
    if identity["extraction"] == "parallel":
        value |= {"kept": totals["kept"] / totals["tokens"], "kept_bound": codec.expected_kept_bound}
    return value


def plot(where: Where, path: Path) -> None:
    """Kept entries by position, as a picture. Raises DatasetError where nothing is kept."""
    folder = Folder.of(where)
    manifest = Manifest.read(folder)
    identity = manifest.identity
    if identity["extraction"] != "parallel":
        raise DatasetError(f"--plot: {folder} keeps no entries (extraction: {identity['extraction']})")
    bound = Codec(identity["vocab_size"], identity["epsilon"], identity["draws"]).expected_kept_bound
    glimpse.draw(glimpse.look(folder, manifest, 0), bound, path)


def left_out(manifest: Manifest) -> list[str]:
    """Each quarantined row in words."""
    return [f"shard {of.shard}, row {row.row}, {row.tokens} tokens: {row.reason}" for of in manifest.receipts for row in of.quarantined]


def is_finished(folder: Folder, plan: Plan) -> bool:
    """A manifest of this plan, not of the dataset that it grows from."""
    return folder.exists("manifest.json") and Manifest.read(folder).identity == plan.identity


def describe(folder: Where, rows: int = 3) -> str:
    return json.dumps(summary(folder, rows), indent=1, sort_keys=True)


def in_words(where: Where, rows: int = 0) -> str:
    """A screen for people. Raises DatasetError where the identity does not say what this project's identities say."""
    value = summary(where, rows)
    try:
        return "\n".join(line.replace("\n", " ") for line in _lines(str(where), value))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DatasetError(f"{where}: its identity does not describe it as this project's do ({error!r}); --json prints what there is") from None


def _lines(folder: str, value: dict[str, Any]) -> list[str]:
    identity = value["identity"]
    teacher, tokenizer = identity["teacher"], identity["tokenizer"]
    lines = [
        f"{folder}: {'finished' if value['finished'] else 'unfinished'}, {value['committed']:,} of {value['shards']:,} shards committed",
        f"  identity    {value['identity_hash']}",
        _source(identity),
        f"  tokenizer   {tokenizer['length']:,} entries, BOS {tokenizer['bos']}, EOS {tokenizer['eos']}, sha256 {tokenizer['sha256'][:16]}",
        f"  rows        of {identity['block_length']} positions, {_layout(identity)}",
        f"  format      version {identity['format_version']}, compression {identity.get('compression', 'none')}",
        f"  teacher     {'none' if teacher is None else _teacher(teacher, value['environment'])}",
        f"  noise       {_noise(identity)}, V {identity['vocab_size']:,}, seed {identity['seed']}",
    ]
    if value["finished"]:
        lines += _held(value)
    if "per_token" in value:
        per = value["per_token"]
        kept = f", {per['kept']:.2f} kept entries (bound {per['kept_bound']:.2f})" if "kept" in per else ""
        saved = f"dense fp16: {per['bytes_dense_fp16']:,}, {per['bytes_dense_fp16'] / per['bytes']:,.0f} times as much"
        lines.append(f"  per token   {per['bytes']:.1f} bytes ({saved}){kept}, teacher's NLL {per['nll']:.3f} nats")
    if "kept_by_position" in value:
        known = [kept for kept in value["kept_by_position"] if kept is not None]
        lines.append(
            f"  kept at     |{glimpse.bars(value['kept_by_position'])}| positions 0 to {identity['block_length'] - 1}, at most {max(known):.1f}"
        )
    lines += [f"  {'good for' if use['possible'] else 'not for '}    {use['name']} ({use['why']})" for use in value["uses"]]
    return lines + [_row(row) for row in value.get("rows", [])]


def _held(value: dict[str, Any]) -> list[str]:
    totals = value["totals"]
    lines = [
        f"  holds       {totals['rows']:,} rows, {totals['tokens']:,} positions with noise, {totals['bytes']:,} bytes"
        + (f"; {totals['characters_in']:,} characters" if totals["characters_in"] else "")
        + (f"; {totals['tokens_dropped']:,} tokens left out by packing" if "tokens_dropped" in totals else "")
        + (f"; {totals['rows_quarantined']:,} rows quarantined" if "rows_quarantined" in totals else "")
    ]
    return [*lines, *(f"  left out    {line}" for line in value.get("quarantined", [])[:5]), f"  root hash   {value['root_hash']}"]


def _row(row: dict[str, Any]) -> str:
    nll = f", NLL {row['nll']:.2f}" if "nll" in row else ""
    text = json.dumps(row["text"], ensure_ascii=False) if "text" in row else f"ids {row['ids']} (no text: {row['text_unreadable']})"
    return f"  shard {row['shard']}, row {row['row']}, {row['length']} tokens{nll}: {text}"


def _source(identity: Identity) -> str:
    """Where the text comes from: the corpus, or what the teacher went on from."""
    corpus, paths = identity["corpus"], [file["path"] for root in roots(identity) for file in root["corpus"]["files"]]
    if not paths:
        return "  text        written by the teacher, from BOS alone"
    names = ", ".join(paths[:3]) + (f" and {len(paths) - 3:,} more" if len(paths) > 3 else "")
    names += f" ({lineage.in_words(identity)})" if "parents" in identity else ""
    kind = "prompts" if "generation" in identity else "corpus "
    return f"  {kind}     {names}; split {corpus.get('split', 'several')}, held out {corpus.get('held_out', 'several')}"


def _noise(identity: Identity) -> str:
    if identity["extraction"] == "sequential":
        return "extraction sequential: the prior draw that the text was written from, nothing kept"
    return f"extraction {identity['extraction']}, epsilon {identity['epsilon']}, {identity['draws']} draws"


def _layout(identity: Identity) -> str:
    if "generation" not in identity:
        return packing_in_words(identity)
    rule = identity["generation"]
    cut = f", prompts of at most {rule['prompt_tokens']} tokens" if rule["prompt_tokens"] else ""
    samples = f", {rule['samples']} a prompt" if rule["samples"] else ""
    masked = f"{rule['masked_ids']['count']:,} ids masked (special tokens {rule['special_tokens']})"
    return f"{'ended by EOS' if rule['stop'] == 'eos' else 'filled'}{samples}{cut}; {masked}"


def packing_in_words(identity: Identity) -> str:
    rule = identity["packing"]
    apart = not (identity["teacher"] or {}).get("attention_across_documents", True)
    said = {
        f"packing {rule['policy']}": True,
        f"long documents {rule.get('long_documents')}": "long_documents" in rule,
        "every block ends in EOS": "block_end" in rule,
        "the last block of a shard dropped": "tail" in rule,
        "documents read apart": apart,
    }
    return ", ".join(text for text, holds in said.items() if holds)


def _teacher(teacher: dict[str, Any], environment: dict[str, Any]) -> str:
    revision = f" at {teacher['revision'][:12]}" if teacher["revision"] else ""
    weights = teacher["weights_sha256"][:16]
    return f"{environment['teacher']}{revision}, {teacher['dtype']}, temperature {teacher['temperature']}, weights sha256 {weights}"
