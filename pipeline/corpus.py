"""Files -> documents, each with its place, split into train and held-out by content.

    .txt and anything else   one document, cut at a blank line after every 65,536 characters
    .jsonl .ndjson           one document a line, the text in one field
    .parquet                 one document a row, the text in one column
    .gz .zst                 of the text and JSONL formats, read as they are

A document's place is (file number, ordinal in the file, byte offset in the uncompressed file). Reading from a place
gives the same documents as reading from the beginning and leaving out what comes before it. Text is taken as it is.
Whether a document is held out depends on its content alone, so equal documents are always on the same side.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from noise.storage import DatasetError, sha256_file
from pipeline import config, embedded

PIECE_CHARACTERS = 65536
EMBEDDED = "python-standard-library"
CLEANUP = f"none; text files cut at a blank line after {PIECE_CHARACTERS} characters; empty documents left out"


@dataclass(frozen=True)
class CorpusFile:
    """One input as the identity knows it."""

    path: str
    """Relative to the corpus root."""
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Document:
    """Text with its place."""

    file: int
    ordinal: int
    offset: int
    text: str


class Corpus:
    """The documents of one split, from any place on."""

    def __init__(self, recipe: config.Corpus, root: str, files: Sequence[CorpusFile]):
        self.recipe, self.root, self.files = recipe, root, list(files)

    @classmethod
    def open(cls, recipe: config.Corpus) -> Corpus:
        """Find and hash the files. Raises DatasetError when nothing matches or a file is not readable."""
        if recipe.files is None:
            return cls(recipe, "", [_embedded_file(embedded.documents())])
        paths = find_files(recipe.files)
        root = os.path.commonpath([path.parent for path in paths])
        try:
            files = [CorpusFile(path.relative_to(root).as_posix(), path.stat().st_size, sha256_file(path)) for path in paths]
        except OSError as error:
            raise DatasetError(f"corpus file {error.filename} cannot be read: {error.strerror}") from None
        return cls(recipe, root, files)

    def documents(self, start: tuple[int, int, int] = (0, 0, 0), stop: tuple[int, int] | None = None) -> Iterator[Document]:
        """Documents of the split in order, from the place `start` up to (not including) document `stop` = (file, ordinal)."""
        for number in range(start[0], len(self.files)):
            if stop is not None and number > stop[0]:
                return
            ordinal, offset = start[1:] if number == start[0] else (0, 0)
            for document in self._read(number, ordinal, offset):
                if stop is not None and (document.file, document.ordinal) >= stop:
                    return
                if document.text and self._chosen(document.text):
                    yield document

    def _chosen(self, text: str) -> bool:
        return self.recipe.split == "all" or is_held_out(text, self.recipe.held_out) == (self.recipe.split == "held_out")

    def _read(self, number: int, ordinal: int, offset: int) -> Iterator[Document]:
        if self.recipe.files is None:
            texts = self._embedded_documents()
            yield from (Document(number, place, 0, texts[place]) for place in range(ordinal, len(texts)))
            return
        path = Path(self.root) / self.files[number].path
        try:
            if path.stat().st_size != self.files[number].bytes:
                raise DatasetError(f"corpus file {path} has {path.stat().st_size} bytes, the plan saw {self.files[number].bytes}: it was changed")
            for place, at, text in read_file(path, self.recipe.text_field, ordinal, offset):
                yield Document(number, place, at, text)
        except UnicodeDecodeError as error:
            raise DatasetError(f"corpus file {path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it or leave it out") from None
        except (OSError, EOFError, zlib.error) as error:
            raise DatasetError(f"corpus file {path} cannot be read: {error}") from None

    def _embedded_documents(self) -> tuple[str, ...]:
        texts = embedded.documents()
        if self.files and self.files[0] != _embedded_file(texts):
            raise DatasetError("the embedded corpus differs from the plan's, since it comes with Python: run with the Python that planned")
        return texts

    def nothing_found(self) -> DatasetError:
        """The error for a split without documents."""
        where = f"the {len(self.files)} files of corpus.files" if self.recipe.files is not None else "the embedded corpus"
        if self.recipe.split == "all":
            return DatasetError(f"the corpus is empty: {where} hold no text")
        return DatasetError(
            f"the {self.recipe.split} split of the corpus is empty: {where} hold too few documents for corpus.held_out {self.recipe.held_out}; "
            "give more text, change corpus.held_out, or take --corpus.split all"
        )


def _embedded_file(texts: Sequence[str]) -> CorpusFile:
    """The embedded corpus as if it were one file."""
    content = "\0".join(texts).encode()
    return CorpusFile(EMBEDDED, len(content), hashlib.sha256(content).hexdigest())


def is_held_out(text: str, share: float) -> bool:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) < share * 2**64


def find_files(patterns: str | list[str]) -> list[Path]:
    """Absolute paths of all matches, sorted, each once. Raises DatasetError naming a pattern that matches no file."""
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matches = [path for path in map(Path, glob.glob(str(Path(pattern).expanduser()), recursive=True)) if path.is_file()]  # noqa: PTH207
        if not matches:
            raise DatasetError(f"corpus.files: {pattern!r} matches no file (working folder {Path.cwd()})")
        found.update(str(path.absolute()) for path in matches)
    if not found:
        raise DatasetError("corpus.files is an empty list; name files, or take null for the embedded corpus")
    return [Path(path) for path in sorted(found)]


def read_file(path: Path, text_field: str, first: int = 0, offset: int = 0) -> Iterator[tuple[int, int, str]]:
    """(ordinal, byte offset, text) of the documents from `first` on, which begins at `offset`."""
    name, packed = path.name.lower(), path.suffix.lower() in (".gz", ".zst")
    kind = Path(name).with_suffix("").suffix if packed else path.suffix.lower()
    if kind in (".parquet", ".pq"):
        if packed:
            raise DatasetError(f"{path}: Parquet has its own compression; unpack the file first")
        yield from _read_parquet(path, text_field, first)
        return
    with _open(path) as file:
        if not packed:
            file.seek(offset)
            documents = _read_lines(file, path, text_field, first, offset) if kind in (".jsonl", ".ndjson") else _read_text(file, first, offset)
            yield from documents
        else:
            documents = _read_lines(file, path, text_field, 0, 0) if kind in (".jsonl", ".ndjson") else _read_text(file, 0, 0)
            yield from (document for document in documents if document[0] >= first)


def _open(path: Path) -> BinaryIO:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix.lower() == ".zst":
        import pyarrow as pa

        # reads frame after frame and refuses a file that ends within one; zstandard's own reader does neither by itself
        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _read_text(file: BinaryIO, ordinal: int, offset: int) -> Iterator[tuple[int, int, str]]:
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


def _read_lines(file: BinaryIO, path: Path, text_field: str, ordinal: int, offset: int) -> Iterator[tuple[int, int, str]]:
    for line in file:
        if line.strip():
            yield ordinal, offset, _field(line, f"{path}, document {ordinal}", text_field)
            ordinal += 1
        offset += len(line)


def _field(line: bytes, place: str, text_field: str) -> str:
    try:
        value = json.loads(line)
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{place}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise DatasetError(f"{place}: holds {type(value).__name__}, expected an object with the field {text_field!r}")
    if text_field not in value:
        raise DatasetError(f"{place} has no field {text_field!r}; it has {_names(value)}: set corpus.text_field")
    return _text(value[text_field], place, text_field)


def _text(value: Any, place: str, text_field: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DatasetError(f"{place}: field {text_field!r} is {type(value).__name__}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DatasetError(f"{place}: field {text_field!r} holds a lone surrogate, which is no text") from None
    return value


def _read_parquet(path: Path, text_field: str, first: int) -> Iterator[tuple[int, int, str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if text_field not in file.schema_arrow.names:
                raise DatasetError(f"{path} has no column {text_field!r}; it has {_names(file.schema_arrow.names)}: set corpus.text_field")
            ordinal = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if ordinal + rows <= first:
                    ordinal += rows
                    continue
                for batch in file.iter_batches(1024, row_groups=[group], columns=[text_field]):
                    for value in batch.column(0).to_pylist():
                        if ordinal >= first:
                            yield ordinal, 0, _text(value, f"{path}, row {ordinal}", text_field)
                        ordinal += 1
    except pa.ArrowException as error:
        raise DatasetError(f"corpus file {path} is not readable as Parquet: {error}") from None


def _names(columns: Any) -> str:
    return ", ".join(repr(name) for name in columns) or "none"
