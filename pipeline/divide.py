"""A corpus -> shards: one pass that reads, hashes and counts every file, several at a time.

A shard's documents are known by their places, their number and a digest of their content, so that a file that changed
afterwards is noticed when the shard is made, without hashing it again.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

from pipeline.corpus import AHEAD, Corpus, Document

T = TypeVar("T")
CHUNK = 512
QUEUED = 8


@dataclass(frozen=True)
class ShardInput:
    """The documents of one shard: from `start` up to, not including, `stop`."""

    start: tuple[int, int, int]
    """(file, ordinal in it, byte offset in it)"""
    stop: tuple[int, int]
    documents: int
    characters: int
    sha256: str
    """Of the digests of the documents, one after another."""

    @classmethod
    def from_json(cls, value: Any) -> ShardInput:
        file, ordinal, offset = value["start"]
        return cls((file, ordinal, offset), (value["stop"][0], value["stop"][1]), value["documents"], value["characters"], value["sha256"])


class Place(NamedTuple):
    """A document without its content."""

    file: int
    ordinal: int
    offset: int
    characters: int
    digest: bytes


def divide(corpus: Corpus, least: int, first: int = 0, measure: Callable[[Place], int] = lambda place: place.characters) -> list[ShardInput]:
    """Shards that measure at least `least` each (the last may be smaller), cut between documents, of the files from `first` on.

    Hashes the files on the way. Raises DatasetError for what cannot be read.
    """
    shards: list[ShardInput] = []
    begun: list[Place] = []
    total = 0
    for place in _places(corpus, first):
        if total >= least:  # a shard ends where the next one's first document begins
            shards.append(_shard(begun, (place.file, place.ordinal)))
            begun, total = [], 0
        begun.append(place)
        total += measure(place)
    if begun:
        shards.append(_shard(begun, (len(corpus.locations), 0)))
    return shards


def _shard(places: list[Place], stop: tuple[int, int]) -> ShardInput:
    return ShardInput(places[0][:3], stop, len(places), sum(place.characters for place in places), digest(place.digest for place in places))


def digest(digests: Iterable[bytes]) -> str:
    """sha256 of documents' digests, one after another."""
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _places(corpus: Corpus, first: int) -> Iterator[Place]:
    for chunk in in_order([partial(_chunks, corpus.scan, number) for number in range(first, len(corpus.locations))], AHEAD):
        yield from chunk


def _chunks(scan: Callable[[int], Iterator[Document]], number: int) -> Iterator[list[Place]]:
    chunk: list[Place] = []
    for document in scan(number):
        chunk.append(Place(number, document.ordinal, document.offset, document.characters, document.digest))
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    yield chunk


def in_order(makers: Iterable[Callable[[], Iterator[T]]], threads: int) -> Iterator[T]:
    """The items of all iterators, one iterator after another, while the next ones run ahead in threads, each a few items at most."""
    stopped = threading.Event()
    end = object()

    def put(out: queue.Queue[Any], item: Any) -> bool:
        while not stopped.is_set():
            try:
                out.put(item, timeout=0.5)
                return True
            except queue.Full:
                continue
        return False

    def run(make: Callable[[], Iterator[T]], out: queue.Queue[Any]) -> None:
        try:
            if all(put(out, item) for item in make()):
                put(out, end)
        except BaseException as error:
            put(out, error)

    with ThreadPoolExecutor(threads) as pool:
        rest, running = iter(makers), deque[queue.Queue[Any]]()
        try:
            while True:
                while len(running) < 2 * threads and (make := next(rest, None)) is not None:
                    running.append(queue.Queue(QUEUED))
                    pool.submit(run, make, running[-1])
                if not running:
                    return
                out = running.popleft()
                while (item := out.get()) is not end:
                    if isinstance(item, BaseException):
                        raise item
                    yield item
        finally:
            stopped.set()
