"""An iterator that runs in a thread of its own, a few items ahead of whoever takes them.

Handing over costs little: two queues of the interpreter's own, one of items, one of wishes for them. The thread ends with
`stop`, with the program (within POLL seconds), or with the iterator; what the iterator raises is raised where it was waited for.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")
POLL = 0.5


@dataclass(frozen=True)
class _Raised:
    error: BaseException


class Ahead(Generic[T]):
    """At most `depth` items are there at a time: made or being made, and the one that was taken last, until the next is asked for."""

    def __init__(self, items: Iterator[T], depth: int, name: str):
        self._items, self._stopped, self._held = items, False, False
        self._made: SimpleQueue[T | _Raised] = SimpleQueue()
        self._wanted: SimpleQueue[None] = SimpleQueue()
        for _ in range(depth):
            self._wanted.put(None)
        self._thread = threading.Thread(target=self._run, name=name)
        self._thread.start()

    def take(self) -> T:
        """The next item. Raises what the iterator raised in its place, StopIteration at its end."""
        if self._held:
            self._wanted.put(None)
        item = self._made.get()
        if isinstance(item, _Raised):
            self._made.put(item)  # for whoever asks again
            raise item.error
        self._held = True
        return item

    def stop(self) -> None:
        """Have the thread end; waits for the item that is being made."""
        self._stopped = True
        self._wanted.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._is_wanted():
                self._made.put(next(self._items))
        except BaseException as error:
            self._made.put(_Raised(error))

    def _is_wanted(self) -> bool:
        """Wait for a wish; False when there will be none."""
        while not self._stopped:
            try:
                self._wanted.get(timeout=POLL)
                return not self._stopped
            except Empty:
                self._stopped = not threading.main_thread().is_alive()  # nobody stopped this, and the interpreter waits for it
        return False
