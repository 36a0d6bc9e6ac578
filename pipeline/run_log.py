"""run.jsonl of a dataset: timings, hosts, retries, one JSON object a line; outside identity, manifest and seal, since it grows.

The last field of a line is `line_hash`, sha256 of the line without it, so a changed byte is found at any time. Logs of before
have no such field; they get it when a driver goes on with them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import time
from typing import Any

from noise.folder import Folder, Where
from noise.secrets import redacted
from noise.storage import DatasetError

NAME = "run.jsonl"
SECONDS_BETWEEN_PUTS = 60.0
"""On a store."""
_HASHED = re.compile(rb'(\{.+),"line_hash":"([0-9a-f]{64})"\}', re.DOTALL)


class RunLog:
    """Appended to where files can be; on a store put again as a whole, once a minute and at the end."""

    def __init__(self, where: Where):
        self._folder = Folder.of(where)
        self._whole: bytearray | None = None
        self._put = time.monotonic()
        with contextlib.suppress(OSError, DatasetError):  # the log stops no run
            if NAME in self._folder.sizes("") and (standing := self._folder.read(NAME)) != (mended := _mended(standing)):
                self._folder.put(NAME, mended)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._whole is not None:
            with contextlib.suppress(OSError):
                self._folder.put(NAME, bytes(self._whole))

    def write(self, event: str, **fields: Any) -> None:
        about = {"event": event, "time": round(time.time(), 3), "host": socket.gethostname(), **fields}
        line = _hashed(redacted(json.dumps(about, sort_keys=True)).encode()) + b"\n"
        if self._folder.append(NAME, line):
            return
        if self._whole is None:
            self._whole = bytearray(self._folder.read(NAME) if self._folder.exists(NAME) else b"")
        self._whole += line
        if time.monotonic() - self._put >= SECONDS_BETWEEN_PUTS:
            self._put = time.monotonic()
            with contextlib.suppress(OSError):
                self._folder.put(NAME, bytes(self._whole))


def last_run(folder: Folder) -> list[dict[str, Any]]:
    """The events since the last `begin`; a line that is being written is left out."""
    events: list[dict[str, Any]] = []
    if not folder.exists(NAME):
        return events
    for line in folder.read(NAME).splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if event.get("event") == "begin":
            events = []
        events.append(event)
    return events


def damaged_line(content: bytes) -> int | None:
    """The number, from 1, of the first line that is not as it was written; 0 where no line has a hash, None where all are whole."""
    lines = content.split(b"\n")
    if not any(_HASHED.fullmatch(line) for line in lines):
        return 0
    if lines.pop():
        return len(lines) + 1
    return next((number for number, line in enumerate(lines, start=1) if not _is_whole(line)), None)


def _hashed(line: bytes) -> bytes:
    return line[:-1] + b',"line_hash":"' + hashlib.sha256(line).hexdigest().encode() + b'"}'


def _is_whole(line: bytes) -> bool:
    match = _HASHED.fullmatch(line)
    return match is not None and hashlib.sha256(match[1] + b"}").hexdigest().encode() == match[2]


def _mended(content: bytes) -> bytes:
    """Without a line that was cut off while it was written; with hashes, where it is of a time before them."""
    lines = content.split(b"\n")[:-1]
    if not any(_HASHED.fullmatch(line) for line in lines):
        lines = [_hashed(line) if line.startswith(b"{") and line.endswith(b"}") else line for line in lines]
    return b"".join(line + b"\n" for line in lines)
