"""Bytes from anybody, and what our readers make of them: they are read, or there is a DatasetError; all else is a finding.

python -m tests.noise.hostile MEGABYTES KIND FILE [KIND FILE ...]     prints one outcome a file, with so much address space beyond what is imported

Run as a program, since a crash would end it and memory is bounded for a whole process. tests/noise/fuzz.py searches with the same targets.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from noise.dataset import Manifest, Plan
from noise.receipt import committed
from noise.shard import ShardReader
from noise.storage import DatasetError


def read_shard(path: Path) -> None:
    """Every byte of every row that comes back."""
    for rows in ShardReader(path):
        for column in vars(rows):
            for part in rows.entries if column == "entries" else [getattr(rows, column)]:
                part.sum()


def _in_folder(name: str, read: Callable[[Path], object]) -> Callable[[Path], None]:
    def target(path: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / name
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, place)
            read(Path(folder))

    return target


def _read_manifest(folder: Path) -> None:
    manifest = Manifest.read(folder)
    assert manifest.totals is not None
    for receipt in manifest.receipts[:2]:
        try:
            manifest.open(folder, receipt)
        except DatasetError:
            continue


def _read_plan(folder: Path) -> None:
    plan = Plan.read(folder)
    if plan.shards:
        plan.metadata(0)


def _load_student(folder: Path) -> None:
    from trainer.students import load_student

    load_student(folder)


def _student(path: Path) -> None:
    """A student's folder whose student.json or model.safetensors these bytes are, told by what they begin with."""
    with tempfile.TemporaryDirectory() as folder:
        is_json = path.read_bytes()[:1] in (b"{", b"[", b"")
        shutil.copytree(path.parent / "whole", folder, dirs_exist_ok=True) if (path.parent / "whole").is_dir() else None
        shutil.copyfile(path, Path(folder) / ("student.json" if is_json else "model.safetensors"))
        _load_student(Path(folder))


def read_tensors(path: Path) -> None:
    from trainer.students import load_tensors

    for tensor in load_tensors(path).values():
        tensor.sum()


TARGETS: dict[str, Callable[[Path], None]] = {
    "shard": read_shard,
    "manifest": _in_folder("manifest.json", _read_manifest),
    "plan": _in_folder("plan.json", _read_plan),
    "receipt": _in_folder("shards/00000.json", committed),
    "tensors": read_tensors,
    "student": _student,
}


def outcome(kind: str, path: Path) -> str:
    """`read`, `DatasetError`, or any other exception by name."""
    try:
        TARGETS[kind](path)
        return "read"
    except DatasetError as error:
        assert len(str(error)) < 5000, "an error is for people"
        return "DatasetError"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]


def of_bytes(kind: str, content: bytes) -> str:
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        return outcome(kind, Path(file.name))


def _limit(megabytes: int) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main(megabytes: int, files: list[str]) -> None:
    import pyarrow as pa
    import torch

    import trainer.students  # noqa: F401

    pa.set_memory_pool(pa.system_memory_pool())  # others reserve address space ahead
    torch.set_num_threads(1)
    _limit(megabytes)
    print(json.dumps([outcome(kind, Path(path)) for kind, path in zip(files[::2], files[1::2], strict=True)]))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
