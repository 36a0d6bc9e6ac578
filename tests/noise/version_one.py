"""Datasets of format version 1 as they were written on 2026-11-22, with pyarrow alone: a frozen writer, so that they stay readable.

Only the rows' contents come from the project; files, schema, metadata, hashes and JSON are made here and must not follow it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from noise.shard import Rows, ShardMetadata
from noise.sketch import Codec
from tests.noise.teachers import BigramTeacher, shard_rows


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_dataset(folder: Path, teacher: BigramTeacher, codec: Codec, rows_per_shard: Sequence[int], block_length: int = 12, seed: int = 7) -> str:
    """A finished dataset of a bigram teacher's texts; returns its root hash."""
    identity = {
        "format_version": 1, "vocab_size": codec.vocab_size, "block_length": block_length, "extraction": "parallel",
        "epsilon": codec.epsilon, "draws": codec.draws, "seed": str(seed), "corpus": "of a test",
    }  # fmt: skip
    identity_hash = sha256(canonical(identity).encode())
    (folder / "shards").mkdir(parents=True)
    plan = {"identity": identity, "identity_hash": identity_hash, "environment": {}, "shards": list(rows_per_shard)}
    (folder / "plan.json").write_text(json.dumps(plan))
    receipts = []
    for shard, count in enumerate(rows_per_shard):
        said = {
            "format_version": 1, "seed": str(seed), "epsilon": codec.epsilon, "step": min(codec.epsilon, 0.125), "draws": codec.draws,
            "vocab_size": codec.vocab_size, "block_length": block_length, "extraction": "parallel", "shard": shard, "identity_hash": identity_hash,
        }  # fmt: skip
        rows = Rows.concatenate(list(shard_rows(teacher, ShardMetadata(**said), count)))
        write_shard(folder / "shards" / f"{shard:05d}.arrow", rows, said)
        receipt = receipt_of(folder / "shards" / f"{shard:05d}.arrow", shard, rows)
        (folder / "shards" / f"{shard:05d}.json").write_text(json.dumps(receipt))
        receipts.append(receipt)
    totals = {name: sum(receipt[name] for receipt in receipts) for name in receipts[0] if name not in ("shard", "file", "sha256")}
    root_hash = sha256((identity_hash + "".join(receipt["sha256"] for receipt in receipts)).encode())
    manifest = {"identity": identity, "identity_hash": identity_hash, "totals": totals, "receipts": receipts, "root_hash": root_hash}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return root_hash


def write_shard(path: Path, rows: Rows, said: dict[str, Any]) -> None:
    """Record batches of 64 rows: int32 ids, uint16 counts, index and code apart."""
    narrow, fine = said["vocab_size"] <= 65536, said["step"] == 0.125
    types = {
        "sequence_id": pa.uint64(),
        "input_ids": pa.list_(pa.field("item", pa.int32(), nullable=False), said["block_length"]),
        "length": pa.int32(),
        "log_prob": pa.list_(pa.field("item", pa.float32(), nullable=False), said["block_length"]),
        "kept": pa.list_(pa.field("item", pa.uint16(), nullable=False), said["block_length"]),
        "index": pa.large_list(pa.field("item", pa.uint16() if narrow else pa.uint32(), nullable=False)),
        "code": pa.large_list(pa.field("item", pa.uint8() if fine else pa.uint16(), nullable=False)),
    }
    schema = pa.schema([pa.field(name, kind, nullable=False) for name, kind in types.items()], metadata={"gumbel": canonical(said)})
    with path.open("wb") as file, pa.ipc.new_file(file, schema) as writer:
        for start in range(0, len(rows), 64):
            part = rows[start : start + 64]
            columns = []
            for name, kind in types.items():
                value = getattr(part, name)
                flat = pa.array(value.reshape(-1), kind if kind in (pa.uint64(), pa.int32()) else kind.value_type)
                if name in ("index", "code"):
                    columns.append(pa.LargeListArray.from_arrays(pa.array(part.offset, pa.int64()), flat, type=kind))
                else:
                    columns.append(flat if value.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, type=kind))
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))


def receipt_of(path: Path, shard: int, rows: Rows) -> dict[str, Any]:
    content = path.read_bytes()
    return {
        "shard": shard, "file": path.name, "sha256": sha256(content), "bytes": len(content), "rows": len(rows),
        "tokens": int(rows.length.sum()) - len(rows), "kept": len(rows.index), "saturated": 0,
        "nll_sum": -sum(float(row.sum(dtype=np.float64)) for row in rows.log_prob), "characters_in": len(rows),
    }  # fmt: skip
