"""What this machine can do at most, measured in the same run as the code that is held against it; and how peak memory is measured.

Shapes: V vocabulary.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from noise import philox
from noise.compiled import compiled

PRODUCTS_A_BLOCK = 20  # Philox4x32-10: ten rounds of two 32 x 32 -> 64 bit products make four words


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, the device's queue emptied before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def rounds(works: dict[str, Callable[[], object]], count: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every work in each of `count` rounds, one after another within a round, after a round that does not count.

    What disturbs a shared machine for longer than a call disturbs neighbours in a round alike: compare within rounds.
    """
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(count):
        for name, work in works.items():
            times[name].append(seconds(work, device))
    return times


def median(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).median())


def ratio(times: dict[str, list[float]], of: str, to: str) -> float:
    """Median over the rounds of one work's time over another's."""
    return median([a / b for a, b in zip(times[of], times[to], strict=True)])


def best(work: Callable[[], object], device: torch.device, times: int = 7) -> float:
    """Fewest seconds of several calls, for limits: nothing that disturbs makes them shorter."""
    work()
    return min(seconds(work, device) for _ in range(times))


def bandwidth(device: torch.device) -> float:
    """Bytes a second that a plain reduction reads from memory."""
    x = torch.ones(2**28 if device.type == "cuda" else 2**25, device=device)
    return x.numel() * x.element_size() / best(lambda: x.amax(), device)


def products(device: torch.device) -> float:
    """32 x 32 -> 64 bit products a second, two at a time, each with a xor: Philox without its keys and stores. One core of a CPU.

    On a GPU, and without numba, the stream itself is taken for its limit.
    """
    if device.type == "cpu":
        try:
            import numba  # noqa: F401
        except ImportError:
            return stream(device)
        return _cpu_products()
    return stream(device)


def _cpu_products() -> float:
    import numba
    import numpy as np

    first, second, half = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57), np.uint64(32)

    def fold(x_T: Any, y_T: Any, repeats: int) -> None:
        for _ in range(repeats):
            for i in range(len(x_T)):
                x, y = x_T[i], y_T[i]
                for _ in range(PRODUCTS_A_BLOCK // 2):
                    one, two = np.uint64(x) * first, np.uint64(y) * second
                    x, y = np.uint32(two >> half) ^ np.uint32(one), np.uint32(one >> half) ^ np.uint32(two)
                x_T[i], y_T[i] = x, y

    machine_code = numba.njit(fold)
    x_T, y_T, repeats = np.arange(1, 1025, dtype=np.uint32), np.arange(2, 1026, dtype=np.uint32), 200
    return len(x_T) * repeats * PRODUCTS_A_BLOCK / best(lambda: machine_code(x_T, y_T, repeats), torch.device("cpu"))


def stream(device: torch.device, vocab_size: int = 50_257) -> float:
    """Products a second while nothing is made but words."""
    rows_N5 = philox.rows(1, torch.arange(256 if device.type == "cuda" else 4), torch.ones(1, dtype=torch.int64)).to(device)
    blocks = -(-vocab_size // 4) * len(rows_N5)
    return blocks * PRODUCTS_A_BLOCK / best(lambda: _fold_words(rows_N5, vocab_size), device)


@compiled
def _fold_words(rows_N5: Tensor, vocab_size: int) -> Tensor:
    return philox.words(rows_N5, vocab_size).amax(1)


def native_stream(vocab_size: int) -> float | None:
    """Seconds a position of noise/native.py's words on one core of a CPU, kept nowhere; None without numba."""
    from noise.compiled import native

    fast = native()
    if fast is None:
        return None
    import numpy as np

    rows_N5 = philox.rows(1, torch.arange(1), torch.arange(1)).numpy()
    word_V = np.empty(-(-vocab_size // 4) * 4, np.uint32)
    return best(lambda: fast.words(rows_N5[0], 0, len(word_V) // 4, word_V), torch.device("cpu"), times=50)


def peak_memory(work: Callable[[], object], device: torch.device) -> int:
    """Bytes by which a call raised the memory in use above what was in use before it; 0 where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    except OSError:
        return 0
    before = _status("VmRSS")
    work()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0
