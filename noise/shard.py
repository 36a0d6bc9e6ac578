"""One shard: rows of tokens with their kept entries, in one Arrow IPC file. Format version 2 is written; 1 is read too.

Columns: sequence_id, input_ids[L], length, log_prob[L], kept[L], and the entries: lists of index and code, or one list of
`index << 8 | code`. Their widths follow from the codec; `docs/format.md` has them, and why.
Record batches of 64 rows, uncompressed unless zstd is asked for, so that a reader maps the file and slices it without copying.
Equal bytes: the same rows in the same order give the same file, whatever the sizes of the pieces they were added in.
Shapes: B rows, L block length, K kept entries of those rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from noise.sketch import Codec
from noise.storage import DatasetError, canonical_json, checked_fields, parse_json
from noise.unpacked import LayoutError, blocks, unpacked_bytes

FORMAT_VERSION = 2
"""What is written."""
FORMAT_VERSIONS = (1, 2)
"""What is read."""
ROWS_PER_BATCH = 64
EXTRACTIONS = ("parallel", "sequential", "none")
COMPRESSIONS = ("none", "zstd")
ZSTD_LEVEL = 3
LARGEST_BATCH = 2**30
"""Bytes of memory that a compressed record batch may unpack to; a reader refuses more. (At L = 1,024 and epsilon = 1/8 it takes 3 MB.)"""

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
    compression: str = "none"
    """Of Arrow's buffers. The file says so itself too, so readers need not look; absent means none."""

    @property
    def codec(self) -> Codec:
        return Codec(self.vocab_size, self.epsilon, self.draws)

    @classmethod
    def from_json(cls, value: dict[str, Any], name: str) -> ShardMetadata:
        """Checked metadata. Raises DatasetError naming `name` and the field that is missing or not allowed."""
        check_version(value.get("format_version"), name)
        metadata = cls(**checked_fields(cls, {"compression": "none", **value}, f"{name}: metadata"))
        try:
            codec, seed = metadata.codec, int(metadata.seed)
        except ValueError as error:
            raise DatasetError(f"{name}: {error}") from None
        if metadata.extraction not in EXTRACTIONS:
            raise DatasetError(f"{name}: extraction is {metadata.extraction!r}, expected one of {EXTRACTIONS}")
        if metadata.compression not in COMPRESSIONS:
            raise DatasetError(f"{name}: compression is {metadata.compression!r}, expected one of {COMPRESSIONS}")
        in_range = 0 <= seed < 2**64 and 2 <= metadata.block_length <= 2**24 and metadata.shard >= 0
        if not in_range or metadata.step != codec.step or str(seed) != metadata.seed:
            said = f"step {metadata.step}, seed {metadata.seed[:40]}, block_length {metadata.block_length}"
            raise DatasetError(f"{name}: metadata is out of range: {said}")
        return metadata


def check_version(version: object, name: str) -> None:
    """Raises DatasetError naming `name` when this code cannot read that format version."""
    if version not in FORMAT_VERSIONS:
        raise DatasetError(f"{name} has format version {str(version)[:40]}; this code reads versions {' and '.join(map(str, FORMAT_VERSIONS))}")


@dataclass(frozen=True)
class Layout:
    """Which columns a shard has, and how wide they are: a function of format version and codec."""

    input_ids: pa.DataType
    kept: pa.DataType
    entries: dict[str, pa.DataType]
    """The lists that hold the entries: index and code, or both packed in `entry`."""

    @classmethod
    def of(cls, metadata: ShardMetadata) -> Layout:
        codec = metadata.codec
        index, code = (pa.uint16() if codec.index_bytes == 2 else pa.uint32()), (pa.uint8() if codec.code_bytes == 1 else pa.uint16())
        if metadata.format_version == 1:
            return cls(pa.int32(), pa.uint16(), {"index": index, "code": code})
        # E_0 <= 24 ln 2 in the stream: at most 133.1 entries are expected given every E_0, and 256 of them have a chance below e^-44
        few = codec.vocab_size <= 256 or codec.expected_kept_bound <= 8
        packs = 65536 < codec.vocab_size <= 2**24 and codec.code_bytes == 1
        ids = pa.uint16() if codec.index_bytes == 2 else pa.int32()
        return cls(ids, pa.uint8() if few else pa.uint16(), {"entry": pa.uint32()} if packs else {"index": index, "code": code})


