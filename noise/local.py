"""A dataset's folder on this machine: files, links that stay inside, flock."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from noise import storage
from noise.folder import PIECE, Folder
from noise.storage import DatasetError


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
        path = self._path / name
        if path.is_symlink():
            raise DatasetError(f"{path} is a link, and nothing is written through it; put the file itself there, or delete it")
        with path.open("ab") as file:
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
