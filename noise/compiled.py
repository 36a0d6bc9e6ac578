"""Machine code where it can be had: numba for tensors on a CPU, `torch.compile` elsewhere, the same function eager where that fails.

Contract: a compiled function returns the same bits either way for integers; float results agree within 2 ulp.
A missing C++ compiler or Python headers cost speed, never function: the first failure warns once and falls back.
`TORCHDYNAMO_DISABLE=1` keeps everything eager.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


@functools.cache
def native() -> ModuleType | None:
    """noise.native, or None where numba is not installed."""
    try:
        from noise import native
    except ImportError:
        return None
    return native


_broken: list[str] = []  # why compilation failed in this process; empty while it works


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Compile `function` for dynamic shapes at its first call; on a compiler's failure run it eagerly from then on.

    The undecorated source stays reachable as `.eager`.
    """
    cache: list[Callable[P, R]] = []

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if _broken:
            return function(*args, **kwargs)
        if not cache:
            cache.append(torch.compile(function, dynamic=True))
        try:
            return cache[0](*args, **kwargs)
        except Exception as error:
            if not _is_compiler_failure(error):
                raise
            result = function(*args, **kwargs)  # an error of the function itself comes out here, and compilation is not to blame
            _broken.append(type(error).__name__)
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            warnings.warn(f"torch.compile does not work here, running eagerly (slower, same results): {reason}", stacklevel=2)
            return result

    call.eager = function  # type: ignore[attr-defined]
    return call


def _is_compiler_failure(error: Exception) -> bool:
    """True for what Dynamo, Inductor, a C++ compiler or Triton raise, false for errors of the function itself."""
    seen: BaseException | None = error
    while seen is not None:
        module = type(seen).__module__
        if module.startswith(("torch._inductor", "torch._dynamo", "triton")):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
