"""One driver at a time makes a dataset: `driver.json` in its folder says who, and until when.

The driver renews it every BEAT seconds and removes it at the end. Another driver stops, unless the holder is dead: on the
same machine its process is looked for, on another one a lease that was not renewed for SECONDS is over. (Clocks that differ
by more, or a store where two begin within the same moment, let two drivers run until the next renewal; then one of them
stops. Both make the same bytes, and `noise.commit.commit_shard` says what holds where they do not.) Outside identity.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from noise.folder import Folder
from noise.seal import broken, sealed
from noise.storage import DatasetError, checked_fields, parse_json, readable_json
from pipeline.config import WorkError

NAME = "driver.json"
HASH = "driver_hash"
"""The field with the hash of the others."""
BEAT = 20.0
INTERRUPT = signal.SIGUSR1
"""What stops a driver that lost its lease. Not SIGINT, which a shell has its background commands ignore."""
SECONDS = 180.0

Clock = Callable[[], float]


@dataclass(frozen=True)
class Holder:
    """Who makes the dataset."""

    id: str
    host: str
    machine: str
    """Host, boot and process namespace: where a pid means something."""
    pid: int
    started: str
    """When the process was started, in the machine's own clock: pids come again."""
    time: float
    """Last renewal, seconds since 1970."""

    @classmethod
    def here(cls, now: float) -> Holder:
        return cls(uuid.uuid4().hex, socket.gethostname(), _machine(), os.getpid(), _started(os.getpid()), now)

    def is_alive(self, now: float) -> bool:
        """By its process where that can be seen, else by its last renewal."""
        if self.machine == _machine():
            return _started(self.pid) == self.started
        return now - self.time < SECONDS


@dataclass
class Lease:
    """The right to make a dataset. Raises WorkError naming the holder where another driver has it."""

    folder: Folder
    clock: Clock = time.time

    def __post_init__(self) -> None:
        self.lost = False
        self._holder = Holder.here(self.clock())
        with self.folder.lock():
            standing = self._read()
            if standing is not None and standing.is_alive(self.clock()):
                raise WorkError(self._taken(standing))
            if standing is None:
                self.folder.put_new(NAME, self._content())
            else:
                self.folder.put(NAME, self._content())
            self._must_be_ours()

    def beat(self) -> None:
        """Renew. Raises WorkError when another driver has taken the lease."""
        self._must_be_ours()
        self._holder = Holder(**asdict(self._holder) | {"time": self.clock()})
        self.folder.put(NAME, self._content())

    def release(self) -> None:
        standing = self._read()
        if standing is not None and standing.id == self._holder.id:
            self.folder.remove(NAME)

    def _must_be_ours(self) -> None:
        standing = self._read()
        if standing is not None and standing.id != self._holder.id:
            self.lost = True
            raise WorkError(self._taken(standing))

    def _content(self) -> bytes:
        return readable_json(sealed(asdict(self._holder), HASH)).encode()

    def _read(self) -> Holder | None:
        try:
            return read_holder(self.folder)[0]
        except FileNotFoundError:
            return None

    def _taken(self, holder: Holder) -> str:
        ago = max(0, round(self.clock() - holder.time))
        return (
            f"{self.folder} is being made by process {holder.pid} on {holder.host}, which said so {ago} s ago; stop it, or wait until it is done. "
            f"If it is dead, run again {max(1, round(SECONDS) - ago)} s from now, or delete {self.folder.path(NAME)} and run again at once"
        )


def read_holder(folder: Folder) -> tuple[Holder, bool]:
    """Who makes the dataset, and whether a hash covers the file (drivers of before wrote none). Raises FileNotFoundError, DatasetError."""
    path, content = folder.path(NAME), folder.read(NAME)
    value = parse_json(content, path)
    hashed = value.keys() != {field.name for field in fields(Holder)}
    if hashed and (wrong := broken(value, content, path, HASH)):
        raise DatasetError(f"{wrong}; or delete it, if no driver runs")
    return Holder(**checked_fields(Holder, value, path)), hashed


@contextlib.contextmanager
def driving(folder: Folder) -> Iterator[None]:
    """Hold the lease, renewed by a thread; for the main thread. Raises WorkError where another driver has it, or takes it meanwhile."""
    lease, done = Lease(folder), threading.Event()
    message = ""

    def renew() -> None:
        nonlocal message
        while not done.wait(BEAT):
            try:
                lease.beat()
            except WorkError as error:
                message = str(error)
                signal.pthread_kill(threading.main_thread().ident or 0, INTERRUPT)  # whatever the driver waits for
                return
            except (OSError, DatasetError):  # a store out of order, or driver.json read while it was replaced: the next beat tells
                continue

    before = signal.signal(INTERRUPT, signal.default_int_handler)
    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        try:
            yield
        finally:
            done.set()
            thread.join()
    except KeyboardInterrupt:
        if lease.lost:
            raise WorkError(message) from None
        raise
    finally:
        signal.signal(INTERRUPT, before or signal.SIG_DFL)
        with contextlib.suppress(OSError, DatasetError):
            lease.release()


def _machine() -> str:
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), str(Path("/proc/self/ns/pid").stat().st_ino)]
    return " ".join(parts)


def _started(pid: int) -> str:
    """Of a process: when it was started; where the system does not tell, whether it is there; "" if it is not."""
    with contextlib.suppress(OSError):
        about = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return about[19] if about[0] not in "ZX" else ""  # dead, and nobody has asked for its exit code yet
    if Path("/proc/self/stat").exists():
        return ""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return "?"
    except OSError:
        return ""
    return "?"
