"""How much memory a record batch will take, read from the file's own metadata before Arrow unpacks anything.

Arrow maps uncompressed buffers and allocates compressed ones in the size that each says of itself, so a few bytes of a
hostile file could ask for any amount. This reads the two Flatbuffers that say it (the file's footer, the batch's message;
https://arrow.apache.org/docs/format/Columnar.html) and nothing else. Whatever does not parse here is not given to Arrow.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MAGIC = b"ARROW1"
RECORD_BATCH = 3
"""MessageHeader.RecordBatch."""
BLOCK, BUFFER = 24, 16
"""Bytes of the structs Block (offset int64, metadata length int32 and four of padding, body length int64) and Buffer (offset, length)."""


class LayoutError(ValueError):
    """The file is not laid out as an Arrow IPC file is."""


@dataclass(frozen=True)
class Table:
    """A Flatbuffers table: fields by number, 0 where one is absent."""

    content: Any
    """memoryview"""
    at: int

    @classmethod
    def root(cls, content: Any, at: int) -> Table:
        return cls(content, at + _read("<I", content, at))

    def place(self, field: int) -> int:
        """Where a field's value begins; 0 where it is absent."""
        vtable = self.at - _read("<i", self.content, self.at)
        size = _read("<H", self.content, vtable)
        slot = 4 + 2 * field
        offset = _read("<H", self.content, vtable + slot) if slot < size else 0
        return self.at + offset if offset else 0

    def number(self, field: int, kind: str) -> int:
        place = self.place(field)
        return _read(kind, self.content, place) if place else 0

    def table(self, field: int) -> Table | None:
        place = self.place(field)
        return Table.root(self.content, place) if place else None

    def vector(self, field: int) -> tuple[int, int]:
        """(place of the first element, how many)."""
        place = self.place(field)
        if not place:
            return 0, 0
        start = place + _read("<I", self.content, place)
        return start + 4, _read("<I", self.content, start)


def blocks(content: Any) -> list[tuple[int, int]]:
    """(offset, length of its metadata) of every record batch of an IPC file, bytes or a memoryview. Raises LayoutError."""
    content = memoryview(content)
    if len(content) < 18 or content[:6] != MAGIC or content[-6:] != MAGIC:
        raise LayoutError("no Arrow IPC file")
    length = _read("<i", content, len(content) - 10)
    if not 0 < length <= len(content) - 18:
        raise LayoutError(f"a footer of {length} bytes")
    footer = Table.root(content, len(content) - 10 - length)
    if footer.vector(2)[1]:
        raise LayoutError("dictionaries, which no shard has")
    first, count = footer.vector(3)
    if count > len(content) // BLOCK:
        raise LayoutError(f"{count} record batches")
    return [(_read("<q", content, at), _read("<i", content, at + 8)) for at in range(first, first + count * BLOCK, BLOCK)]


def unpacked_bytes(content: Any, block: tuple[int, int]) -> int:
    """Bytes that Arrow allocates for one record batch: 0 where nothing is compressed. Raises LayoutError."""
    content = memoryview(content)
    offset, length = block
    if _read("<I", content, offset) != 0xFFFFFFFF:
        raise LayoutError(f"no message at byte {offset}")
    message = Table.root(content, offset + 8)
    batch = message.table(2)
    if message.number(1, "<B") != RECORD_BATCH or batch is None:
        raise LayoutError(f"no record batch at byte {offset}")
    return sum(_sizes(content, batch, offset + length)) if batch.place(3) else 0


def _sizes(content: Any, batch: Table, body: int) -> Iterator[int]:
    """What each compressed buffer says it unpacks to; -1 there marks one that is not compressed."""
    first, count = batch.vector(2)
    if count > len(content) // BUFFER:
        raise LayoutError(f"{count} buffers")
    for at in range(first, first + count * BUFFER, BUFFER):
        start, length = _read("<q", content, at), _read("<q", content, at + 8)
        if length:
            size = _read("<q", content, body + start)
            if size < -1:
                raise LayoutError(f"a buffer of {size} bytes")
            yield max(size, 0)


def _read(kind: str, content: Any, at: int) -> int:
    if at < 0:
        raise LayoutError(f"an offset of {at}")
    try:
        value: int = struct.unpack_from(kind, content, at)[0]
    except struct.error:
        raise LayoutError(f"an offset of {at}, behind its end") from None
    return value
