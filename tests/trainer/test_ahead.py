"""An iterator that runs ahead gives its items in order, no more of them than asked for, and its errors where they belong."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.ahead import Ahead


def counted(made: list[int], reached: threading.Event, last: int) -> Iterator[int]:
    for number in range(1000):
        made.append(number)
        if number == last:
            reached.set()
        yield number


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_items_come_in_order_and_at_most_depth_are_there_at_a_time(depth: int) -> None:
    made: list[int] = []
    reached = threading.Event()
    ahead = Ahead(counted(made, reached, depth - 1), depth, "test")
    assert reached.wait(60)
    for number in range(50):
        assert ahead.take() == number
        assert len(made) <= number + depth
    ahead.stop()
    assert len(made) <= 49 + depth and not ahead._thread.is_alive()


def failing() -> Iterator[int]:
    yield 1
    raise OSError("the disk is gone")


def test_an_error_is_raised_after_what_came_before_it_and_again_to_whoever_asks_again() -> None:
    ahead = Ahead(failing(), 4, "test")
    assert ahead.take() == 1
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            ahead.take()
    ahead.stop()


def test_a_program_that_stops_nothing_ends_all_the_same() -> None:
    script = "from itertools import count; from trainer.ahead import Ahead; held = Ahead(count(), 2, 'x'); assert held.take() == 0"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
