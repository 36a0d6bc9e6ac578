"""Teachers that tests can see through: log-probs made on the spot, texts drawn from them, shards of their rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from noise import philox, sketch
from noise.commit import commit_shard
from noise.dataset import Manifest, Plan
from noise.identity import Identity, default_seed
from noise.shard import FORMAT_VERSION, Rows, ShardMetadata

SHAPES = ("flat", "peaked", "zipf", "random", "two-way", "one-hot", "on the grid", "vanishing tail", "impossible tail")


def log_probs(shape: str, positions: int, vocab_size: int, seed: int) -> torch.Tensor:
    """float32 [N, V] log-probs of one of SHAPES, another permutation of the vocabulary at every position."""
    random = torch.Generator().manual_seed(seed)
    rank_V = torch.arange(vocab_size, dtype=torch.float64)
    noise_NV = torch.randn(positions, vocab_size, generator=random, dtype=torch.float64)
    logits_NV = {
        "flat": 0 * noise_NV,
        "peaked": 12 * noise_NV,
        "zipf": 0 * noise_NV - 1.1 * torch.log(rank_V + 1.5),
        "random": noise_NV,
        "two-way": 0 * noise_NV - 60 * (rank_V >= 2),
        "one-hot": 0 * noise_NV - 40 * (rank_V >= 1),
        "on the grid": 0 * noise_NV - (rank_V + 18).clamp_max(200) * 0.125,
        "vanishing tail": 0 * noise_NV - rank_V.clamp_max(700),
        "impossible tail": (0 * noise_NV).masked_fill(rank_V >= max(2, vocab_size // 2), -torch.inf),
    }[shape]
    # what lies exactly on a code's edge must stay there, so it is not normalised (its sum is below 1, as every bound allows)
    result_NV = (logits_NV if shape == "on the grid" else torch.log_softmax(logits_NV, -1)).to(torch.float32)
    order_NV = torch.rand(positions, vocab_size, generator=random).argsort(-1)
    return result_NV.gather(1, order_NV)


def sample(log_probs_NV: torch.Tensor, seed: int) -> torch.Tensor:
    """Tokens x ~ p, int64 [N]."""
    random = torch.Generator().manual_seed(seed)
    return torch.multinomial(log_probs_NV.double().exp(), 1, generator=random)[:, 0]


@dataclass(frozen=True)
class BigramTeacher:
    """p(next | last) from one table; its texts begin with token 0."""

    vocab_size: int
    seed: int = 0

    def table(self) -> torch.Tensor:
        """Log-probs [V, V]."""
        random = torch.Generator().manual_seed(self.seed)
        return torch.log_softmax(2.5 * torch.randn(self.vocab_size, self.vocab_size, generator=random), -1)

    def texts(self, count: int, block_length: int, seed: int) -> torch.Tensor:
        """Token ids int64 [B, L]."""
        random, table_VV = torch.Generator().manual_seed(seed), self.table().exp()
        ids_BL = torch.zeros(count, block_length, dtype=torch.int64)
        for position in range(1, block_length):
            ids_BL[:, position] = torch.multinomial(table_VV[ids_BL[:, position - 1]], 1, generator=random)[:, 0]
        return ids_BL

    def log_probs(self, ids_BL: torch.Tensor) -> torch.Tensor:
        """Log-probs [B, L, V] of the token at each position given the one before; position 0 is nothing's."""
        before_BL = ids_BL.roll(1, dims=1)
        before_BL[:, 0] = 0
        return self.table()[before_BL]


def rows_of(teacher: BigramTeacher, metadata: ShardMetadata, ids_BL: torch.Tensor, length_B: torch.Tensor, first_row: int = 0) -> Rows:
    """Sketched rows of a shard, as a pipeline makes them."""
    count, block_length = ids_BL.shape
    ids_BL = ids_BL * (torch.arange(block_length) < length_B[:, None])
    sequence_id_B = metadata.shard * 2**32 + first_row + torch.arange(count)
    log_prob_BL, kept_BL = torch.zeros(count, block_length), torch.zeros(count, block_length, dtype=torch.int64)
    index_K = code_K = torch.zeros(0, dtype=torch.int64)
    if metadata.extraction == "parallel":
        has_noise_BL = (torch.arange(block_length) >= 1) & (torch.arange(block_length) < length_B[:, None])
        row_N, position_N = has_noise_BL.nonzero(as_tuple=True)
        rows_N5 = philox.rows(int(metadata.seed), sequence_id_B[row_N], position_N)
        made = sketch.encode(teacher.log_probs(ids_BL)[has_noise_BL], ids_BL[has_noise_BL], rows_N5, metadata.codec)
        log_prob_BL[has_noise_BL], kept_BL[has_noise_BL] = made.log_prob_N, made.kept_N
        index_K, code_K = made.index_K, made.code_K
    codec = metadata.codec
    return Rows(
        sequence_id_B.numpy().astype(np.uint64),
        ids_BL.numpy().astype(np.int32),
        length_B.numpy().astype(np.int32),
        log_prob_BL.numpy(),
        kept_BL.numpy().astype(np.uint16),
        (index_K.numpy().astype(f"uint{8 * codec.index_bytes}"), code_K.numpy().astype(f"uint{8 * codec.code_bytes}")),
        np.concatenate([[0], kept_BL.sum(1).cumsum(0).numpy()]),
    )


def identity_of(codec: sketch.Codec, block_length: int, extraction: str = "parallel") -> Identity:
    """An identity as small as the format allows, with a field that stands for the corpus."""
    value: Identity = {
        "format_version": FORMAT_VERSION, "vocab_size": codec.vocab_size, "block_length": block_length, "extraction": extraction,
        "epsilon": codec.epsilon, "draws": codec.draws, "corpus": {"files": [{"path": "a.txt", "sha256": "ab"}], "text_field": "text"},
    }  # fmt: skip
    return value | {"seed": str(default_seed(value))}


def shard_rows(teacher: BigramTeacher, metadata: ShardMetadata, count: int) -> Iterator[Rows]:
    """`count` rows of one shard in pieces of 50, lengths from 1 (nothing but BOS) to the block's."""
    length_B = torch.randint(1, metadata.block_length + 1, (count,), generator=torch.Generator().manual_seed(metadata.shard))
    length_B[0] = 1
    length_B[-1] = metadata.block_length
    ids_BL = teacher.texts(count, metadata.block_length, seed=metadata.shard + 1)
    for start in range(0, count, 50):
        part = slice(start, start + 50)
        yield rows_of(teacher, metadata, ids_BL[part], length_B[part], first_row=start)


def write_dataset(folder: Path, teacher: BigramTeacher, codec: sketch.Codec, rows_per_shard: list[int], block_length: int = 12) -> Manifest:
    """A finished dataset of a bigram teacher's texts."""
    plan = Plan(identity_of(codec, block_length), {"host": "any"}, [{"rows": count} for count in rows_per_shard])
    plan.write(folder)
    for shard, count in enumerate(rows_per_shard):
        metadata = plan.metadata(shard)
        commit_shard(folder, metadata, shard_rows(teacher, metadata, count), characters_in=count)
    return Manifest.write(folder, plan)
