"""Readers of the same rows, for `benchmarks/loader.py`: ours, its peers, and numpy's memmap.

Each writes a dataset's rows in its own format and gives shuffled batches of tensors for ever, epoch after epoch: input_ids,
log_prob and kept [B, L], index and code [K], and one sequence_id and length a row. Whole columns, since that is what a student
takes: readers that give rows have them stacked and concatenated. Peers are imported only where they are asked for.
Shapes: B rows, L block length, K kept entries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from noise.dataset import Manifest, open_shard
from noise.shard import Rows
from trainer.data import NoiseDataset, Place, batches

Array = npt.NDArray[Any]
Batch = dict[str, Tensor]
FIXED, LISTS, SCALARS = ("input_ids", "log_prob", "kept"), ("index", "code"), ("sequence_id", "length")


def all_rows(dataset: Path) -> Iterator[Rows]:
    """Record batches of a dataset, in order."""
    manifest = Manifest.read(dataset)
    for receipt in manifest.receipts:
        yield from open_shard(dataset, receipt, manifest.identity, check_hash=False)


def each_row(dataset: Path) -> Iterator[dict[str, Any]]:
    for rows in all_rows(dataset):
        for at in range(len(rows)):
            row = rows[at : at + 1]
            found = {name: np.array(getattr(row, name)[0]) for name in FIXED} | {name: np.array(getattr(row, name)) for name in LISTS}
            yield found | {name: int(getattr(row, name)[0]) for name in SCALARS}


def stacked(rows: list[dict[str, Any]], wide: bool = False) -> Batch:
    """Rows as whole arrays."""
    found = {name: _tensor(np.stack([np.asarray(row[name]) for row in rows]), wide) for name in FIXED}
    found |= {name: _tensor(np.concatenate([np.asarray(row[name]) for row in rows]), wide) for name in LISTS}
    return found | {name: torch.tensor([int(row[name]) for row in rows]) for name in SCALARS}


def _tensor(values: Array, wide: bool) -> Tensor:
    tensor = torch.from_numpy(values)
    return tensor.to(torch.int64) if wide and not tensor.is_floating_point() else tensor


class Stack:
    """`stacked` for worker processes."""

    def __init__(self, wide: bool):
        self.wide = wide

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        return stacked(rows, self.wide)


class Reader(ABC):
    """One contestant; `install` is the pip requirement that is missing when it cannot be imported."""

    name: str
    install = ""
    workers = (0,)
    """Numbers of worker processes that it is measured with; the fastest counts."""

    @abstractmethod
    def write(self, dataset: Path, folder: Path) -> None:
        """Write the rows in its own format."""

    @abstractmethod
    def batches(self, dataset: Path, folder: Path, size: int, wide: bool, workers: int) -> Iterator[Batch]:
        """Shuffled, for ever; `wide`: integers as int64."""

    def available(self) -> bool:
        return True


class Ours(Reader):
    name = "trainer.data"

    def write(self, dataset: Path, folder: Path) -> None:
        """The shards themselves."""

    def batches(self, dataset: Path, folder: Path, size: int, wide: bool, workers: int) -> Iterator[Batch]:
        for batch, _ in batches(NoiseDataset(dataset), 1, size, Place(), narrow=not wide):
            shape, sketch = batch.input_ids_BL.shape, batch.sketch
            yield {
                "input_ids": batch.input_ids_BL, "log_prob": sketch.log_prob_N.view(shape), "kept": sketch.kept_N.view(shape),
                "index": sketch.index_K, "code": sketch.code_K, "sequence_id": batch.sequence_id_B, "length": batch.length_B,
            }  # fmt: skip


class Memmap(Reader):
    """One .npy file a column; rows by numpy's own indexing, entries by slices."""

    name = "numpy memmap"

    def write(self, dataset: Path, folder: Path) -> None:
        parts = list(all_rows(dataset))
        for name in FIXED + LISTS + SCALARS:
            np.save(folder / f"{name}.npy", np.concatenate([getattr(rows, name) for rows in parts]))
        kept = np.concatenate([rows.kept.sum(1, dtype=np.int64) for rows in parts])
        np.save(folder / "offset.npy", np.concatenate([[0], np.cumsum(kept)]))

    def batches(self, dataset: Path, folder: Path, size: int, wide: bool, workers: int) -> Iterator[Batch]:
        column = {name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in (*FIXED, *LISTS, *SCALARS, "offset")}
        random = np.random.default_rng(1)
        while True:
            order = random.permutation(len(column["length"]))
            for start in range(0, len(order) - size + 1, size):
                row_B = order[start : start + size]
                found = {name: _tensor(column[name][row_B], wide) for name in FIXED}
                spans = [slice(*span) for span in np.stack((column["offset"][row_B], column["offset"][row_B + 1]), 1).tolist()]
                found |= {name: _tensor(np.concatenate([column[name][span] for span in spans]), wide) for name in LISTS}
                yield found | {name: torch.from_numpy(column[name][row_B].astype(np.int64)) for name in SCALARS}


