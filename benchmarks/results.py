"""The JSON of a benchmark: its settings and figures with the date, the hardware and the versions that made them.

Nothing in it names a machine, a user or a path.
"""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from noise.storage import write_json


def hardware() -> dict[str, Any]:
    """Processor, cores that may be used, threads in use, accelerators."""
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(at) for at in range(torch.cuda.device_count())],
    }


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's model where the system tells it, else its architecture."""
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__, "pyarrow": pa.__version__}


def write(path: Path, settings: dict[str, Any], figures: dict[str, Any]) -> None:
    """Write a benchmark's JSON, atomically."""
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    write_json(path, {"date": date, "hardware": hardware(), "versions": versions(), "settings": settings, **figures})
