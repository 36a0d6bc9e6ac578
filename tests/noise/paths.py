"""The stream and the sketch have two ways through a CPU, numba's and torch's, and what a test says must hold on both."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

from noise import candidates, compiled, philox

PATHS = ("torch", "numba") if compiled.native() else ("torch",)


@contextlib.contextmanager
def through(path: str) -> Iterator[None]:
    """Run what is inside on one of PATHS."""
    native = compiled.native() if path == "numba" else None
    with mock.patch.object(candidates, "native", lambda: native), mock.patch.object(philox, "native", lambda: native):
        yield
