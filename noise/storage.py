"""Bytes on disk: atomic writes, hashes, JSON in one canonical form.

Contract: a file under its final name is complete. Writers use a temporary name that ends in `.tmp`, fsync, then rename;
a process killed at any moment leaves at most a `.tmp` behind, which no reader takes for a file and anyone may delete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO


class DatasetError(ValueError):
    """A dataset or one of its files is missing, damaged, or not the one that was asked for. The message is for people."""


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no spaces, ASCII only: the form whose bytes are hashed. NaN and infinity are refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears under `path` whole, fsynced, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other writer uses and no reader takes for a finished file."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def write_text(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Readable JSON (indented, sorted keys), atomically."""
    write_text(path, json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises DatasetError that names the file when it is missing, damaged, or no object."""
    try:
        value = json.loads(path.read_bytes(), parse_constant=_no_constant)
    except (FileNotFoundError, NotADirectoryError):
        raise DatasetError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path} is not valid JSON ({error}); the file is damaged") from None
    if not isinstance(value, dict):
        raise DatasetError(f"{path} holds {type(value).__name__}, not a JSON object")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def checked_fields(kind: Any, value: dict[str, Any], name: str, beside: tuple[str, ...] = ()) -> dict[str, Any]:
    """The values of a dataclass's int, float and str fields (all but `beside`) out of a JSON object; what else it holds is left out.

    Raises DatasetError that names `name` and the first field that is missing or of another type.
    """
    allowed: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,)}
    wanted = [field for field in fields(kind) if field.name not in beside]
    for field in wanted:
        found = value.get(field.name)
        if not isinstance(found, allowed[str(field.type)]) or isinstance(found, bool):
            raise DatasetError(f"{name}: field {field.name} is {found!r}, expected {field.type}")
    return {field.name: value[field.name] for field in wanted}
