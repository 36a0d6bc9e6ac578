"""One file -> its documents, from any place on.

    .jsonl .ndjson .json   one document a line, in one field of its object
    .parquet .pq           one document a row, in one column
    .arrow .feather .ipc   the same, as an Arrow IPC file or stream
    anything else          text: one document, cut at a blank line after every 65,536 characters
    .gz .zst               of the line and text formats, read as they are

A document's place is (ordinal in the file, byte offset in the uncompressed file). Reading from a place gives the same
documents as reading from the beginning and leaving out what comes before it. `scan` also hashes the file, in the same pass;
Parquet and Arrow files, which are read out of order, are hashed first and read again from the system's cache, after a copy
where they are elsewhere.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from noise.storage import DatasetError
from pipeline.files import local_copy, open_file

PIECE_CHARACTERS = 65536
COLUMNAR = {".parquet": "parquet", ".pq": "parquet", ".arrow": "arrow", ".feather": "arrow", ".ipc": "arrow"}
LINES = (".jsonl", ".ndjson", ".json")

Value = str | list[int]
Placed = tuple[int, int, Value]
"""(ordinal, byte offset, text or token ids)"""


def kind_of(location: str) -> tuple[str, str]:
    """(text, lines, parquet or arrow; "", .gz or .zst). Raises DatasetError for a columnar file that is packed."""
    name = location.partition("?")[0].lower() if "://" in location else location.lower()
    packing = name[name.rfind(".") :] if name.endswith((".gz", ".zst")) else ""
    name = name.removesuffix(packing)
    suffix = name[name.rfind(".") :] if "." in name else ""
    if suffix in COLUMNAR:
        if packing:
            raise DatasetError(f"{location}: Parquet and Arrow have their own compression; unpack the file first")
        return COLUMNAR[suffix], ""
    return ("lines" if suffix in LINES else "text"), packing


@contextmanager
def named(location: str) -> Iterator[None]:
    """Errors of reading a file, as DatasetErrors that name it."""
    import pyarrow as pa

    try:
        yield
    except UnicodeDecodeError as error:
        raise DatasetError(f"corpus file {location} is not UTF-8 text ({error.reason} at byte {error.start}); convert it or leave it out") from None
    except FileNotFoundError:
        raise DatasetError(f"corpus file {location} is not there any more; restore it") from None
    except pa.ArrowInvalid as error:
        kind = {"parquet": "Parquet", "arrow": "Arrow"}.get(kind_of(location)[0])
        said = f"is not readable as {kind}" if kind else "cannot be read"
        raise DatasetError(f"corpus file {location} {said}: {error}") from None
    except DatasetError:
        raise
    except Exception as error:  # clients of stores raise errors of their HTTP libraries
        if not (isinstance(error, OSError | EOFError | zlib.error | pa.ArrowException) or "://" in location):
            raise
        raise DatasetError(f"corpus file {location} cannot be read: {error}") from None


def read(location: str, field: str, ids: bool, first: int = 0, offset: int = 0) -> Iterator[Placed]:
    """Documents from `first` on, which begins at `offset`; `field` holds token ids if `ids`, else text.

    Raises DatasetError naming file and document.
    """
    kind, packing = kind_of(location)
    with named(location), open_file(location) as file:
        if kind in ("parquet", "arrow"):
            yield from _columnar(kind)(file, location, field, ids, first)
            return
        if packing:
            unpacked = _unpack(file, packing)
            _leave_out(unpacked, offset)
        else:
            unpacked = file
            file.seek(offset)
        yield from _sequential(kind, unpacked, location, field, ids, first, offset)


def scan(location: str, field: str, ids: bool) -> Generator[Placed, None, tuple[int, str]]:
    """All documents; returns (bytes, sha256) of the file."""
    kind, packing = kind_of(location)
    with named(location):
        if kind in ("parquet", "arrow"):
            with local_copy(location) as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
                length = file.tell()
                file.seek(0)
                yield from _columnar(kind)(file, location, field, ids, 0)
            return length, digest
        with open_file(location) as file:
            hashed = Hashed(file)
            buffered = io.BufferedReader(hashed, 2**20 if packing else 2**16)
            unpacked = _unpack(buffered, packing) if packing else buffered
            yield from _sequential(kind, unpacked, location, field, ids, 0, 0)
            return hashed.finish()


def hash_file(location: str) -> tuple[int, str]:
    """(bytes, sha256) of a file, without its documents."""
    with named(location), open_file(location) as file:
        return Hashed(file).finish()


class Hashed(io.RawIOBase):
    """A file that is hashed as it is read, once, from its beginning to its end."""

    def __init__(self, file: BinaryIO):
        self._file, self._bytes, self._sha256 = file, 0, hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self._file.readinto(buffer)  # type: ignore[attr-defined]
        self._sha256.update(memoryview(buffer)[:count])
        self._bytes += count
        return count

    def finish(self) -> tuple[int, str]:
        """(bytes, sha256) of the whole file; reads what is left of it."""
        buffer = bytearray(2**20)
        while self.readinto(buffer):
            pass
        return self._bytes, self._sha256.hexdigest()


def _unpack(file: BinaryIO, packing: str) -> BinaryIO:
    if packing == ".gz":
        return gzip.GzipFile(fileobj=file, mode="rb")  # type: ignore[return-value]
    import pyarrow as pa

    # reads frame after frame and refuses a file that ends within one; zstandard's own reader does neither by itself
    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd"), 2**16)


def _leave_out(file: BinaryIO, count: int) -> None:
    while count:
        part = len(file.read(min(count, 2**20)))
        if not part:
            return
        count -= part


def _sequential(kind: str, file: BinaryIO, location: str, field: str, ids: bool, ordinal: int, offset: int) -> Iterator[Placed]:
    if kind == "lines":
        return _read_lines(file, location, field, ids, ordinal, offset)
    if ids:
        raise DatasetError(f"{location} is text, which has no field {field!r} of token ids; drop corpus.ids_field, or take .jsonl or .parquet")
    return _read_text(file, ordinal, offset)


def _read_text(file: BinaryIO, ordinal: int, offset: int) -> Iterator[Placed]:
    """Pieces that end at a blank line, or at a line's end where twice the length passed without one."""
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    while piece := text.read(PIECE_CHARACTERS):
        if len(piece) == PIECE_CHARACTERS:
            extra: list[str] = []
            length = 0
            while line := text.readline(PIECE_CHARACTERS):
                extra.append(line)
                length += len(line)
                if not line.strip() or length >= PIECE_CHARACTERS:
                    break
            piece += "".join(extra)
        yield ordinal, offset, piece
        ordinal, offset = ordinal + 1, offset + len(piece.encode())


