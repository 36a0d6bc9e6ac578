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
from dataclasses import dataclass
from typing import Any

from noise.folder import Folder, Where
from noise.secrets import redacted
from noise.storage import DatasetError, parse_json

NAME = "run.jsonl"
SECONDS_BETWEEN_PUTS = 60.0
"""On a store."""
_ENDS_IN_A_HASH = re.compile(rb'[0-9a-f]{40}"\}.?$', re.DOTALL)
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
    """The events since the last `begin`; a line that is being written, or is none of ours, is left out. Raises DatasetError as `Folder.read` does."""
    events: list[dict[str, Any]] = []
    if not folder.exists(NAME):
        return events
    for line in folder.read(NAME).splitlines():
        try:
            event = parse_json(line, NAME)
        except DatasetError:
            continue
        if not _is_event(event):
            continue
        if event["event"] == "begin":
            events = []
        events.append(event)
    return events


def _is_event(event: dict[str, Any]) -> bool:
    """Whether it has what its readers read."""
    if not isinstance(event.get("event"), str) or type(event.get("time")) not in (int, float) or abs(event["time"]) > 2**53:
        return False
    if event["event"] == "shard":
        return isinstance(event.get("receipt"), dict) and type(event["receipt"].get("tokens")) is int
    return isinstance(event.get("reason", ""), str)


@dataclass(frozen=True)
class State:
    """What the hashes of a log say of it."""

    hashed: bool
    """Whether lines have hashes at all."""
    damaged: int = 0
    """Number, from 1, of the first line that is not as it was written; 0: none."""
    cut_off: bool = False
    """Whether the last line ends in its middle, as its writer was stopped."""


def examine(content: bytes) -> State:
    lines = content.split(b"\n")
    if not any(_has_hash(line) for line in lines):
        return State(False)
    last = lines.pop()
    damaged = next((number for number, line in enumerate(lines, start=1) if not _is_whole(line)), 0)
    if not damaged and _ENDS_IN_A_HASH.search(last) and not _is_whole(last):  # what follows its end was a newline
        damaged = len(lines) + 1
    return State(True, damaged, bool(last))


def _hashed(line: bytes) -> bytes:
    return line[:-1] + b',"line_hash":"' + hashlib.sha256(line).hexdigest().encode() + b'"}'


def _has_hash(line: bytes) -> bool:
    """Whether the line was written with a hash, though a byte of it may have changed."""
    return b'"line_hash":"' in line or _ENDS_IN_A_HASH.search(line) is not None


def _is_whole(line: bytes) -> bool:
    match = _HASHED.fullmatch(line)
    return match is not None and hashlib.sha256(match[1] + b"}").hexdigest().encode() == match[2]


def _mended(content: bytes) -> bytes:
    """Without empty lines and one that was cut off; with hashes, where a line is of a time before them."""
    *lines, last = (line.strip() for line in content.split(b"\n"))
    lines += [last] if _is_whole(last) else []
    return b"".join((line if _has_hash(line) or line[:1] + line[-1:] != b"{}" else _hashed(line)) + b"\n" for line in lines if line)