@dataclass(frozen=True)
class Rows:
    """Rows as whole arrays; views into the mapped file when they come from a reader, in the widths that it has."""

    sequence_id: Array
    """uint64 [B]"""
    input_ids: Array
    """int32 or uint16 [B, L]"""
    length: Array
    """int32 [B]"""
    log_prob: Array
    """float32 [B, L]"""
    kept: Array
    """uint16 or uint8 [B, L]"""
    entries: tuple[Array, ...]
    """Entries of the first row's position 0, 1, ..., then the second row's: (index, code) or (index << 8 | code,), each [K]"""
    offset: Array
    """int64 [B + 1]: where each row's entries begin"""

    @property
    def index(self) -> Array:
        """uint16 or uint32 [K]. Packed entries are unpacked at every access: slice rows first."""
        return self.entries[0] if len(self.entries) == 2 else self.entries[0] >> 8

    @property
    def code(self) -> Array:
        """uint8 or uint16 [K]; see `index`."""
        return self.entries[-1] if len(self.entries) == 2 else self.entries[0].astype(np.uint8)

    def __len__(self) -> int:
        return len(self.sequence_id)

    def has_noise(self, extraction: str) -> Array:
        """bool [B, L]: parallel: positions 1..length-1; sequential: those of them whose log_prob is below 0, as prompts are given; none: nowhere."""
        position_L = np.arange(self.input_ids.shape[1])
        counts_BL: Array = (position_L > 0) & (position_L < self.length[:, None])
        return counts_BL & (self.log_prob < 0) if extraction == "sequential" else counts_BL & (extraction != "none")

    def __getitem__(self, at: slice) -> Rows:
        start, stop, stride = at.indices(len(self))
        assert stride == 1, "rows are sliced as a range"
        stop = max(start, stop)
        offset = self.offset[start : stop + 1]
        entries = tuple(column[int(offset[0]) : int(offset[-1])] for column in self.entries)
        return Rows(self.sequence_id[at], self.input_ids[at], self.length[at], self.log_prob[at], self.kept[at], entries, offset - offset[0])

    @staticmethod
    def concatenate(parts: Sequence[Rows]) -> Rows:
        """Rows one after another, copied into new arrays."""
        if len(parts) == 1:
            return parts[0]
        starts = np.cumsum([0] + [len(part.entries[0]) for part in parts])
        offset = np.concatenate([part.offset[:-1] + start for part, start in zip(parts, starts, strict=False)] + [starts[-1:]])
        entries = tuple(map(np.concatenate, zip(*(part.entries for part in parts), strict=True)))
        columns = ("sequence_id", "input_ids", "length", "log_prob", "kept")
        whole = {column: np.concatenate([getattr(part, column) for part in parts]) for column in columns}
        return Rows(**whole, entries=entries, offset=offset)


def schema(metadata: ShardMetadata) -> pa.Schema:
    """The Arrow schema of the metadata's format version; every field is non-nullable."""
    layout, length = Layout.of(metadata), metadata.block_length

    def each(name: str, kind: pa.DataType) -> pa.Field:
        return pa.field(name, pa.list_(pa.field("item", kind, nullable=False), length), nullable=False)

    def entries(name: str, kind: pa.DataType) -> pa.Field:
        return pa.field(name, pa.large_list(pa.field("item", kind, nullable=False)), nullable=False)

    columns = [
        pa.field("sequence_id", pa.uint64(), nullable=False),
        each("input_ids", layout.input_ids),
        pa.field("length", pa.int32(), nullable=False),
        each("log_prob", pa.float32()),
        each("kept", layout.kept),
        *(entries(name, kind) for name, kind in layout.entries.items()),
    ]
    return pa.schema(columns, metadata={"gumbel": canonical_json(asdict(metadata))})


class ShardWriter:
    """Streams rows into one Arrow file in record batches of exactly 64 rows; `close` writes the last, shorter one."""

    def __init__(self, file: BinaryIO, metadata: ShardMetadata):
        self.schema = schema(metadata)
        codec = pa.Codec("zstd", ZSTD_LEVEL) if metadata.compression == "zstd" else None
        self._writer = pa.ipc.new_file(pa.PythonFile(file, mode="w"), self.schema, options=pa.ipc.IpcWriteOptions(compression=codec))
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
            value = _packed(rows) if field.name == "entry" else getattr(rows, field.name)
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