def _read_lines(file: BinaryIO, location: str, field: str, ids: bool, ordinal: int, offset: int) -> Iterator[Placed]:
    for line in file:
        if line.strip():
            place = f"{location}, document {ordinal}"
            yield ordinal, offset, _value(_object(line, place, field, ids), place, field, ids)
            ordinal += 1
        offset += len(line)


def _object(line: bytes, place: str, field: str, ids: bool) -> Any:
    try:
        value = json.loads(line)
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{place}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise DatasetError(f"{place}: holds {type(value).__name__}, expected an object with the field {field!r}")
    if field not in value:
        raise DatasetError(f"{place} has no field {field!r}; it has {_names(value)}: set corpus.{'ids' if ids else 'text'}_field")
    return value[field]


def _value(value: Any, place: str, field: str, ids: bool) -> Value:
    if value is None:
        return [] if ids else ""
    if ids:
        if not isinstance(value, list) or not all(type(token) is int and 0 <= token < 2**31 for token in value):
            raise DatasetError(f"{place}: field {field!r} is no list of token ids (whole numbers from 0 to 2^31 - 1)")
        return value
    if not isinstance(value, str):
        raise DatasetError(f"{place}: field {field!r} is {type(value).__name__}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DatasetError(f"{place}: field {field!r} holds a lone surrogate, which is no text") from None
    return value


def _columnar(kind: str) -> Any:
    return _read_parquet if kind == "parquet" else _read_arrow


def _read_parquet(file: BinaryIO, location: str, field: str, ids: bool, first: int) -> Iterator[Placed]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as parquet:
        _check_column(parquet.schema_arrow, location, field, ids)
        ordinal = 0
        for group in range(parquet.num_row_groups):
            rows = parquet.metadata.row_group(group).num_rows
            if ordinal + rows > first:
                for batch in parquet.iter_batches(1024, row_groups=[group], columns=[field]):
                    yield from _values(batch.column(0), location, field, ids, first, ordinal)
                    ordinal += len(batch)
            else:
                ordinal += rows


def _read_arrow(file: BinaryIO, location: str, field: str, ids: bool, first: int) -> Iterator[Placed]:
    import pyarrow as pa

    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    if is_file:
        with pa.ipc.open_file(file) as reader:
            _check_column(reader.schema, location, field, ids)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
            yield from _batches(batches, location, field, ids, first)
    else:
        with pa.ipc.open_stream(file) as reader:
            _check_column(reader.schema, location, field, ids)
            yield from _batches(reader, location, field, ids, first)


def _batches(batches: Any, location: str, field: str, ids: bool, first: int) -> Iterator[Placed]:
    ordinal = 0
    for batch in batches:
        if ordinal + len(batch) > first:
            yield from _values(batch.column(field), location, field, ids, first, ordinal)
        ordinal += len(batch)


def _check_column(schema: Any, location: str, field: str, ids: bool) -> None:
    if field not in schema.names:
        raise DatasetError(f"{location} has no column {field!r}; it has {_names(schema.names)}: set corpus.{'ids' if ids else 'text'}_field")


def _values(column: Any, location: str, field: str, ids: bool, first: int, ordinal: int) -> Iterator[Placed]:
    skipped = max(0, first - ordinal)
    for at, value in enumerate(column.slice(skipped).to_pylist(), ordinal + skipped):
        yield at, 0, _value(value, f"{location}, row {at}", field, ids)


def _names(columns: Any) -> str:
    return ", ".join(repr(name) for name in columns) or "none"
