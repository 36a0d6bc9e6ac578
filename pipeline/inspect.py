"""What a dataset is, in words or as JSON: identity, totals, and what a token costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from noise.dataset import Manifest, Plan, committed, identity_hash
from noise.storage import DatasetError


def summary(folder: Path) -> dict[str, Any]:
    """Identity, state, totals and sizes. Raises DatasetError when the folder holds no plan."""
    if not (folder / "plan.json").exists():
        raise DatasetError(f"{folder} is not a noise dataset: it has no plan.json")
    plan = Plan.read(folder)
    value: dict[str, Any] = {
        "folder": str(folder),
        "identity": plan.identity,
        "identity_hash": identity_hash(plan.identity),
        "environment": plan.environment,
        "shards": len(plan.shards),
        "finished": (folder / "manifest.json").exists(),
    }
    if not value["finished"]:
        return value | {"committed": len(committed(folder))}
    manifest = Manifest.read(folder)
    codec = plan.metadata(0).codec
    totals = manifest.totals
    value |= {"committed": len(manifest.receipts), "totals": totals, "root_hash": manifest.root_hash}
    if totals["tokens"]:
        value["per_token"] = {
            "bytes": totals["bytes"] / totals["tokens"],
            "bytes_dense_fp16": 2 * codec.vocab_size,
            "kept": totals["kept"] / totals["tokens"],
            "kept_bound": codec.expected_kept_bound,
            "nll": totals["nll_sum"] / totals["tokens"],
        }
    return value


def describe(folder: Path) -> str:
    return json.dumps(summary(folder), indent=1, sort_keys=True)


def in_words(folder: Path) -> str:
    """One screen for people."""
    value = summary(folder)
    identity = value["identity"]
    corpus, teacher, tokenizer = identity["corpus"], identity["teacher"], identity["tokenizer"]
    names = ", ".join(file["path"] for file in corpus["files"][:3]) + (f" and {len(corpus['files']) - 3} more" if len(corpus["files"]) > 3 else "")
    lines = [
        f"{folder}: {'finished' if value['finished'] else 'unfinished'}, {value['committed']:,} of {value['shards']:,} shards committed",
        f"  identity    {value['identity_hash']}",
        f"  corpus      {names}; split {corpus['split']}, held out {corpus['held_out']}",
        f"  tokenizer   {tokenizer['length']:,} entries, BOS {tokenizer['bos']}, EOS {tokenizer['eos']}, sha256 {tokenizer['sha256'][:16]}",
        f"  rows        of {identity['block_length']} positions, packing {identity['packing']['policy']}",
        f"  teacher     {'none' if teacher is None else _teacher(teacher, value['environment'])}",
        f"  noise       extraction {identity['extraction']}, epsilon {identity['epsilon']}, {identity['draws']} draws, V {identity['vocab_size']:,}, "
        f"seed {identity['seed']}",
    ]
    if value["finished"]:
        totals = value["totals"]
        lines.append(
            f"  holds       {totals['rows']:,} rows, {totals['tokens']:,} positions with noise, {totals['bytes']:,} bytes; "
            f"{totals['characters_in']:,} characters"
        )
        lines.append(f"  root hash   {value['root_hash']}")
    if "per_token" in value:
        per = value["per_token"]
        lines.append(
            f"  per token   {per['bytes']:.1f} bytes (dense fp16: {per['bytes_dense_fp16']:,}), {per['kept']:.2f} kept entries "
            f"(bound {per['kept_bound']:.2f}), "
            f"teacher's NLL {per['nll']:.3f} nats"
        )
    return "\n".join(lines)


def _teacher(teacher: dict[str, Any], environment: dict[str, Any]) -> str:
    revision = f" at {teacher['revision'][:12]}" if teacher["revision"] else ""
    weights = teacher["weights_sha256"][:16]
    return f"{environment['teacher']}{revision}, {teacher['dtype']}, temperature {teacher['temperature']}, weights sha256 {weights}"
