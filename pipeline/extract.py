"""One shard, from its documents to its receipt.

A shard is a function of (plan, shard number, corpus, teacher): the same shard made twice, anywhere, in any order, has
the same bytes wherever the teacher's log-probs have (see `teacher`). What is written is committed at the end or not at all.
Shapes: B rows, L block length, V vocabulary, K kept entries.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from noise import philox
from noise.commit import commit_shard
from noise.dataset import Plan
from noise.folder import Where
from noise.receipt import Receipt
from noise.shard import ROWS_PER_BATCH, Rows, ShardMetadata
from noise.sketch import Sketch, TeacherError, encode, normaliser
from noise.storage import DatasetError
from pipeline.corpus import Corpus, Document
from pipeline.divide import ShardInput, digest
from pipeline.making import Making
from pipeline.memory import MakeRows, largest
from pipeline.packing import Blocks, Packer
from pipeline.tokenizer import Tokenizer


class Scores(Protocol):
    """What a shard needs of a teacher."""

    def scores(self, input_ids_BL: Tensor, at_N: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(slice of N, floating [n, V]) in order; row n's softmax is the distribution of the token after flat position at_N[n]."""


@dataclass(frozen=True)
class Job:
    """Everything that the shards of one dataset share.

    Two threads may make shards of one job: one reads, or writes what it has made, while the other has the teacher. Neither changes a byte.
    """

    folder: Where
    plan: Plan
    corpus: Corpus
    tokenizer: Tokenizer
    teacher: Scores | None
    """None when the extraction is none."""
    reading: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)
    turn: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)
    """Held for the teacher, from a shard's first micro-batch to its last."""

    def work(self, shard: int) -> int:
        """How much there is to do for a shard, in characters: the measure of progress."""
        return int(self.plan.shards[shard]["characters"])

    def extract(self, shard: int, making: Making | None = None) -> Receipt:
        """Make and commit one shard. Raises DatasetError naming the shard, and the row when it cannot be encoded (RowError)."""
        making = making or Making(shard)
        metadata = self.plan.metadata(shard)
        with self.reading:
            documents = self.documents(shard)
            packed = Packer.of(self.plan.identity).pack(self.tokens(documents))
        check_ids(packed.input_ids_BL, packed.length_B, metadata, making)
        characters = sum(document.characters for document in documents if document.ids is None)
        with closing(self.micro_batches(metadata, packed.input_ids_BL, packed.length_B, self.make(), making)) as rows:
            return commit_shard(self.folder, metadata, rows, characters, packed.dropped, making.left_out)

    def make(self) -> MakeRows:
        """What makes rows of packed ones."""
        return rows_without_noise if self.teacher is None else partial(rows_with_noise, teacher=self.teacher)

    def largest_micro_batch(self) -> int:
        """Rows of the largest micro-batch that fits beside the teacher, here."""
        metadata, teacher = self.plan.metadata(0), self.teacher
        row_1L = np.arange(metadata.block_length, dtype=np.int32)[None] % metadata.vocab_size
        row_1L[0, 0] = self.plan.identity["tokenizer"]["bos"]
        return largest(self.make(), metadata, row_1L, self.longest_row(), getattr(teacher, "device", torch.device("cpu")).type)

    def longest_row(self) -> int:
        """Positions that a row brings to the teacher."""
        return int(self.plan.identity["block_length"])

    def documents(self, shard: int) -> list[Document]:
        """The documents of a shard. Raises DatasetError naming the file when they are not those that the plan saw."""
        source = ShardInput.from_json(self.plan.shards[shard])
        documents = list(self.corpus.documents(source.start, source.stop))
        if source.sha256 == digest(document.digest for document in documents):
            return documents
        files = self.corpus.changed(source.start[0], source.stop[0] if source.stop[1] else source.stop[0] - 1)
        changed = f"{', '.join(files[:3])} was changed since" if files else "its files are the same, but not what is taken of them"
        raise DatasetError(
            f"shard {shard}: the corpus has {len(documents)} documents here, the plan saw {source.documents}, with other content: {changed}; "
            "restore it, or plan into a new output folder"
        )

    def tokens(self, documents: list[Document]) -> Iterator[list[int]]:
        """Token ids of each document: its own, or its text's."""
        if documents and documents[0].ids is not None:
            return (document.ids or [] for document in documents)
        return self.tokenizer.encode(document.text for document in documents)

    def micro_batches(
        self, metadata: ShardMetadata, input_ids_BL: Blocks, length_B: Blocks, make: MakeRows, making: Making
    ) -> Generator[Rows, None, None]:
        """`make` on each of the plan's micro-batches, while this shard has its turn at the teacher."""
        size = self.plan.environment["numerics"]["micro_batch"] if self.teacher is not None else ROWS_PER_BATCH
        with self.turn:
            yield from making.micro_batches(metadata, size, input_ids_BL, length_B, make)


def check_ids(input_ids_BL: Blocks, length_B: Blocks, metadata: ShardMetadata, making: Making) -> None:
    """Leaves out rows with a token id that is not below the vocabulary's width. Raises RowError for the first where that is not allowed."""
    outside_BL = (input_ids_BL < 0) | (input_ids_BL >= metadata.vocab_size)
    for row in np.flatnonzero(outside_BL.any(1)).tolist():
        position = int(outside_BL[row].argmax())
        reason = (
            f"token id {input_ids_BL[row, position]} is not below the teacher's width "
            f"{metadata.vocab_size}: the tokenizer does not belong to this teacher"
        )
        making.leave_out(row, position, int(length_B[row]) - 1, len(input_ids_BL), reason, again=False)


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
        (np.empty(0, index_K), np.empty(0, code_K)),
        zero,
    )


def rows_with_noise(metadata: ShardMetadata, sequence_id_B: np.ndarray, input_ids_BL: Blocks, length_B: Blocks, teacher: Scores) -> Rows:
    """Sketch one micro-batch. Raises TeacherError whose position is flat in B L."""
    L = metadata.block_length
    has_noise_BL = (np.arange(L)[None] >= 1) & (np.arange(L)[None] < length_B[:, None])
    token_at_N = torch.from_numpy(np.flatnonzero(has_noise_BL))
    ids_BL = torch.from_numpy(input_ids_BL.astype(np.int64))
    sequence_N = torch.from_numpy(sequence_id_B.view(np.int64))[token_at_N // L]
    rows_N5 = philox.rows(int(metadata.seed), sequence_N, token_at_N % L)
    sketches: list[Sketch] = []
    for part, scores_NV in teacher.scores(ids_BL, token_at_N - 1):
        device = scores_NV.device
        try:
            token_N = ids_BL.flatten()[token_at_N[part]]
            sketches.append(encode(scores_NV, token_N.to(device), rows_N5[part].to(device), metadata.codec, normaliser(scores_NV)))
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
    return Rows(sequence_id_B, input_ids_BL, length_B, log_prob_BL, kept_BL, (index, code), offset)


def _entry_types(metadata: ShardMetadata) -> tuple[type, type]:
    codec = metadata.codec
    return (np.uint16 if codec.index_bytes == 2 else np.uint32), (np.uint8 if codec.code_bytes == 1 else np.uint16)
