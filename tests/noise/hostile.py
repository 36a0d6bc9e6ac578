"""Bytes from anybody, and what our readers make of them: they are read, or there is a DatasetError; all else is a finding.

python -m tests.noise.hostile MEGABYTES KIND FILE [KIND FILE ...]     prints one outcome a file, with so much address space beyond what is imported

Run as a program, since a crash would end it and memory is bounded for a whole process. tests/noise/fuzz.py searches with the same targets.
"""

from __future__ import annotations

import functools
import json
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from noise.dataset import Manifest, Plan
from noise.folder import Folder
from noise.receipt import committed
from noise.seal import read_seal
from noise.shard import ShardReader
from noise.storage import DatasetError

VECTORS = Path(__file__).parents[1] / "vectors"


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


def _read_seal(folder: Path) -> None:
    read_seal(Folder.of(folder))


STUDENT = (13, 8)
"""Vocabulary and block length of the student whose weights lie beside any student.json."""


@functools.cache
def student_weights() -> bytes:
    from safetensors.torch import save

    from trainer.config import StudentConfig
    from trainer.students import build

    return save({name: tensor.contiguous() for name, tensor in build(StudentConfig(layers=1, hidden=16, heads=2), *STUDENT).own_state().items()})


def _load_student(folder: Path) -> None:
    from trainer.students import load_student

    (folder / "model.safetensors").write_bytes(student_weights())
    load_student(folder)


def _load_rows(path: Path) -> None:
    """A manifest beside the vectors' shards: the first, a middle and the last row that it says there are, as the trainer reads them."""
    from trainer.shards import NoiseDataset

    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "dataset"
        shutil.copytree(VECTORS / "version-2", whole)
        shutil.copyfile(path, whole / "manifest.json")
        dataset = NoiseDataset(whole)
        dataset.order(1).at(0, 2)
        for row in (0, len(dataset) // 2, len(dataset) - 1):
            batch = dataset.batch(np.array([row]))
            (batch.input_ids_BL.sum() + batch.sketch.index_K.sum()).item()


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
    "seal": _in_folder("seal.json", _read_seal),
    "student": _in_folder("student.json", _load_student),
    "loader": _load_rows,
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
