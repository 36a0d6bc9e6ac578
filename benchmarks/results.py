"""What benchmarks share: their command line, their table, and their JSON with the date, the hardware and the versions that made it.

Nothing in it names a machine, a user or a path.
"""

from __future__ import annotations

import datetime
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch

from noise.storage import DatasetError, write_json

C = TypeVar("C")


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


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> None:
    """Print a table, its first column to the left and the others to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, caption=caption)
    for at, column in enumerate(columns):
        table.add_column(column, justify="right" if at else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def command(name: str, description: str, config: type[C], work: Callable[[C], object], arguments: list[str] | None) -> int:
    """A benchmark's command line: its config's fields are its options. Returns the exit status."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--config", action="config", help="A recipe: YAML with the settings below.")
    parser.add_class_arguments(config)
    try:
        values = vars(parser.instantiate(parser.parse_args(arguments)))
        values.pop("config", None)
        settings = config(**values)
        work(settings)
    except (DatasetError, ValueError) as error:
        print(f"benchmarks.{name}: {error}", file=sys.stderr)
        return 1
    print(f"figures: {settings.output}")  # type: ignore[attr-defined]
    return 0
