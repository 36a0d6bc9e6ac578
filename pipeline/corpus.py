"""Files -> documents, each with its place, split into train and held-out by content.

A document's place is (file number, ordinal in the file, byte offset in the uncompressed file). Reading from a place gives
the same documents as reading from the beginning and leaving out what comes before it. Whether a document is held out
depends on its content alone, as the files have it, so equal documents are always on the same side.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from noise.storage import DatasetError
from pipeline import config, embedded, formats
from pipeline import files as places
from pipeline.clean_up import RULES

EMBEDDED = "python-standard-library"
CHARACTERS_OF_AN_ID = 4
AHEAD = 8
"""Files read at the same time while planning; more than cores, since much of it is waiting for disks and stores."""


@dataclass(frozen=True)
class CorpusFile:
    """One input as the identity knows it."""

    path: str
    """Relative to the corpus root."""
    bytes: int
    sha256: str
    """Of its content; "" before it was read."""


@dataclass(frozen=True)
class Document:
    """Text, or token ids, with its place."""

    file: int
    ordinal: int
    offset: int
    text: str
    """After clean-up; "" where there are ids."""
    ids: list[int] | None
    characters: int
    """As the files have it, before clean-up; an id counts as 4."""
    digest: bytes
    """sha256 of the content, before clean-up."""


class Corpus:
    """The documents of one split, from any place on. Keeps the last file open, so reading on from where it stopped costs nothing."""

    def __init__(self, recipe: config.Corpus, root: str, files: Sequence[CorpusFile]):
        self.recipe, self.roots, self._files = recipe, [root], list(files)
        self.locations = [places.join(root, file.path) for file in files]
        self._cursor: tuple[Document, Iterator[Document]] | None = None  # the document in hand, and what follows it

    @classmethod
    def open(cls, recipe: config.Corpus) -> Corpus:
        """List the files. Raises DatasetError when nothing matches."""
        if recipe.files is None and recipe.dataset is None:
            if recipe.ids_field is not None:
                raise DatasetError("corpus.ids_field is set, but the embedded corpus is text; name files, or drop it")
            return cls(recipe, "", [_embedded_file(embedded.documents())])
        found = places.find(recipe)
        root = places.common_root([file.location for file in found])
        return cls(recipe, root, [CorpusFile(places.relative(file.location, root), file.bytes, "") for file in found])

    def of_split(self, split: str) -> Corpus:
        """The same files, other documents of them."""
        other = Corpus.chain([self])
        other.recipe = replace(self.recipe, split=split)
        return other

    @classmethod
    def chain(cls, parts: Sequence[Corpus]) -> Corpus:
        """One corpus of the files of several, each under its own root."""
        whole = cls(parts[0].recipe, "", [])
        whole.roots = [root for part in parts for root in part.roots]
        whole._files = [file for part in parts for file in part._files]
        whole.locations = [location for part in parts for location in part.locations]
        return whole

    @property
    def files(self) -> list[CorpusFile]:
        """Path, size and content hash of each file; reads those that were not read yet."""
        unread = [number for number, file in enumerate(self._files) if not file.sha256]
        with ThreadPoolExecutor(AHEAD) as pool:
            for number, seen in zip(unread, pool.map(lambda number: formats.hash_file(self.locations[number]), unread), strict=True):
                self._learn(number, *seen)
        return self._files

    def listed(self) -> list[CorpusFile]:
        """Path and size of each file, with its content hash where it was read."""
        return self._files

    def _learn(self, number: int, size: int, sha256: str) -> None:
        self._files[number] = CorpusFile(self._files[number].path, size, sha256)

    def identity(self) -> dict[str, Any]:
        """What decides the documents. Reads the files that were not read yet."""
        return {"files": [asdict(file) for file in self.files], **corpus_settings(self.recipe)}

    def documents(self, start: tuple[int, int, int] = (0, 0, 0), stop: tuple[int, int] | None = None) -> Iterator[Document]:
        """Documents of the split in order, from the place `start` up to (not including) document `stop` = (file, ordinal)."""
        for number in range(start[0], len(self.locations)):
            if stop is not None and (number, 0) >= stop:
                return
            ordinal, offset = start[1:] if number == start[0] else (0, 0)
            for document in self._from(number, ordinal, offset):
                if stop is not None and (document.file, document.ordinal) >= stop:
                    return
                yield document

    def _from(self, number: int, ordinal: int, offset: int) -> Iterator[Document]:
        """Chosen documents of a file from a place on, by the reader that is open where it stands there, or is before it in a packed file."""
        seen, following = self._cursor or (None, iter(()))
        self._cursor = None
        packed = formats.kind_of(self.locations[number])[1] != ""
        if seen is None or seen.file != number or seen.ordinal > ordinal or (seen.ordinal < ordinal and not packed):
            self._check_size(number)
            seen, following = None, self._read(number, ordinal, offset)
        for document in itertools.chain([seen] if seen is not None else [], following):
            if document.ordinal >= ordinal:
                try:
                    yield document
                except GeneratorExit:  # the reader stops here; the next range may begin with this document
                    self._cursor = document, following
                    raise

    def _read(self, number: int, ordinal: int, offset: int) -> Iterator[Document]:
        if self.locations[number] == EMBEDDED:
            texts = self._embedded_documents()
            placed: Iterator[formats.Placed] = ((place, 0, texts[place]) for place in range(ordinal, len(texts)))
        else:
            placed = formats.read(self.locations[number], self._field, self.recipe.ids_field is not None, ordinal, offset)
        return self._chosen(number, placed)

    @property
    def _field(self) -> str:
        return self.recipe.ids_field or self.recipe.text_field

    def _chosen(self, number: int, placed: Iterator[formats.Placed]) -> Iterator[Document]:
        """The split's documents of one file; those without content are left out."""
        clean = RULES[self.recipe.clean_up]
        for ordinal, offset, value in placed:
            if not value:
                continue
            digest = hashlib.sha256(value.encode() if isinstance(value, str) else np.asarray(value, "<i4").tobytes()).digest()
            if self.recipe.split != "all" and is_held_out(digest, self.recipe.held_out) != (self.recipe.split == "held_out"):
                continue
            if isinstance(value, str):
                yield Document(number, ordinal, offset, clean(value), None, len(value), digest)
            else:
                yield Document(number, ordinal, offset, "", value, CHARACTERS_OF_AN_ID * len(value), digest)

    def scan(self, number: int) -> Iterator[Document]:
        """Chosen documents of a whole file, which is hashed on the way if it was not read yet."""
        if self._files[number].sha256:
            yield from self._read(number, 0, 0)
            return

        def learning() -> Iterator[formats.Placed]:
            seen = yield from formats.scan(self.locations[number], self._field, self.recipe.ids_field is not None)
            self._learn(number, *seen)

        yield from self._chosen(number, learning())

    def _check_size(self, number: int) -> None:
        if self.locations[number] == EMBEDDED:
            return
        with formats.named(self.locations[number]):
            found = places.size(self.locations[number])
        if found != self._files[number].bytes:
            raise DatasetError(
                f"corpus file {self.locations[number]} has {found} bytes, the plan saw {self._files[number].bytes}: it was changed; "
                "restore it, or plan into a new output folder"
            )

    def changed(self, first: int, last: int) -> list[str]:
        """Locations of the files from `first` to `last` whose content is not what is known of them. Reads them whole."""
        numbers = [number for number in range(first, min(last + 1, len(self._files))) if self.locations[number] != EMBEDDED]
        found = {number: formats.hash_file(self.locations[number])[1] for number in numbers}
        return [self.locations[number] for number in numbers if self._files[number].sha256 not in ("", found[number])]

    def _embedded_documents(self) -> tuple[str, ...]:
        texts = embedded.documents()
        if self._files[0] != _embedded_file(texts):
            raise DatasetError("the embedded corpus differs from the plan's, since it comes with Python: run with the Python that planned")
        return texts

    def nothing_found(self) -> DatasetError:
        """The error for a split without documents."""
        where = f"the {len(self.locations)} files of the corpus" if self.locations != [EMBEDDED] else "the embedded corpus"
        if self.recipe.split == "all":
            return DatasetError(f"the corpus is empty: {where} hold no text")
        return DatasetError(
            f"the {self.recipe.split} split of the corpus is empty: {where} hold too few documents for corpus.held_out {self.recipe.held_out}; "
            "give more text, change corpus.held_out, or take --corpus.split all"
        )


def corpus_settings(recipe: config.Corpus) -> dict[str, Any]:
    """What decides the documents beside the files."""
    field = {"text_field": recipe.text_field} if recipe.ids_field is None else {"ids_field": recipe.ids_field}
    rule = f"{recipe.clean_up}; text files cut at a blank line after {formats.PIECE_CHARACTERS} characters; empty documents left out"
    return {**field, "clean_up": rule, "held_out": recipe.held_out, "split": recipe.split}


def _embedded_file(texts: Sequence[str]) -> CorpusFile:
    """The embedded corpus as if it were one file."""
    content = "\0".join(texts).encode()
    return CorpusFile(EMBEDDED, len(content), hashlib.sha256(content).hexdigest())


def is_held_out(digest: bytes, share: float) -> bool:
    return int.from_bytes(digest[:8]) < share * 2**64
