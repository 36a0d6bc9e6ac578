"""Answers that cost something, kept on disk the moment they arrive: one JSON object a line, {"key": ..., "value": ...}.

Contract: a line that is whole is never asked for again; what a kill cut off in the middle of a line is dropped and asked for again. The key is a
hash of everything that decides the answer, so one file serves any settings. Safe for threads of one process; a second process
that writes to the same file is refused.
"""

from __future__ import annotations

import fcntl
import json
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from noise.storage import DatasetError, canonical_json, sha256_text


def key_of(question: Any) -> str:
    """sha256 of a question's canonical JSON."""
    return sha256_text(canonical_json(question))


class Ledger:
    """Opened with `with`; raises DatasetError where another process holds the file or a line is not the ledger's."""

    def __init__(self, path: Path):
        self.path, self._lock, self._known = path, threading.Lock(), dict[str, Any]()

    def __enter__(self) -> Ledger:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise DatasetError(f"{self.path} is written by another process at this moment; let it finish, or choose another output") from None
        self._read()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> Any:
        return self._known[key]

    def add(self, key: str, value: Any) -> None:
        """Keep an answer: it is the operating system's when this returns."""
        line = (json.dumps({"key": key, "value": value}) + "\n").encode("ascii")
        with self._lock:
            self._known[key] = value
            self._file.write(line)
            self._file.flush()

    def _read(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        self._file.truncate(whole)
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            try:
                entry = json.loads(line)
                self._known[entry["key"]] = entry["value"]
            except (ValueError, KeyError, TypeError):
                raise DatasetError(f"{self.path}, line {number}, is no answer that was kept here; delete that line and run again") from None
