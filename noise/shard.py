"""One shard: rows of tokens with their kept entries, in one Arrow IPC file (format version 1).

Columns: sequence_id uint64, input_ids int32[L], length int32, log_prob float32[L], kept uint16[L], index and code lists.
Record batches of 64 rows, uncompressed, so that a reader maps the file and slices it without copying.
Equal bytes: the same rows in the same order give the same file, whatever the sizes of the pieces they were added in.
Shapes: B rows, L block length, K kept entries of those rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from noise.sketch import Codec
from noise.storage import DatasetError, canonical_json, checked_fields

FORMAT_VERSION = 1
ROWS_PER_BATCH = 64
EXTRACTIONS = ("parallel", "sequential", "none")

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class ShardMetadata:
    """What a shard says of itself, in the schema's metadata key `gumbel`."""

    format_version: int
    seed: str
    """Decimal string, 0..2^64-1: this shard's own seed."""
    epsilon: float
    step: float
    draws: int
    vocab_size: int
    block_length: int
    extraction: str
    shard: int
    identity_hash: str

    @property
    def codec(self) -> Codec:
        return Codec(self.vocab_size, self.epsilon, self.draws)

    @classmethod
    def from_json(cls, value: dict[str, Any], name: str) -> ShardMetadata:
        """Checked metadata. Raises DatasetError naming `name` and the field that is missing or not allowed."""
        version = value.get("format_version")
        if version != FORMAT_VERSION:
            raise DatasetError(f"{name} has format version {version}; this code reads version {FORMAT_VERSION}")
        metadata = cls(**checked_fields(cls, value, f"{name}: metadata"))
        try:
            codec, seed = metadata.codec, int(metadata.seed)
        except ValueError as error:
            raise DatasetError(f"{name}: {error}") from None
        if metadata.extraction not in EXTRACTIONS:
            raise DatasetError(f"{name}: extraction is {metadata.extraction!r}, expected one of {EXTRACTIONS}")
        if metadata.step != codec.step or not 0 <= seed < 2**64 or not 2 <= metadata.block_length <= 2**24 or metadata.shard < 0:
            raise DatasetError(f"{name}: metadata is out of range: step {metadata.step}, seed {seed}, block_length {metadata.block_length}")
        return metadata


@dataclass(frozen=True)
class Rows:
    """Rows as whole arrays; views into the mapped file when they come from a reader."""

    sequence_id: Array
    """uint64 [B]"""
    input_ids: Array
    """int32 [B, L]"""
    length: Array
    """int32 [B]"""
    log_prob: Array
    """float32 [B, L]"""
    kept: Array
    """uint16 [B, L]"""
    index: Array
    """uint16 or uint32 [K]: entries of the first row's position 0, 1, ..., then the second row's"""
    code: Array
    """uint8 or uint16 [K]"""
    offset: Array
    """int64 [B + 1]: where each row's entries begin in index and code"""

    def __len__(self) -> int:
        return len(self.sequence_id)

    def __getitem__(self, at: slice) -> Rows:
        start, stop, stride = at.indices(len(self))
        assert stride == 1, "rows are sliced as a range"
        stop = max(start, stop)
        offset = self.offset[start : stop + 1]
        entries = slice(int(offset[0]), int(offset[-1]))
        return Rows(
            self.sequence_id[at], self.input_ids[at], self.length[at], self.log_prob[at], self.kept[at],
            self.index[entries], self.code[entries], offset - offset[0],
        )  # fmt: skip

    @staticmethod
    def concatenate(parts: Sequence[Rows]) -> Rows:
        """Rows one after another, copied into new arrays."""
        if len(parts) == 1:
            return parts[0]
        starts = np.cumsum([0] + [len(part.index) for part in parts])
        offset = np.concatenate([part.offset[:-1] + start for part, start in zip(parts, starts, strict=False)] + [starts[-1:]])
        columns = ("sequence_id", "input_ids", "length", "log_prob", "kept", "index", "code")
        return Rows(**{column: np.concatenate([getattr(part, column) for part in parts]) for column in columns}, offset=offset)


def schema(metadata: ShardMetadata) -> pa.Schema:
    """The Arrow schema of format version 1; every field is non-nullable."""
    codec, length = metadata.codec, metadata.block_length
    index = pa.uint16() if codec.index_bytes == 2 else pa.uint32()
    code = pa.uint8() if codec.code_bytes == 1 else pa.uint16()

    def each(name: str, kind: pa.DataType) -> pa.Field:
        return pa.field(name, pa.list_(pa.field("item", kind, nullable=False), length), nullable=False)

    def entries(name: str, kind: pa.DataType) -> pa.Field:
        return pa.field(name, pa.large_list(pa.field("item", kind, nullable=False)), nullable=False)

    columns = [
        pa.field("sequence_id", pa.uint64(), nullable=False),
        each("input_ids", pa.int32()),
        pa.field("length", pa.int32(), nullable=False),
        each("log_prob", pa.float32()),
        each("kept", pa.uint16()),
        entries("index", index),
        entries("code", code),
    ]
    return pa.schema(columns, metadata={"gumbel": canonical_json(asdict(metadata))})


