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
import errno
import fcntl
import hashlib
import io
import mmap
import os
import shutil
import stat
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias
from urllib.parse import unquote, urlsplit

import pyarrow as pa
from pyarrow import fs

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
        scheme = stores.URI.fullmatch(str(where))
        if scheme is None:
            return LocalFolder(Path(where))
        refuse_secrets("the address of a dataset", where)
        if scheme[1] == "file":
            return LocalFolder(Path(unquote(urlsplit(str(where)).path)))
        if scheme[1] == "hf":
            from noise.hub import HubFolder

            return HubFolder(str(where))
        if scheme[1] not in stores.SCHEMES:
            raise DatasetError(f"{where}: a dataset is on this machine, or at s3://, gs:// or hf://; nothing here reads or writes {scheme[1]}://")
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


class LocalFolder(Folder):
    publishes_again = False

    def __init__(self, path: Path):
        self._path = path
        self._checked: set[str] = set()

    def __str__(self) -> str:
        return str(self._path)

    def absolute(self) -> str:
        return str(self._path.resolve())

    def path(self, name: str) -> str:
        return str(self._path / name)

    def read(self, name: str) -> bytes:
        return storage.read_small(self._within(name))

    def _within(self, name: str) -> Path:
        """Where a file of this folder is, to be read. Raises DatasetError where a link leads out of the folder, or it is no file.

        Links to where the hub's client keeps the files of a snapshot are its own.
        """
        path, (above, _, _) = self._path / name, name.rpartition("/")
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode) and above in self._checked:
            return path
        here, real = self._path.resolve(), path.resolve()
        kept = here.parent.parent / "blobs" if here.parent.name == "snapshots" else here
        if not (real.is_relative_to(here) or real.is_relative_to(kept)):
            raise DatasetError(f"{path} is a link that leads out of the dataset, to {real}; put the file itself there if you trust it")
        if not real.is_file():
            raise DatasetError(f"{path} is not a file")
        if stat.S_ISREG(mode):
            self._checked.add(above)
        return path

    def read_all(self, names: Iterable[str]) -> list[bytes]:
        return [self.read(name) for name in names]

    def append(self, name: str, content: bytes) -> bool:
        self._path.mkdir(parents=True, exist_ok=True)
        with (self._path / name).open("ab") as file:
            file.write(content)
        return True

    def remove_leftovers(self, before: float) -> None:
        for folder in (self._path, self._path / "shards", self._path / "tokenizer"):
            storage.remove_leftovers(folder, before)

    def sizes(self, folder: str) -> dict[str, int]:
        try:
            with os.scandir(self._path / folder) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        except FileNotFoundError:
            return {}

    def exists(self, name: str) -> bool:
        return (self._path / name).exists()

    def put(self, name: str, content: bytes) -> None:
        with storage.atomic_file(self._path / name) as file:
            file.write(content)

    def put_new(self, name: str, content: bytes) -> bool:
        with storage.temporary_file(self._path / name) as file:
            file.write(content)
            return storage.place_new(file, self._path / name)

    def remove(self, name: str) -> None:
        (self._path / name).unlink(missing_ok=True)

    def draft(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        return storage.temporary_file(self._path / name)

    def publish(self, draft: BinaryIO, name: str) -> None:
        storage.place(draft, self._path / name)

    def holds(self, draft: BinaryIO, name: str, sha256: str) -> bool:
        path = self._path / name
        return os.path.samestat(path.stat(), os.fstat(draft.fileno())) or storage.sha256_file(path) == sha256

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        with contextlib.ExitStack() as held:
            with contextlib.suppress(OSError):  # no plan here, or a file system without locks
                file = held.enter_context((self._path / "plan.json").open("r+b"))  # NFS locks only what is open for writing
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def map(self, name: str) -> Any:
        return pa.memory_map(str(self._within(name)))

    def download(self, name: str, file: BinaryIO) -> None:
        file.seek(0)
        with self._within(name).open("rb") as source:
            shutil.copyfileobj(source, file, PIECE)
        file.truncate()
        file.flush()

    def fetched(self, name: str) -> Path:
        for file in self.sizes(name):
            self._within(f"{name}/{file}")
        return self._path / name


class StoreFolder(Folder):
    """Errors that pass by themselves are waited out; others are `stores.StoreError`, which names the file and the way out."""

    publishes_again = True

    def __init__(self, address: str):
        before, path, self._options = stores.split(address)
        self._before = before
        self._place = path.strip("/")
        self._client, authority = stores.client(before + self._options)
        self._prefix = f"{authority}{self._place}/" if self._place else authority
        self._copies: dict[str, tempfile.TemporaryDirectory[str]] = {}
        self._has_bucket = False

    def __reduce__(self) -> tuple[Any, ...]:
        return StoreFolder, (str(self),)

    def __str__(self) -> str:
        return self._before + self._place + self._options

    def absolute(self) -> str:
        return str(self)

    def path(self, name: str) -> str:
        return f"{self._before}{self._place}/{name}" if self._place else self._before + name

    def read(self, name: str) -> bytes:
        def fetch() -> bytes:
            parts, size = [], 0
            with self._client.open_input_stream(self._prefix + name) as stream:
                while part := stream.read(PIECE):
                    parts.append(part)
                    if (size := size + len(part)) > storage.LARGEST_FILE:
                        raise DatasetError(f"{self.path(name)} is too large: no file of a dataset but its shards has {storage.LARGEST_FILE:,} bytes")
            return b"".join(parts)

        return stores.patiently(fetch, self.path(name))

    def read_all(self, names: Iterable[str]) -> list[bytes]:
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(self.read, names))

    def append(self, name: str, content: bytes) -> bool:
        return False

    def remove_leftovers(self, before: float) -> None:
        """Drafts have no names here, and parts of an upload that died are not to be seen."""

    def sizes(self, folder: str) -> dict[str, int]:
        selector = fs.FileSelector((self._prefix + folder).rstrip("/"), allow_not_found=True)
        found = stores.patiently(lambda: self._client.get_file_info(selector), self.path(folder))
        return {info.base_name: info.size for info in found if info.is_file}

    def exists(self, name: str) -> bool:
        """Raises StoreError where there is not even a bucket."""
        if stores.patiently(lambda: self._client.get_file_info(self._prefix + name), self.path(name)).is_file:
            return True
        if not self._has_bucket:
            bucket = self._prefix.split("/")[0]
            found = stores.patiently(lambda: self._client.get_file_info(bucket), self._before)
            if found.type == fs.FileType.NotFound:
                raise stores.StoreError(errno.ENOENT, stores.in_words(OSError("bucket does not exist"), self._before), str(self))
            self._has_bucket = True
        return False

    def put(self, name: str, content: bytes) -> None:
        self._put(name, pa.py_buffer(content))

    def _put(self, name: str, content: pa.Buffer) -> None:
        """In one write: pyarrow completes an upload when its stream is let go, even by an error, so a part must never be all it was given."""

        def upload() -> None:
            with self._client.open_output_stream(self._prefix + name) as stream:
                stream.write(content)

        stores.patiently(upload, self.path(name))

    def put_new(self, name: str, content: bytes) -> bool:
        if self.exists(name):
            return False
        self.put(name, content)
        return True

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            stores.patiently(lambda: self._client.delete_file(self._prefix + name), self.path(name))

    def draft(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        return tempfile.TemporaryFile()

    def publish(self, draft: BinaryIO, name: str) -> None:
        draft.flush()
        self._put(name, mapped(draft))

    def holds(self, draft: BinaryIO, name: str, sha256: str) -> bool:
        def read_back() -> str:
            digest = hashlib.sha256()
            with self._client.open_input_stream(self._prefix + name) as stream:
                while piece := stream.read(PIECE):
                    digest.update(piece)
            return digest.hexdigest()

        return stores.patiently(read_back, self.path(name)) == sha256

    def lock(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def map(self, name: str) -> Any:
        with tempfile.TemporaryFile() as copy:
            self.download(name, copy)
            return pa.BufferReader(mapped(copy))

    def download(self, name: str, file: BinaryIO) -> None:
        def copy() -> None:
            file.seek(0)
            with self._client.open_input_stream(self._prefix + name) as stream:
                while piece := stream.read(PIECE):
                    file.write(piece)
            file.truncate()
            file.flush()

        stores.patiently(copy, self.path(name))

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
