"""The test vectors of docs/format.md: tiny datasets in both format versions and every layout, their noise, and the stream number by number.

python -m tests.noise.make_vectors FOLDER

Run once; what is in tests/vectors stands for the format and is compared, not made again. Noise is written in float64 from the stream's
exact float32 v, so that a reader in another language can hold its own against it: float32 readers agree within 1e-5.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from noise.commit import commit_shard
from noise.dataset import Manifest, Plan
from noise.sketch import Codec
from tests.noise import second_reader, version_one
from tests.noise.teachers import BigramTeacher, identity_of, shard_rows

CODEC = Codec(11, 0.125, 2)
PACKED = Codec(65_539, 0.125, 1)
"""Of so large a vocabulary entries are packed: `index << 8 | code`."""
SEED = 0x0123456789ABCDEF
ROWS, BLOCK = [4, 3], 5


def make(folder: Path) -> None:
    teacher = BigramTeacher(CODEC.vocab_size)
    version_one.write_dataset(folder / "version-1", teacher, CODEC, ROWS, BLOCK, SEED)
    write_dataset(folder / "version-2", teacher, CODEC, ROWS, "none")
    write_dataset(folder / "version-2-zstd", teacher, CODEC, ROWS, "zstd")
    write_dataset(folder / "version-2-packed", RankTeacher(PACKED.vocab_size), PACKED, [3], "none")
    write(folder / "noise.json", [whole(place) for place in noise(folder / "version-2", CODEC.vocab_size)])
    write(folder / "packed.json", [few(place) for place in noise(folder / "version-2-packed", PACKED.vocab_size)])
    write(folder / "stream.json", stream())


@dataclass(frozen=True)
class RankTeacher:
    """p falls with the rank of a token, and the ranks begin elsewhere after each token: no table, whatever the vocabulary."""

    vocab_size: int

    def log_probs(self, ids_BL: torch.Tensor) -> torch.Tensor:
        """Log-probs [B, L, V] of the token at each position given the one before; position 0 is nothing's."""
        rank_V = torch.arange(self.vocab_size)
        log_p_V = torch.log_softmax(-1.3 * torch.log(rank_V + 1.5).double(), -1).float()
        before_BL = ids_BL.roll(1, dims=1)
        return log_p_V[(rank_V + 40_009 * (before_BL[..., None] + 1)) % self.vocab_size]

    def texts(self, count: int, block_length: int, seed: int) -> torch.Tensor:
        """Token ids int64 [B, L]."""
        random, ids_BL = torch.Generator().manual_seed(seed), torch.zeros(count, block_length, dtype=torch.int64)
        for position in range(1, block_length):
            p_BV = self.log_probs(ids_BL.roll(-position + 1, dims=1)[:, :2])[:, 1].exp()
            ids_BL[:, position] = torch.multinomial(p_BV, 1, generator=random)[:, 0]
        return ids_BL


def write_dataset(folder: Path, teacher: Any, codec: Codec, rows: list[int], compression: str) -> None:
    identity = identity_of(codec, BLOCK) | {"seed": str(SEED), "compression": compression}
    plan = Plan(identity, {}, [{"rows": count} for count in rows])
    plan.write(folder)
    for shard, count in enumerate(rows):
        commit_shard(folder, plan.metadata(shard), shard_rows(teacher, plan.metadata(shard), count), characters_in=count)
    Manifest.write(folder, plan)


def whole(place: dict[str, Any]) -> dict[str, Any]:
    """Of a place in a small vocabulary: every entry."""
    return {name: value for name, value in place.items() if name not in ("kept", "code")}


def few(place: dict[str, Any]) -> dict[str, Any]:
    """Of a place in a large vocabulary: the token, the kept entries, and both ends of the others."""
    entries = sorted({0, 1, 2, 3, len(place["g"]) - 1, place["token"], *place["kept"]})
    return place | {"entries": entries, "words": [place["words"][entry] for entry in entries], "g": [place["g"][entry] for entry in entries]}


def noise(dataset: Path, vocab_size: int) -> Iterator[dict[str, Any]]:
    """Every position with noise in every draw: token, kept entries and their codes, words of E_0 and of all entries, g of all entries."""
    for shard in second_reader.read_dataset(dataset):
        for row in range(len(shard.columns["length"])):
            positions = np.arange(1, int(shard.columns["length"][row]))
            sequence, start_L = int(shard.columns["sequence_id"][row]), second_reader.starts_of(shard)[row]
            for draw in range(shard.metadata["draws"]):
                word_NV, word0_N = second_reader.words(SEED, sequence, positions, draw, vocab_size)
                for n, g_V in enumerate(second_reader.noise_of_row(shard, row, draw)):
                    kept, code = second_reader.entries_at(shard, row, positions[n], start_L[positions[n]])
                    yield {
                        "shard": shard.metadata["shard"], "row": row, "sequence_id": str(sequence), "position": int(positions[n]), "draw": draw,
                        "token": int(shard.columns["input_ids"][row, positions[n]]), "kept": kept.tolist(), "code": code.astype(int).tolist(),
                        "word_e0": int(word0_N[n]), "words": word_NV[n].tolist(), "g": g_V.tolist(),
                    }  # fmt: skip


def stream() -> dict[str, Any]:
    """One place of the stream, step by step: counter and key, what each round leaves, words, v as bits, E."""
    sequence_id, position, draw, block = 2**32 + 1, 3, 1, 0
    counter = [block, position + draw * 2**24, sequence_id % 2**32, sequence_id // 2**32]
    key = [SEED % 2**32, SEED // 2**32]
    rounds, c, k = [], list(counter), list(key)
    for _ in range(10):
        product0, product1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(product1 >> 32) ^ c[1] ^ k[0], product1 % 2**32, (product0 >> 32) ^ c[3] ^ k[1], product0 % 2**32]
        rounds.append([f"{word:08x}" for word in c])
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    edges = np.array([0, 1, 255, 2**24 + 1, 2**31 - 1, 2**31, 2**32 - 2**7, 2**32 - 1], np.uint32)
    return {
        "seed": str(SEED), "sequence_id": str(sequence_id), "position": position, "draw": draw, "block": block,
        "counter": [f"{word:08x}" for word in counter], "key": [f"{word:08x}" for word in key], "rounds": rounds,
        "entries": [_number(word) for word in c], "edges": [_number(int(word)) for word in edges],
    }  # fmt: skip


def _number(word: int) -> dict[str, Any]:
    v = np.minimum((np.float32(np.uint32(word)) + np.float32(0.5)) * np.float32(2.0**-32), np.float32(1 - 2.0**-24))
    with localcontext(prec=50):  # logarithms of a machine's own library differ in their last bit from one processor to the next
        e = -(1 - Decimal(float(v))).ln()
        g = -e.ln()
    return {"word": word, "v_bits": f"{v.view(np.uint32):08x}", "v": float(v), "E": float(e), "g": float(g)}


def write(path: Path, value: Any) -> None:
    rows = value if isinstance(value, list) else None
    text = "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n" if rows is not None else json.dumps(value, indent=1) + "\n"
    path.write_text(text)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