class ShardWriter:
    """Streams rows into one Arrow file in record batches of exactly 64 rows; `close` writes the last, shorter one."""

    def __init__(self, file: BinaryIO, metadata: ShardMetadata):
        self.schema = schema(metadata)
        self._writer = pa.ipc.new_file(pa.PythonFile(file, mode="w"), self.schema)
        self._pending: list[Rows] = []

    def add(self, rows: Rows) -> None:
        self._pending.append(rows)
        if sum(map(len, self._pending)) >= ROWS_PER_BATCH:
            pending = Rows.concatenate(self._pending)
            whole = len(pending) - len(pending) % ROWS_PER_BATCH
            for start in range(0, whole, ROWS_PER_BATCH):
                self._write(pending[start : start + ROWS_PER_BATCH])
            self._pending = [pending[whole : len(pending)]] if whole < len(pending) else []

    def _write(self, rows: Rows) -> None:
        columns: list[pa.Array] = []
        for field in self.schema:
            value = getattr(rows, field.name)
            if pa.types.is_fixed_size_list(field.type):
                flat = pa.array(value.reshape(-1), type=field.type.value_type)
                columns.append(pa.FixedSizeListArray.from_arrays(flat, type=field.type))
            elif pa.types.is_large_list(field.type):
                flat = pa.array(value, type=field.type.value_type)
                columns.append(pa.LargeListArray.from_arrays(pa.array(rows.offset, pa.int64()), flat, type=field.type))
            else:
                columns.append(pa.array(value, type=field.type))
        self._writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=self.schema))

    def close(self) -> None:
        if self._pending:
            self._write(Rows.concatenate(self._pending))
        self._writer.close()


class ShardReader:
    """A memory-mapped shard. Raises DatasetError that names the file and what is wrong with it."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = pa.ipc.open_file(pa.memory_map(str(path)))
            encoded = (self._file.schema.metadata or {}).get(b"gumbel")
            if encoded is None:
                raise DatasetError(f"{path} is an Arrow file without the metadata key 'gumbel': not a noise shard")
            self.metadata = ShardMetadata.from_json(_json_object(encoded, path), str(path))
            expected = schema(self.metadata)
            if not self._file.schema.equals(expected):
                raise DatasetError(f"{path} has columns {_columns(self._file.schema)}; format version {FORMAT_VERSION} has {_columns(expected)}")
            self.batches = self._file.num_record_batches
        except FileNotFoundError:
            raise DatasetError(f"{path} does not exist") from None
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DatasetError(f"{path} is truncated or damaged ({error}); fetch it again or remake it from its plan") from None

    def batch(self, number: int) -> Rows:
        """Record batch `number` as zero-copy arrays. Its structure, counts and ids were checked, so they are safe to index with."""
        try:
            record_batch = self._file.get_batch(number)
            record_batch.validate(full=True)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DatasetError(f"{self.path}: record batch {number} is damaged ({error}); fetch the shard again") from None
        wrong = self._wrong(number, record_batch)
        if wrong:
            raise DatasetError(f"{self.path}: record batch {number} is damaged ({wrong}); fetch the shard again")
        return self._rows(record_batch)

    def _wrong(self, number: int, record_batch: pa.RecordBatch) -> str:
        """What Arrow's own validation leaves open and a reader would trip over; empty when all is well."""
        if any(column.null_count or (hasattr(column, "values") and column.values.null_count) for column in record_batch.columns):
            return "it has nulls"
        if len(record_batch) != ROWS_PER_BATCH and number < self.batches - 1:
            return f"it has {len(record_batch)} rows, expected {ROWS_PER_BATCH}"
        rows, vocab_size, length = self._rows(record_batch), self.metadata.vocab_size, self.metadata.block_length
        if not record_batch.column("index").offsets.equals(record_batch.column("code").offsets):
            return "its lists of entries and codes differ in length"
        if not np.array_equal(np.diff(rows.offset), rows.kept.sum(axis=1, dtype=np.int64)):
            return "counts in 'kept' do not add up to its lists"
        if len(rows) and not 1 <= rows.length.min() <= rows.length.max() <= length:
            return f"a length is outside 1..{length}"
        if len(rows) and not 0 <= rows.input_ids.min() <= rows.input_ids.max() < vocab_size:
            return f"a token id is not below vocab_size {vocab_size}"
        if len(rows.index) and rows.index.max() >= vocab_size:
            return f"a kept entry is not below vocab_size {vocab_size}"
        return ""

    def _rows(self, record_batch: pa.RecordBatch) -> Rows:
        """A validated record batch without nulls, as arrays."""
        count, length = len(record_batch), self.metadata.block_length
        column = dict(zip(record_batch.schema.names, record_batch.columns, strict=True))
        offset = column["index"].offsets.to_numpy()
        return Rows(
            column["sequence_id"].to_numpy(),
            column["input_ids"].flatten().to_numpy().reshape(count, length),
            column["length"].to_numpy(),
            column["log_prob"].flatten().to_numpy().reshape(count, length),
            column["kept"].flatten().to_numpy().reshape(count, length),
            column["index"].flatten().to_numpy(),
            column["code"].flatten().to_numpy(),
            offset - offset[0],
        )

    def __iter__(self) -> Iterator[Rows]:
        return (self.batch(number) for number in range(self.batches))


def _json_object(encoded: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(encoded)
    except (ValueError, RecursionError):
        raise DatasetError(f"{path}: the metadata key 'gumbel' is not valid JSON") from None
    if not isinstance(value, dict):
        raise DatasetError(f"{path}: the metadata key 'gumbel' is not a JSON object")
    return value


def _columns(of: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}{'' if not field.nullable else ' nullable'}" for field in of)
