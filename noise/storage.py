"""Bytes on disk: atomic writes, hashes, JSON in one canonical form.

Contract: a file under its final name is complete. Writers use a temporary name that ends in `.tmp`, fsync, rename, and fsync
the folder; a process killed at any moment leaves at most a `.tmp` behind, which no reader takes for a file. A writer holds a
lock (flock) on its `.tmp`, so `remove_leftovers` can tell those of the dead.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import math
import os
import stat
import uuid
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO

LARGEST_FILE = 2**28
"""Bytes of any file of a dataset that is read as a whole: its JSON, its card. 100,000 shards need 40 MB of manifest."""
MOST_VALUES = 2**23
"""In one file of JSON, each of at most some hundred bytes of memory."""
DEEPEST = 64
"""Objects and lists within each other; a dataset made from another one is two deeper than that."""


class DatasetError(ValueError):
    """A dataset or one of its files is missing, damaged, or not the one that was asked for. The message is for people."""


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no spaces, ASCII only: the form whose bytes are hashed. NaN and infinity are refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def sha256_file(file: Path | BinaryIO) -> str:
    """Of all its bytes, wherever an open file stands."""
    if isinstance(file, Path):
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears under `path` whole, fsynced, or not at all."""
    with temporary_file(path) as file:
        yield file
        place(file, path)


@contextlib.contextmanager
def temporary_file(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path` to write and read, held by a lock, gone at the end unless it was placed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with temporary.open("w+b") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_SH)
            yield file
    finally:
        temporary.unlink(missing_ok=True)


def place(file: BinaryIO, path: Path) -> None:
    """Give a temporary file its name; what was there is gone."""
    _sync(file)
    Path(file.name).replace(path)
    sync_folder(path.parent)


def place_new(file: BinaryIO, path: Path) -> bool:
    """Give a temporary file its name if nobody has it: of several writers at once, True for exactly one."""
    _sync(file)
    try:
        os.link(file.name, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        if path.exists():  # without hard links, two writers within microseconds can both pass
            return False
        Path(file.name).replace(path)
    sync_folder(path.parent)
    return True


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make names in a folder last, where the file system has that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path, before: float) -> list[Path]:
    """Remove temporary files of dead writers, last written before that time; returns those removed."""
    removed = []
    for path in folder.glob("*.tmp"):
        with contextlib.suppress(OSError), path.open("r+b") as file:  # gone meanwhile, locked by a living writer, or no locks here
            if os.fstat(file.fileno()).st_mtime < before:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                removed.append(path)
    return removed


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other writer uses and no reader takes for a finished file."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def write_text(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Readable JSON, atomically."""
    write_text(path, readable_json(value))


def readable_json(value: Any) -> str:
    """JSON with sorted keys, indented, with a last newline. NaN and infinity are refused."""
    return json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises DatasetError that names the file when it is missing, damaged, or no object."""
    try:
        content = read_small(path)
    except (FileNotFoundError, NotADirectoryError):
        raise DatasetError(f"{path} does not exist") from None
    return parse_json(content, str(path))


def read_small(path: Path) -> bytes:
    """All bytes of a regular file. Raises DatasetError for one too large to be held, or for what is no file (a pipe would never end)."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise DatasetError(f"{path} is not a file")
    if status.st_size > LARGEST_FILE:
        raise DatasetError(f"{path} has {status.st_size:,} bytes; no file of a dataset but its shards is larger than {LARGEST_FILE:,}")
    return path.read_bytes()


def parse_json(content: bytes, name: str) -> dict[str, Any]:
    """The JSON object that a file holds. Raises DatasetError that names it when it is damaged, too large, or no object."""
    if len(content) > LARGEST_FILE or sum(map(content.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise DatasetError(f"{name} has {len(content):,} bytes or more than {MOST_VALUES:,} values: too much to be a file of a dataset")
    try:
        value = json.loads(content, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{name} is not valid JSON ({error}); the file is damaged") from None
    if not isinstance(value, dict):
        raise DatasetError(f"{name} holds {type(value).__name__}, not a JSON object")
    if _is_deep(value):
        raise DatasetError(f"{name} is nested more than {DEEPEST} deep, which no file of a dataset is")
    return value


def _is_deep(value: dict[str, Any]) -> bool:
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        if not level:
            return False
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer) if isinstance(inner, dict | list)]
    return bool(level)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{brief(text)} is no finite number")
    return value


def brief(value: Any) -> str:
    """A value as a message shows it, at most 80 characters."""
    text = repr(value[:100] if isinstance(value, str) else value)
    return text if len(text) <= 80 else text[:77] + "..."


def checked_fields(kind: Any, value: dict[str, Any], name: str, beside: tuple[str, ...] = ()) -> dict[str, Any]:
    """The values of a dataclass's int, float and str fields (all but `beside`) out of a JSON object; what else it holds is left out.

    Raises DatasetError that names `name` and the first field that is missing or of another type; an int has at most 63 bits.
    """
    checked: dict[str, Any] = {}
    for field, expected, allowed in _wanted(kind, beside):
        found = checked[field] = value.get(field)
        if type(found) not in allowed or (type(found) is int and not -(2**63) < found < 2**63):
            raise DatasetError(f"{name}: field {field} is {brief(found)}, expected {expected}")
    return checked


@functools.cache
def _wanted(kind: Any, beside: tuple[str, ...]) -> list[tuple[str, str, tuple[type, ...]]]:
    """(name, type as a word, what JSON may hold) of a dataclass's fields."""
    allowed: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,)}
    return [(field.name, str(field.type), allowed[str(field.type)]) for field in fields(kind) if field.name not in beside]


def weights_hash(folder: Path) -> str:
    """sha256 over the names and contents of a model's safetensors files. Raises DatasetError when there are none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise DatasetError(f"{folder} has no .safetensors weights; save the model with save_pretrained (other formats can run code and are refused)")
    if len(files) == 1:
        return sha256_file(files[0])
    return sha256_text("".join(f"{path.name} {sha256_file(path)}\n" for path in files))
