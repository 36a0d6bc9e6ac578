"""How much a plan will make, before any teacher runs: rows and tokens from a sample of the corpus, bytes from the format.

Bytes are arithmetic (docs/noise.md): columns and list offsets, without Arrow's headers, uncompressed. How many entries a
teacher keeps is not known here, so they are counted at the bound, R / c a token, which no teacher exceeds on average.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from noise.shard import ROWS_PER_BATCH, Layout, ShardMetadata
from pipeline.corpus import Document
from pipeline.divide import ShardInput
from pipeline.extract import Job
from pipeline.packing import Packer

SAMPLED_SHARDS, SAMPLED_CHARACTERS = 8, 50_000
"""Shards that are looked into, evenly spaced, and characters of each."""


@dataclass(frozen=True)
class Estimate:
    """Of a whole dataset."""

    rows: int
    tokens: int
    """Positions with a token, BOS and padding not counted."""
    bytes: int
    kept: float
    """Entries a token that the bytes reckon with."""

    def in_words(self) -> str:
        bound = f" (with {self.kept:.2f} kept entries a token, the most that any teacher keeps on average)" if self.kept else ""
        return f"about {self.rows:,} rows, {self.tokens:,} tokens, {'at most ' * (self.kept > 0)}{human(self.bytes)}{bound}"


def human(size: float) -> str:
    """1.5 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


def row_bytes(metadata: ShardMetadata) -> float:
    """Of a row without its entries: an id, a log-prob of 4 and a count at each of L positions; its sequence_id 8, length 4, and an offset of 8
    for each of its lists, one more in each record batch."""
    layout = Layout.of(metadata)
    position = 4 + (layout.input_ids.bit_width + layout.kept.bit_width) // 8
    return position * metadata.block_length + 8 + 4 + 8 * len(layout.entries) * (1 + 1 / ROWS_PER_BATCH)


def entry_bytes(metadata: ShardMetadata) -> int:
    """Of one kept entry."""
    return sum(kind.bit_width for kind in Layout.of(metadata).entries.values()) // 8


def of_job(job: Job, kept: float | None = None) -> Estimate:
    """What the plan of a job will make. Reads and tokenises a sample of the corpus; `kept` entries a token, or the bound."""
    identity, metadata = job.plan.identity, job.plan.metadata(0)
    if kept is None:
        kept = metadata.codec.expected_kept_bound if identity["extraction"] == "parallel" else 0.0
    if "generation" in identity:
        rows = identity["shards"]["rows"]
        tokens = rows * (identity["block_length"] - 1)
    else:
        rows, tokens = _rows_and_tokens(job)
    return Estimate(rows, tokens, round(rows * row_bytes(metadata) + tokens * kept * entry_bytes(metadata)), kept)


def _rows_and_tokens(job: Job) -> tuple[int, int]:
    """Of the whole corpus, by characters."""
    shards = [ShardInput.from_json(shard) for shard in job.plan.shards]
    documents = [document for source in spaced(shards, SAMPLED_SHARDS) for document in _beginning(job, source)]
    packer = Packer.of(job.plan.identity)
    packed = packer.pack(job.tokens(documents))
    characters = max(1, sum(document.characters for document in documents))
    tokens_a_character = int(packed.length_B.sum(dtype="int64") - len(packed.length_B)) / characters
    tokens = round(sum(source.characters for source in shards) * tokens_a_character)
    if packer.policy == "concat":  # blocks are full, but for the last of each shard
        return sum(math.ceil(source.characters * tokens_a_character / (packer.block_length - 1)) for source in shards), tokens
    return round(sum(source.characters for source in shards) * len(packed.length_B) / characters), tokens


def _beginning(job: Job, source: ShardInput) -> Iterator[Document]:
    taken = 0
    for document in job.corpus.documents(source.start, source.stop):
        yield document
        taken += document.characters
        if taken >= SAMPLED_CHARACTERS:
            return


def spaced(shards: list[ShardInput], count: int) -> list[ShardInput]:
    """At most `count` of them, evenly spaced."""
    step = max(1.0, len(shards) / count)
    return [shards[int(at * step)] for at in itertools.takewhile(lambda at: int(at * step) < len(shards), range(count))]