def _packed(rows: Rows) -> Array:
    """index << 8 | code, uint32 [K]; Arrow refuses what does not fit."""
    if len(rows.entries) == 1:
        return rows.entries[0]
    index: Array = pa.array(rows.index, pa.uint32()).to_numpy()
    code: Array = pa.array(rows.code, pa.uint8()).to_numpy()
    return index << 8 | code


class ShardReader:
    """A memory-mapped shard. Raises DatasetError that names the file and what is wrong with it."""

    def __init__(self, path: Path | str, source: Any = None):
        """`source`: a pyarrow file that is open already, where `path` is only its name."""
        self.path = path
        try:
            source = pa.memory_map(str(path)) if source is None else source
            source.seek(0)
            self._content = source.read_buffer()
            self._blocks = blocks(self._content)
            self._file = pa.ipc.open_file(pa.BufferReader(self._content))
            encoded = (self._file.schema.metadata or {}).get(b"gumbel")
            if encoded is None:
                raise DatasetError(f"{path} is an Arrow file without the metadata key 'gumbel': not a noise shard")
            self.metadata = ShardMetadata.from_json(parse_json(encoded, f"{path}: the metadata key 'gumbel'"), str(path))
            expected = schema(self.metadata)
            if not self._file.schema.equals(expected):
                version = self.metadata.format_version
                raise DatasetError(f"{path} has columns {_columns(self._file.schema)}; format version {version} has {_columns(expected)}")
            self.batches = self._file.num_record_batches
        except FileNotFoundError:
            raise DatasetError(f"{path} does not exist") from None
        except (pa.ArrowException, OSError, UnicodeDecodeError, LayoutError) as error:
            raise DatasetError(f"{path} is truncated or damaged ({error}); fetch it again or remake it from its plan") from None

    def batch(self, number: int) -> Rows:
        """Record batch `number` as arrays, zero-copy unless compressed; structure, counts and ids were checked, so they are safe to index with."""
        try:
            size = unpacked_bytes(self._content, self._blocks[number])
            if size > LARGEST_BATCH:
                raise DatasetError(f"{self.path}: record batch {number} says that it unpacks to {size:,} bytes; a reader allows {LARGEST_BATCH:,}")
            record_batch = self._file.get_batch(number)
            record_batch.validate(full=True)
        except (pa.ArrowException, OSError, UnicodeDecodeError, LayoutError) as error:
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
        offsets = [record_batch.column(name).offsets for name in Layout.of(self.metadata).entries]
        if not offsets[0].equals(offsets[-1]):
            return "its lists of entries and codes differ in length"
        if not np.array_equal(np.diff(rows.offset), rows.kept.sum(axis=1, dtype=np.int64)):
            return "counts in 'kept' do not add up to its lists"
        if len(rows) and not 1 <= rows.length.min() <= rows.length.max() <= length:
            return f"a length is outside 1..{length}"
        if len(rows) and not 0 <= rows.input_ids.min() <= rows.input_ids.max() < vocab_size:
            return f"a token id is not below vocab_size {vocab_size}"
        if rows.index.max(initial=0) >= vocab_size:
            return f"a kept entry is not below vocab_size {vocab_size}"
        return ""

    def _rows(self, record_batch: pa.RecordBatch) -> Rows:
        """A validated record batch without nulls, as arrays."""
        count, length = len(record_batch), self.metadata.block_length
        column = dict(zip(record_batch.schema.names, record_batch.columns, strict=True))
        lists = [column[name] for name in Layout.of(self.metadata).entries]
        offset = lists[0].offsets.to_numpy()
        return Rows(
            column["sequence_id"].to_numpy(),
            column["input_ids"].flatten().to_numpy().reshape(count, length),
            column["length"].to_numpy(),
            column["log_prob"].flatten().to_numpy().reshape(count, length),
            column["kept"].flatten().to_numpy().reshape(count, length),
            tuple(entries.flatten().to_numpy() for entries in lists),
            offset - offset[0],
        )

    def __iter__(self) -> Iterator[Rows]:
        return (self.batch(number) for number in range(self.batches))


def _columns(of: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}{'' if not field.nullable else ' nullable'}" for field in of)
