"""A second reader, written from docs/format.md and DESIGN.md alone with numpy and pyarrow: nothing of `noise` is imported.

It answers whether the specification suffices to read a dataset, and checks what a dataset claims: hashes, receipts, the
schema, and, given the teacher's own log-probs, every bound of the sketch at every entry. Arithmetic is float64.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

FLOAT32 = 1e-5


def check(holds: Any, what: str) -> None:
    if not bool(holds):
        raise AssertionError(what)


# the stream


def philox(c0: np.ndarray, c1: np.ndarray, c2: np.ndarray, c3: np.ndarray, k0: int, k1: int) -> list[np.ndarray]:
    low32, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = (np.asarray(c, dtype=np.uint64) for c in (c0, c1, c2, c3))
    for _ in range(10):
        product0, product1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (product1 >> shift) ^ c1 ^ np.uint64(k0), product1 & low32, (product0 >> shift) ^ c3 ^ np.uint64(k1), product0 & low32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return list(np.broadcast_arrays(c0, c1, c2, c3))


def words(seed: int, sequence_id: int, positions: np.ndarray, draw: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Words of the entries [N, V] and of E_0 [N] at some positions of one sequence."""
    c1 = positions.astype(np.uint64)[:, None] + np.uint64(draw * 2**24)
    blocks = np.append(np.arange((vocab_size + 3) // 4), 0xFFFFFFFF)[None, :]
    lanes = np.stack(philox(blocks, c1, sequence_id % 2**32, sequence_id // 2**32, seed % 2**32, seed // 2**32), axis=-1)
    return lanes[:, :-1].reshape(len(positions), 4 * (blocks.size - 1))[:, :vocab_size], lanes[:, -1, 0]


def exponential(word: np.ndarray) -> np.ndarray:
    v = (word.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    return -np.log1p(-np.minimum(v, np.float32(1 - 2.0**-24)).astype(np.float64))


# the files


@dataclass(frozen=True)
class Shard:
    metadata: dict[str, Any]
    columns: dict[str, np.ndarray]
    """sequence_id [B], input_ids [B, L], length [B], log_prob [B, L], kept [B, L], index [K], code [K]"""


def read_shard(path: Path) -> Shard:
    """A shard's columns, of either format version, after its schema was compared with the table in docs/format.md."""
    file = pa.ipc.open_file(path.read_bytes())
    metadata = json.loads(file.schema.metadata[b"gumbel"])
    block_length, vocab_size, epsilon = metadata["block_length"], metadata["vocab_size"], metadata["epsilon"]
    check(metadata["format_version"] in (1, 2) and metadata["step"] == min(epsilon, 1 / 8), "version and step")
    second = metadata["format_version"] == 2
    index = pa.uint16() if vocab_size <= 65536 else pa.uint32()
    code = pa.uint8() if metadata["step"] == 1 / 8 else pa.uint16()
    few = vocab_size <= 256 or metadata["draws"] / math.expm1(epsilon) <= 8
    packed = second and 65536 < vocab_size <= 2**24 and code == pa.uint8()

    def plain(kind: pa.DataType) -> pa.Field:
        return pa.field("item", kind, nullable=False)

    types = {
        "sequence_id": pa.uint64(),
        "input_ids": pa.list_(plain(pa.uint16() if second and vocab_size <= 65536 else pa.int32()), block_length),
        "length": pa.int32(),
        "log_prob": pa.list_(plain(pa.float32()), block_length),
        "kept": pa.list_(plain(pa.uint8() if second and few else pa.uint16()), block_length),
    }
    types |= {"entry": pa.large_list(plain(pa.uint32()))} if packed else {"index": pa.large_list(plain(index)), "code": pa.large_list(plain(code))}
    check(file.schema.equals(pa.schema([pa.field(name, kind, nullable=False) for name, kind in types.items()])), f"schema of {path.name}")
    batches = [file.get_batch(number) for number in range(file.num_record_batches)]
    check(all(len(batch) == 64 for batch in batches[:-1]) and 0 < len(batches[-1]) <= 64, "record batches of 64 rows")
    columns = {}
    for name, kind in types.items():
        parts = [batch.column(name) if kind in (pa.uint64(), pa.int32()) else batch.column(name).flatten() for batch in batches]
        flat = np.concatenate([part.to_numpy() for part in parts])
        columns[name] = flat.reshape(-1, block_length) if pa.types.is_fixed_size_list(kind) else flat
    if packed:
        entry = columns.pop("entry")
        columns |= {"index": entry >> 8, "code": (entry & 255).astype(np.uint8)}
    check(len(columns["index"]) == len(columns["code"]) == columns["kept"].sum(), "counts of kept entries")
    return Shard(metadata, columns)


def read_dataset(folder: Path) -> list[Shard]:
    """All shards of a finished dataset, after every hash and count was made again from the files."""
    manifest, plan = (json.loads((folder / name).read_text()) for name in ("manifest.json", "plan.json"))
    canonical = json.dumps(manifest["identity"], sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    identity_hash = hashlib.sha256(canonical.encode("ascii")).hexdigest()
    check(plan["identity"] == manifest["identity"] and identity_hash == plan["identity_hash"] == manifest["identity_hash"], "identity")
    check(sorted(path.name for path in (folder / "shards").iterdir()) == sorted(
        f"{shard:05d}.{kind}" for shard in range(len(manifest["receipts"])) for kind in ("arrow", "json")
    ), "files under shards/")  # fmt: skip
    shards = []
    for number, receipt in enumerate(manifest["receipts"]):
        path = folder / "shards" / f"{number:05d}.arrow"
        check(json.loads(path.with_suffix(".json").read_text()) == receipt, "the receipt beside the shard")
        check(receipt["shard"] == number and receipt["file"] == path.name and receipt["bytes"] == path.stat().st_size, "shard, file, bytes")
        check(receipt["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest(), "sha256")
        shard = read_shard(path)
        check(shard.metadata["identity_hash"] == identity_hash and shard.metadata["shard"] == number, "the shard's own metadata")
        check_counts(shard, receipt)
        shards.append(shard)
    root = hashlib.sha256("".join([identity_hash, *(receipt["sha256"] for receipt in manifest["receipts"])]).encode("ascii")).hexdigest()
    check(root == manifest["root_hash"], "root_hash")
    check_seal(folder, manifest)
    for name, total in manifest["totals"].items():
        check(math.isclose(total, sum(receipt[name] for receipt in manifest["receipts"])), f"total of {name}")
    return shards


def check_seal(folder: Path, manifest: dict[str, Any]) -> None:
    """The manifest's own hash and those of the small files, where it has them."""
    seal = json.loads((folder / "seal.json").read_text()) if (folder / "seal.json").exists() else {}
    for name, digest in seal.get("files", {}).items():
        check(digest == hashlib.sha256((folder / name).read_bytes()).hexdigest(), f"sha256 of {name}")
    if "manifest_hash" in manifest:
        rest = {name: value for name, value in manifest.items() if name != "manifest_hash"}
        canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        check(manifest["manifest_hash"] == hashlib.sha256(canonical.encode("ascii")).hexdigest(), "manifest_hash")
        check((folder / "manifest.json").read_text() == json.dumps(manifest, sort_keys=True, indent=1) + "\n", "the manifest's form")


def check_counts(shard: Shard, receipt: dict[str, Any]) -> None:
    c, row_count = shard.columns, len(shard.columns["length"])
    saturated = (c["code"] == np.iinfo(c["code"].dtype).max).sum()
    found = {"rows": row_count, "tokens": c["length"].sum() - row_count, "kept": len(c["index"]), "saturated": saturated}
    check(all(receipt[name] == value for name, value in found.items()), f"receipt of shard {receipt['shard']}")
    check(math.isclose(receipt["nll_sum"], -c["log_prob"].sum(dtype=np.float64), abs_tol=1e-6), "nll_sum")


# the sketch


def starts_of(shard: Shard) -> np.ndarray:
    """Where the entries of each position begin, [B, L]."""
    return np.append(0, shard.columns["kept"].astype(np.int64).cumsum())[:-1].reshape(shard.columns["kept"].shape)


def entries_at(shard: Shard, row: int, position: int, start: int) -> tuple[np.ndarray, np.ndarray]:
    """(vocabulary entries, codes) that a position keeps."""
    at = slice(start, start + shard.columns["kept"][row, position])
    return shard.columns["index"][at], shard.columns["code"][at].astype(np.float64)


def noise_of_row(shard: Shard, row: int, draw: int) -> np.ndarray:
    """Decoded noise g of one draw at positions 1 to length - 1 of a row, float64 [N, V]."""
    m, c, start_L = shard.metadata, shard.columns, starts_of(shard)[row]
    positions = np.arange(1, int(c["length"][row]))
    word_NV, word0_N = words(int(m["seed"]), int(c["sequence_id"][row]), positions, draw, m["vocab_size"])
    a_NV, e0_N = exponential(word_NV), exponential(word0_N)
    for n, position in enumerate(positions):
        index, code = entries_at(shard, row, position, start_L[position])
        a_NV[n, index] += np.exp(-m["step"] * code) * e0_N[n]
    g_NV = -np.log(a_NV)
    g_NV[np.arange(len(positions)), c["input_ids"][row, positions]] = -c["log_prob"][row, positions].astype(np.float64) - np.log(e0_N)
    return g_NV


def rebuild(shard: Shard, draw: int, log_probs_BLV: np.ndarray) -> list[np.ndarray]:
    """Decoded noise of one draw, float64 [positions with noise, V] a row, each held against the teacher's log-probs."""
    start_BL = starts_of(shard)
    return [rebuild_row(shard, row, draw, start_BL[row], log_probs_BLV[row].astype(np.float64)) for row in range(len(shard.columns["length"]))]


def rebuild_row(shard: Shard, row: int, draw: int, start_L: np.ndarray, log_probs_LV: np.ndarray) -> np.ndarray:
    m, c, length = shard.metadata, shard.columns, int(shard.columns["length"][row])
    outside = np.r_[0, length : m["block_length"]]
    check(
        not c["kept"][row, outside].any() and not c["log_prob"][row, outside].any() and not c["input_ids"][row, length:].any(),
        "nothing where no noise is",
    )
    positions = np.arange(1, length)
    word_NV, word0_N = words(int(m["seed"]), int(c["sequence_id"][row]), positions, draw, m["vocab_size"])
    e_NV, e0_N, decoded_NV = exponential(word_NV), exponential(word0_N), noise_of_row(shard, row, draw)
    for n, position in enumerate(positions):
        token, log_p_V = int(c["input_ids"][row, position]), log_probs_LV[position]
        index, _ = entries_at(shard, row, position, start_L[position])
        check((np.diff(index.astype(np.int64)) > 0).all() and token not in index, "entries ascend and leave the token out")
        check(abs(c["log_prob"][row, position] - log_p_V[token]) <= FLOAT32, "the token's log-prob")
        check_bounds(decoded_NV[n], e_NV[n], e0_N[n], log_p_V, token, index, m)
    return decoded_NV


def check_bounds(decoded_V: np.ndarray, e_V: np.ndarray, e0: float, log_p_V: np.ndarray, token: int, index: np.ndarray, m: dict[str, Any]) -> None:
    """Every entry of one position against Algorithm 1 on the teacher's log-probs."""
    error_V = decoded_V + np.log(e_V + np.exp(log_p_V) * e0)
    error_V[token] = decoded_V[token] - (-log_p_V[token] - np.log(e0))
    kept_V = np.zeros(len(e_V), dtype=bool)
    kept_V[index] = True
    free = ~kept_V
    free[token] = False
    check(abs(error_V[token]) <= FLOAT32, "token")
    check(((error_V[free] >= -FLOAT32) & (error_V[free] <= m["epsilon"] + FLOAT32)).all(), "entries that are not kept")
    check(((error_V[kept_V] > -m["step"] - FLOAT32) & (error_V[kept_V] <= FLOAT32)).all(), "entries that are kept")
    check(int((log_p_V + decoded_V).argmax()) == token, "argmax(log p + g) is the token")
