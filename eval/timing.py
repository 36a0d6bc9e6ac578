"""Wall time of a sampler, on the machine that the report is made on: one batch, drawn again and again.

Noise, forwards and choices are timed; loading, judging and writing are not. A figure of a machine that does something
else at the same time is of that too, which the spread between the repetitions shows.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.metrics import Array

REPEATS = 3


def machine(device: str) -> dict[str, Any]:
    """What ran: processor or GPU, threads, versions."""
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return {"device": device, "name": name, "threads": torch.get_num_threads(), "torch": torch.__version__, "system": platform.platform()}


def seconds(draw: Callable[[torch.Tensor], Any], rows: int, device: str) -> Array:
    """Seconds for one sequence in a batch of so many, float64 [REPEATS], after one batch that is not timed."""
    sequence_id_B, found = torch.arange(rows), []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        draw(sequence_id_B)
        if device == "cuda":
            torch.cuda.synchronize()
        found.append((time.perf_counter() - started) / rows)
    return np.array(found[1:])


def _processor() -> str:
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
