"""What a dataset is, in words or as JSON: identity, totals, and what a token costs."""

from __future__ import annotations

import json
from typing import Any

from noise.dataset import Manifest, Plan
from noise.folder import Folder, Where
from noise.identity import Identity, identity_hash, parts
from noise.receipt import listed
from noise.storage import DatasetError


def summary(where: Where) -> dict[str, Any]:
    """Identity, state, totals and sizes. Raises DatasetError when the folder holds no plan."""
    folder = Folder.of(where)
    if not folder.exists("plan.json"):
        raise DatasetError(f"{folder} is not a noise dataset: it has no plan.json")
    plan = Plan.read(folder)
    value: dict[str, Any] = {
        "folder": str(folder),
        "identity": plan.identity,
        "identity_hash": identity_hash(plan.identity),
        "environment": plan.environment,
        "shards": len(plan.shards),
        "finished": _finished(folder, plan),
    }
    if not value["finished"]:
        return value | {"committed": len(listed(folder))}
    manifest = Manifest.read(folder)
    codec = plan.metadata(0).codec
    totals = manifest.totals
    value |= {"committed": len(manifest.receipts), "totals": totals, "root_hash": manifest.root_hash}
    if "rows_quarantined" in totals:
        value["quarantined"] = left_out(manifest)
    if totals["tokens"]:
        value["per_token"] = {
            "bytes": totals["bytes"] / totals["tokens"],
            "bytes_dense_fp16": 2 * codec.vocab_size,
            "nll": totals["nll_sum"] / totals["tokens"],
        }
        if plan.identity["extraction"] == "parallel":
            value["per_token"] |= {"kept": totals["kept"] / totals["tokens"], "kept_bound": codec.expected_kept_bound}
    return value


def left_out(manifest: Manifest) -> list[str]:
    """Each quarantined row in words."""
    return [f"shard {of.shard}, row {row.row}, {row.tokens} tokens: {row.reason}" for of in manifest.receipts for row in of.quarantined]


def _finished(folder: Folder, plan: Plan) -> bool:
    """A manifest of this plan, not of the dataset that it grows from."""
    return folder.exists("manifest.json") and Manifest.read(folder).identity == plan.identity


def describe(folder: Where) -> str:
    return json.dumps(summary(folder), indent=1, sort_keys=True)


def in_words(folder: Where) -> str:
    """One screen for people."""
    value = summary(folder)
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
        totals = value["totals"]
        lines.append(
            f"  holds       {totals['rows']:,} rows, {totals['tokens']:,} positions with noise, {totals['bytes']:,} bytes"
            + (f"; {totals['characters_in']:,} characters" if totals["characters_in"] else "")
            + (f"; {totals['tokens_dropped']:,} tokens left out by packing" if "tokens_dropped" in totals else "")
            + (f"; {totals['rows_quarantined']:,} rows quarantined" if "rows_quarantined" in totals else "")
        )
        lines += [f"  left out    {line}" for line in value.get("quarantined", [])[:5]]
        lines.append(f"  root hash   {value['root_hash']}")
    if "per_token" in value:
        per = value["per_token"]
        kept = f", {per['kept']:.2f} kept entries (bound {per['kept_bound']:.2f})" if "kept" in per else ""
        lines.append(f"  per token   {per['bytes']:.1f} bytes (dense fp16: {per['bytes_dense_fp16']:,}){kept}, teacher's NLL {per['nll']:.3f} nats")
    return "\n".join(lines)


def _source(identity: Identity) -> str:
    """Where the text comes from: the corpus, or what the teacher went on from."""
    corpus, paths = identity["corpus"], [file["path"] for part in parts(identity) for file in part["corpus"]["files"]]
    if not paths:
        return "  text        written by the teacher, from BOS alone"
    names = ", ".join(paths[:3]) + (f" and {len(paths) - 3:,} more" if len(paths) > 3 else "")
    names += f" (grown {len(identity['parents']) - 1} times)" if "parents" in identity else ""
    kind = "prompts" if "generation" in identity else "corpus "
    return f"  {kind}     {names}; split {corpus['split']}, held out {corpus['held_out']}"


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