class HuggingFace(Reader):
    """The shards in its own cache: memory-mapped, with the torch format."""

    name = "datasets, mapped"
    install = "datasets"
    streaming = False

    def available(self) -> bool:
        return _imports("datasets")

    def write(self, dataset: Path, folder: Path) -> None:
        self._open(dataset, folder)

    def _open(self, dataset: Path, folder: Path) -> Any:
        import datasets

        datasets.disable_progress_bars()
        files = [str(path) for path in sorted((dataset / "shards").glob("*.arrow"))]
        return datasets.load_dataset("arrow", data_files=files, split="train", streaming=self.streaming, cache_dir=str(folder))

    def batches(self, dataset: Path, folder: Path, size: int, wide: bool, workers: int) -> Iterator[Batch]:
        rows, epoch = self._open(dataset, folder).with_format("torch"), 0
        while True:
            yield from _columns_of(rows.shuffle(seed=epoch), size, wide)
            epoch += 1


class HuggingFaceStreaming(HuggingFace):
    """The shards as they are, read in order, shuffled in a buffer of 1,000 rows."""

    name = "datasets, streaming"
    streaming = True

    def write(self, dataset: Path, folder: Path) -> None:
        """The shards themselves."""

    def batches(self, dataset: Path, folder: Path, size: int, wide: bool, workers: int) -> Iterator[Batch]:
        rows, epoch = self._open(dataset, folder).shuffle(seed=1, buffer_size=1000).with_format("torch"), 0
        while True:
            rows.set_epoch(epoch)
            yield from _columns_of(rows, size, wide)
            epoch += 1


def _columns_of(rows: Any, size: int, wide: bool) -> Iterator[Batch]:
    """Batches of `datasets` as whole arrays; its integers are int64 already, or narrow where torch has the type."""
    for batch in rows.iter(size, drop_last_batch=True):
        found = {name: batch[name] if isinstance(batch[name], Tensor) else torch.stack(list(batch[name])) for name in FIXED}
        found |= {name: torch.cat(list(batch[name])) for name in LISTS}
        found |= {name: batch[name] for name in SCALARS}
        yield {name: values.to(torch.int64) if wide and not values.is_floating_point() else values for name, values in found.items()}


class Mosaic(Reader):
    name = "mosaicml-streaming"
    install = "mosaicml-streaming==0.13.*"
    workers = (0, 2)

    def available(self) -> bool:
        return _imports("streaming")

    def write(self, dataset: Path, folder: Path) -> None:
        from streaming import MDSWriter

        first = next(each_row(dataset))
        columns = {name: f"ndarray:{first[name].dtype}:{len(first[name])}" for name in FIXED}
        columns |= {name: f"ndarray:{first[name].dtype}" for name in LISTS} | {"sequence_id": "uint64", "length": "int32"}
        with MDSWriter(out=str(folder), columns=columns) as writer:
            for row in each_row(dataset):
                writer.write(row)

    def batches(self, dataset: Path, folder: Path, size: int, wide: bool, workers: int) -> Iterator[Batch]:
        from streaming import StreamingDataset
        from torch.utils.data import DataLoader

        rows = StreamingDataset(local=str(folder), shuffle=True, batch_size=size)
        loader = DataLoader(rows, batch_size=size, num_workers=workers, collate_fn=Stack(wide), drop_last=True, persistent_workers=workers > 0)
        while True:
            yield from loader


class Litdata(Reader):
    name = "litdata"
    install = "litdata==0.2.*"
    workers = (0, 2)

    def available(self) -> bool:
        return _imports("litdata")

    def write(self, dataset: Path, folder: Path) -> None:
        from litdata.streaming.writer import BinaryWriter

        writer = BinaryWriter(str(folder), chunk_bytes="64MB")
        for number, row in enumerate(each_row(dataset)):
            writer.add_item(number, row)
        writer.done()
        writer.merge()

    def batches(self, dataset: Path, folder: Path, size: int, wide: bool, workers: int) -> Iterator[Batch]:
        from litdata import StreamingDataLoader, StreamingDataset

        rows = StreamingDataset(str(folder), shuffle=True, drop_last=False)
        loader = StreamingDataLoader(rows, batch_size=size, num_workers=workers, collate_fn=Stack(wide), drop_last=True)
        while True:
            yield from loader


def _imports(name: str) -> bool:
    try:
        __import__(name)
    except ImportError:
        return False
    return True


READERS: tuple[type[Reader], ...] = (Ours, Memmap, HuggingFace, HuggingFaceStreaming, Mosaic, Litdata)
