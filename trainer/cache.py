"""Shards of datasets at a URI, kept on this machine: fetched when they are needed or ahead of it, checked on arrival, bounded in bytes.

    CACHE/<sha256>.arrow    a whole, checked shard, named by what is in it: processes, runs and datasets share it
          <sha256>.part     one that is being fetched, locked by whoever fetches it; it already has its full size
          lock              held while room is made

Contract: a file under its final name was complete and had its receipt's sha256; killed at any moment, a fetch leaves a
`.part` that the next one takes over. Several processes fetch a shard once: the others wait for its lock. Whoever maps a shard holds a
shared lock for as long as the map lives, and what is locked is never evicted; the rest goes in the order of its last use.
Locks are flock: the cache belongs on a disk of this machine, not on a network file system that lacks them.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from noise.folder import Folder
from noise.local import LocalFolder
from noise.receipt import Receipt
from noise.storage import DatasetError, sha256_file, sync_folder

CACHE_BYTES = 64 * 2**30
_ATTEMPTS = 3
"""Downloads of a shard that arrives damaged before it is refused."""
_FETCHERS = 4
"""Shards that are fetched ahead at the same time."""
_PATIENCE = 60.0
"""Seconds to wait for other processes to let go of shards where there is no room for one that is needed now."""


def default_folder() -> Path:
    """Where caches of this user's programs are."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gumbel-distillation"


class ShardCache(LocalFolder):
    """The shards of one dataset at a URI as a folder on this machine."""

    def __init__(self, remote: Folder, receipts: Sequence[Receipt], folder: str | Path, limit: int, check: bool):
        super().__init__(Path(folder) if folder else default_folder())
        self._remote, self.limit, self._check = remote, limit, check
        self._receipts = {f"shards/{receipt.file}": receipt for receipt in receipts}
        self._sound: set[str] = set()
        self._pool: ThreadPoolExecutor | None = None
        self._waiting: list[Future[None]] = []

    def path(self, name: str) -> str:
        return self._remote.path(name)

    def map(self, name: str) -> Any:
        """The shard, mapped; fetched first where it is not here. Raises FileNotFoundError, or DatasetError where it arrives damaged."""
        receipt = self._receipts[name]
        while True:
            file = self._held(receipt)
            if file is None:
                self._fetch(receipt, needed=True)
                continue
            with file:
                if self._check and receipt.sha256 not in self._sound:
                    if sha256_file(file) != receipt.sha256:  # damaged since it arrived: another copy is one fetch away
                        self._at(receipt).unlink(missing_ok=True)
                        continue
                    self._sound.add(receipt.sha256)
                os.utime(file.fileno())
                return pa.BufferReader(pa.py_buffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)))  # its own descriptor keeps the lock

    def prefetch(self, receipts: Sequence[Receipt]) -> None:
        """Fetch in the background what is not here, in that order; what was asked for before and not begun is dropped."""
        self.release()
        self._pool = self._pool or ThreadPoolExecutor(_FETCHERS, thread_name_prefix="shards ahead")
        self._waiting = [self._pool.submit(self._ahead, receipt) for receipt in receipts]

    def release(self) -> None:
        for waiting in self._waiting:
            waiting.cancel()

    def _ahead(self, receipt: Receipt) -> None:
        with contextlib.suppress(OSError, DatasetError):  # whoever needs the shard meets the error too, and says so
            if self._at(receipt).exists():
                os.utime(self._at(receipt))
            else:
                self._fetch(receipt, needed=False)

    def _at(self, receipt: Receipt) -> Path:
        return self._path / f"{receipt.sha256}.arrow"

    def _held(self, receipt: Receipt) -> BinaryIO | None:
        """The shard under a shared lock, or None where it is not here."""
        return _locked(self._at(receipt), fcntl.LOCK_SH)

    def _fetch(self, receipt: Receipt, needed: bool) -> None:
        """Download a shard, unless somebody else just did. One that is not needed yet is left where there is no room."""
        self._path.mkdir(parents=True, exist_ok=True)
        part = self._path / f"{receipt.sha256}.part"
        while not self._at(receipt).exists():
            file = _locked(part, fcntl.LOCK_EX, new=True)
            if file is None:
                continue
            with file:
                try:
                    if self._at(receipt).exists() or not self._reserve(file, receipt, needed):
                        part.unlink()
                        return
                    self._download(file, receipt)
                except BaseException:
                    part.unlink()
                    raise
                part.rename(self._at(receipt))
                sync_folder(self._path)

    def _download(self, file: BinaryIO, receipt: Receipt) -> None:
        name = f"shards/{receipt.file}"
        found = ""
        for _ in range(_ATTEMPTS):
            self._remote.download(name, file)
            found = sha256_file(file)
            if found == receipt.sha256:
                os.fsync(file.fileno())
                self._sound.add(found)
                return
        raise DatasetError(
            f"{self.path(name)} arrived {_ATTEMPTS} times with sha256 {found[:16]}..., its receipt says {receipt.sha256[:16]}...: "
            "damaged there or on the way; make the shard again, or restore it from a copy"
        )

    def _reserve(self, file: BinaryIO, receipt: Receipt, needed: bool) -> bool:
        """Give the file its size, after making room for it; whether that was possible."""
        file.truncate(0)  # what a dead process left is no use
        deadline = time.monotonic() + _PATIENCE
        while True:
            with (self._path / "lock").open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if self._make_room(receipt.bytes):
                    file.truncate(receipt.bytes)
                    return True
            if not needed:
                return False
            if time.monotonic() > deadline:
                raise DatasetError(
                    f"{self._path} has no room for {self.path(f'shards/{receipt.file}')} within data.cache_bytes {self.limit:,}: other processes "
                    "read what is in it; raise data.cache_bytes, or give them caches of their own"
                )
            time.sleep(0.05)

    def _make_room(self, size: int) -> bool:
        entries = list(_shards_in(self._path))
        used = sum(status.st_size for status, _ in entries)
        for status, path in sorted(entries, key=lambda entry: entry[0].st_mtime_ns):
            if used + size <= self.limit:
                break
            if status.st_size:
                file = _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if file is not None:
                    with file:
                        path.unlink(missing_ok=True)
                        used -= status.st_size
        return used + size <= self.limit


def _shards_in(folder: Path) -> Iterator[tuple[os.stat_result, Path]]:
    """Shards, and what is being fetched."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith((".arrow", ".part")):
                with contextlib.suppress(FileNotFoundError):
                    yield entry.stat(), Path(entry.path)


def _locked(path: Path, how: int, new: bool = False) -> BinaryIO | None:
    """A file to read and write that is locked and still has its name; None where it has lost it, or others hold it and nobody is to wait."""
    try:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT * new, 0o644), "r+b")
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, how)
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
    except (FileNotFoundError, BlockingIOError):
        pass
    file.close()
    return None
