"""A dataset's folder, on this machine or on a store: the few things that a dataset asks of either.

                    a path, file://                        s3://, gs://
    put, publish    temporary name, fsync, rename, fsync   one PUT, or a multipart upload completed at its end
    put_new         hard link: exactly one writer wins     looked for, put: of two at once both may pass (see `dataset.commit_shard`)
    lock            flock on plan.json                     none
    map             the file itself                        a temporary copy that is gone when it is let go

Names are relative, with / between folders: "shards/00000.arrow". Nothing is ever visible half-written. An upload that dies
leaves parts that nobody sees but the bill: give the bucket a rule that aborts incomplete multipart uploads.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias
from urllib.parse import unquote, urlsplit

import pyarrow as pa

from noise import storage, stores
from noise.secrets import refuse_secrets
from noise.storage import DatasetError

READERS = 32
"""Small files of a store that are fetched at the same time."""
PIECE = 8 * 2**20
"""Bytes of a download that are in memory at a time."""


class Folder(ABC):
    """`str(folder)` is its address."""

    publishes_again: bool
    """Whether a draft that was published can be again."""

    @staticmethod
    def of(where: Where) -> Folder:
        """The folder at a path or URI. Raises DatasetError for a scheme that nothing here writes to."""
        if isinstance(where, Folder):
            return where
        from noise.local import LocalFolder

        scheme = stores.URI.fullmatch(str(where))
        if scheme is None:
            return LocalFolder(Path(where))
        refuse_secrets("the address of a dataset", where)
        if scheme[1] == "file":
            return LocalFolder(Path(unquote(urlsplit(str(where)).path)))
        if scheme[1] == "hf":
            from noise.hub import HubFolder

            return HubFolder(str(where))
        if scheme[1] not in stores.OPTIONS:
            raise DatasetError(f"{where}: a dataset is on this machine, or at s3://, gs:// or hf://; nothing here reads or writes {scheme[1]}://")
        from noise.bucket import StoreFolder

        return StoreFolder(str(where))

    def begin(self, private: bool, dry_run: bool) -> None:  # noqa: B027
        """Before a dataset is brought here: make the place, where a place must be made."""

    @abstractmethod
    def absolute(self) -> str:
        """An address that means the same in another working folder."""

    @abstractmethod
    def path(self, name: str) -> str:
        """The address of a file, for people."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError."""

    @abstractmethod
    def read_all(self, names: Iterable[str]) -> list[bytes]:
        """As `read`, many at a time where that is faster."""

    @abstractmethod
    def append(self, name: str, content: bytes) -> bool:
        """Add to the end of a file; False, and nothing is done, where there is no such thing."""

    @abstractmethod
    def remove_leftovers(self, before: float) -> None:
        """Remove what dead writers left behind, last written before that time."""

    @abstractmethod
    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of each file directly in a folder, by name; from listing alone."""

    @abstractmethod
    def exists(self, name: str) -> bool: ...

    @abstractmethod
    def put(self, name: str, content: bytes) -> None: ...

    @abstractmethod
    def put_new(self, name: str, content: bytes) -> bool:
        """Put it if there is none; whether it was put."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Also where there is none."""

    @abstractmethod
    def draft(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """A file on this machine to write and read, which becomes `name` by `publish`; gone at the end."""

    @abstractmethod
    def publish(self, draft: BinaryIO, name: str) -> None: ...

    @abstractmethod
    def holds(self, draft: BinaryIO, name: str, sha256: str) -> bool:
        """Whether `name` has this hash, after a draft was published there."""

    @abstractmethod
    def lock(self) -> contextlib.AbstractContextManager[object]:
        """Keeps other writers out, on this machine and others, where the file system can."""

    @abstractmethod
    def map(self, name: str) -> Any:
        """A pyarrow file to read at random, mapped into memory. Raises FileNotFoundError."""

    @abstractmethod
    def download(self, name: str, file: BinaryIO) -> None:
        """Make an open file on this machine a copy of `name`. Raises FileNotFoundError."""

    @abstractmethod
    def fetched(self, name: str) -> Path:
        """A subfolder of small files as a folder on this machine."""

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object. Raises DatasetError that names the file when it is missing, damaged, or no object."""
        try:
            content = self.read(name)
        except (FileNotFoundError, NotADirectoryError):
            raise DatasetError(f"{self.path(name)} does not exist") from None
        return storage.parse_json(content, self.path(name))

    def put_json(self, name: str, value: Any) -> None:
        self.put(name, storage.readable_json(value).encode())


Where: TypeAlias = Folder | Path | str


class RemoteFolder(Folder):
    """What is alike wherever there are no files to map and no locks: shards are read from copies, small files many at a time."""

    publishes_again = True

    def __init__(self) -> None:
        self._copies: dict[str, tempfile.TemporaryDirectory[str]] = {}

    def absolute(self) -> str:
        return str(self)

    def read_all(self, names: Iterable[str]) -> list[bytes]:
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(self.read, names))

    def append(self, name: str, content: bytes) -> bool:
        return False

    def remove_leftovers(self, before: float) -> None:
        """Drafts have no names here, and what died on its way is not to be seen."""

    def lock(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def map(self, name: str) -> Any:
        with tempfile.TemporaryFile() as copy:
            self.download(name, copy)
            return pa.BufferReader(mapped(copy))

    def fetched(self, name: str) -> Path:
        if name not in self._copies:
            copy = tempfile.TemporaryDirectory()
            names = list(self.sizes(name))
            for file, content in zip(names, self.read_all(f"{name}/{file}" for file in names), strict=True):
                if Path(file).name != file:
                    raise DatasetError(f"{self.path(name)} holds {file!r}, which is no name of a file")
                (Path(copy.name) / file).write_bytes(content)
            self._copies[name] = copy
        return Path(self._copies[name].name)


def mapped(file: BinaryIO) -> pa.Buffer:
    """A file's bytes, mapped: they stay when the file is closed and its name is gone."""
    if not file.seek(0, io.SEEK_END):
        return pa.py_buffer(b"")
    return pa.py_buffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
