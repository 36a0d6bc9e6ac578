"""One shard, from its documents to its receipt.

A shard is a function of (plan, shard number, corpus, teacher): the same shard made twice, anywhere, in any order, has
the same bytes wherever the teacher's log-probs have (see `teacher`). What is written is committed at the end or not at all.
Shapes: B rows, L block length, V vocabulary, K kept entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from noise import philox
from noise.dataset import Plan, Receipt, commit_shard
from noise.shard import Rows, ShardMetadata
from noise.sketch import Sketch, TeacherError, encode
from noise.storage import DatasetError
from pipeline.corpus import Corpus
from pipeline.packing import Blocks, concat
from pipeline.plan import ShardInput
from pipeline.tokenizer import Tokenizer


class LogProbs(Protocol):
    """What a shard needs of a teacher."""

    def log_probs(self, input_ids_BL: Tensor, at_N: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(slice of N, float32 [n, V]) in order; row n is the distribution of the token after flat position at_N[n]."""


@dataclass(frozen=True)
class Job:
    """Everything that the shards of one dataset share."""

    folder: Path
    plan: Plan
    corpus: Corpus
    tokenizer: Tokenizer
    teacher: LogProbs | None
    """None when the extraction is none."""

    def extract(self, shard: int) -> Receipt:
        """Make and commit one shard. Raises DatasetError naming shard and row when its data cannot be encoded."""
        source = ShardInput.from_json(self.plan.shards[shard])
        documents = self.corpus.documents(source.start, source.stop)
        texts = [document.text for document in documents]
        characters = sum(map(len, texts))
        if (len(texts), characters) != (source.documents, source.characters):
            raise DatasetError(
                f"shard {shard}: the corpus has {len(texts)} documents and {characters} characters here, the plan saw {source.documents} and "
                f"{source.characters}: a file was changed; restore it, or plan into a new output folder"
            )
        special = self.plan.identity["tokenizer"]
        input_ids_BL, length_B = concat(self.tokenizer.encode(texts), special["bos"], special["eos"], self.plan.identity["block_length"])
        metadata = self.plan.metadata(shard)
        check_ids(input_ids_BL, metadata)
        return commit_shard(self.folder, metadata, self._rows(metadata, input_ids_BL, length_B), characters)

    def _rows(self, metadata: ShardMetadata, input_ids_BL: Blocks, length_B: Blocks) -> Iterator[Rows]:
        size = self.plan.environment["numerics"]["micro_batch"]
        for start in range(0, len(input_ids_BL), size):
            part = slice(start, min(start + size, len(input_ids_BL)))
            sequence_id_B = np.arange(part.start, part.stop, dtype=np.uint64) + np.uint64(metadata.shard * 2**32)
            if self.teacher is None:
                yield rows_without_noise(metadata, sequence_id_B, input_ids_BL[part], length_B[part])
            else:
                try:
                    yield rows_with_noise(metadata, sequence_id_B, input_ids_BL[part], length_B[part], self.teacher)
                except TeacherError as error:
                    row, position = divmod(error.position, metadata.block_length)
                    raise DatasetError(
                        f"shard {metadata.shard}, row {start + row}, position {position}: {error.reason}; nothing of this shard was written"
                    ) from None


def check_ids(input_ids_BL: Blocks, metadata: ShardMetadata) -> None:
    """Raises DatasetError for the first token id that is not below the vocabulary's width."""
    outside = np.argwhere((input_ids_BL < 0) | (input_ids_BL >= metadata.vocab_size))
    if len(outside):
        row, position = (int(value) for value in outside[0])
        raise DatasetError(
            f"shard {metadata.shard}, row {row}, position {position}: token id {input_ids_BL[row, position]} is not below the teacher's width "
            f"{metadata.vocab_size}: the tokenizer does not belong to this teacher"
        )


def rows_without_noise(metadata: ShardMetadata, sequence_id_B: np.ndarray, input_ids_BL: Blocks, length_B: Blocks) -> Rows:
    shape = input_ids_BL.shape
    index_K, code_K = _entry_types(metadata)
    zero = np.zeros(len(sequence_id_B) + 1, np.int64)
    return Rows(
        sequence_id_B,
        input_ids_BL,
        length_B,
        np.zeros(shape, np.float32),
        np.zeros(shape, np.uint16),
        np.empty(0, index_K),
        np.empty(0, code_K),
        zero,
    )


def rows_with_noise(metadata: ShardMetadata, sequence_id_B: np.ndarray, input_ids_BL: Blocks, length_B: Blocks, teacher: LogProbs) -> Rows:
    """Sketch one micro-batch. Raises TeacherError whose position is flat in B L."""
    L = metadata.block_length
    has_noise_BL = (np.arange(L)[None] >= 1) & (np.arange(L)[None] < length_B[:, None])
    token_at_N = torch.from_numpy(np.flatnonzero(has_noise_BL))
    ids_BL = torch.from_numpy(input_ids_BL.astype(np.int64))
    sequence_N = torch.from_numpy(sequence_id_B.view(np.int64))[token_at_N // L]
    rows_N5 = philox.rows(int(metadata.seed), sequence_N, token_at_N % L)
    sketches: list[Sketch] = []
    for part, log_probs_NV in teacher.log_probs(ids_BL, token_at_N - 1):
        device = log_probs_NV.device
        try:
            token_N = ids_BL.flatten()[token_at_N[part]]
            sketches.append(encode(log_probs_NV, token_N.to(device), rows_N5[part].to(device), metadata.codec))
        except TeacherError as error:
            raise TeacherError(int(token_at_N[part][error.position]), error.reason) from None
    return _assemble(metadata, sequence_id_B, input_ids_BL, length_B, has_noise_BL, sketches)


def _assemble(
    metadata: ShardMetadata, sequence_id_B: np.ndarray, input_ids_BL: Blocks, length_B: Blocks, has_noise_BL: np.ndarray, sketches: list[Sketch]
) -> Rows:
    """Rows from the sketches of their positions with noise, in order."""
    index_K, code_K = _entry_types(metadata)
    log_prob_BL, kept_BL = np.zeros(input_ids_BL.shape, np.float32), np.zeros(input_ids_BL.shape, np.uint16)
    if not sketches:  # every row is a BOS alone
        return rows_without_noise(metadata, sequence_id_B, input_ids_BL, length_B)
    log_prob_BL[has_noise_BL] = torch.cat([sketch.log_prob_N for sketch in sketches]).cpu().numpy()
    kept_BL[has_noise_BL] = torch.cat([sketch.kept_N for sketch in sketches]).cpu().numpy().astype(np.uint16)
    offset = np.concatenate([[0], np.cumsum(kept_BL.sum(axis=1, dtype=np.int64))])
    index: np.ndarray = torch.cat([sketch.index_K for sketch in sketches]).cpu().numpy().astype(index_K)
    code: np.ndarray = torch.cat([sketch.code_K for sketch in sketches]).cpu().numpy().astype(code_K)
    return Rows(sequence_id_B, input_ids_BL, length_B, log_prob_BL, kept_BL, index, code, offset)


def _entry_types(metadata: ShardMetadata) -> tuple[type, type]:
    codec = metadata.codec
    return (np.uint16 if codec.index_bytes == 2 else np.uint32), (np.uint8 if codec.code_bytes == 1 else np.uint16)
