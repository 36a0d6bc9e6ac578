"""The loader benchmark on 128 rows: every reader that is installed gives the rows that were written. Nothing timed is looked at."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import loader, rows
from benchmarks.loaders import FIXED, LISTS, READERS, SCALARS, Batch, Ours, Reader, each_row
from noise.sketch import Codec

VOCAB, LENGTH, BATCH = 300, 16, 16
CODEC = Codec(VOCAB, 0.125, 1)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of 64 rows."""
    folder = tmp_path_factory.mktemp("loader") / "dataset"
    loader.write_dataset(folder, rows.simulated(CODEC, LENGTH, 64, 1), CODEC, 1, 2)
    return folder


def by_id(batch: Batch) -> dict[int, dict[str, Any]]:
    """The rows of a batch, each with its own entries."""
    kept_B = batch["kept"].to(torch.int64).sum(1).tolist()
    columns = {name: batch[name].tolist() for name in (*FIXED, *SCALARS)}
    columns |= {name: [part.tolist() for part in batch[name].to(torch.int64).split(kept_B)] for name in LISTS}
    return {number: {name: columns[name][at] for name in columns} for at, number in enumerate(columns["sequence_id"])}


@pytest.mark.parametrize("kind", READERS, ids=lambda kind: kind.name)
def test_an_epoch_of_every_reader_is_the_rows_that_were_written(dataset: Path, tmp_path: Path, kind: type[Reader]) -> None:
    reader = kind()
    if not reader.available():
        pytest.skip(f"{reader.install} is not installed")
    written = {row["sequence_id"]: {name: np.asarray(values).tolist() for name, values in row.items()} for row in each_row(dataset)}
    reader.write(dataset, tmp_path)
    for wide in (False, True):
        batches = reader.batches(dataset, tmp_path, BATCH, wide, 0)
        read = [next(batches) for _ in range(len(written) // BATCH)]
        assert {number: row for batch in read for number, row in by_id(batch).items()} == written
        assert not wide or all(values.dtype in (torch.int64, torch.float32) for values in read[0].values())
        assert list(by_id(read[0])) != sorted(by_id(read[0])), "shuffled"
        batches.close()  # type: ignore[attr-defined]


def test_a_reader_that_gives_other_entries_is_found_out(dataset: Path) -> None:
    base = rows.simulated(CODEC, LENGTH, 64, 1)
    batch = next(Ours().batches(dataset, dataset, BATCH, True, 0))
    loader.check("one", batch, base)
    with pytest.raises(AssertionError, match="one gives another index than was written"):
        loader.check("one", batch | {"index": batch["index"].roll(1)}, base)


def test_the_benchmark_reads_the_same_rows_with_every_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A batch a second, so every rate and ratio is known. The readers with worker processes stand as not installed."""
    monkeypatch.setattr(loader, "read", lambda batches, seconds: (len(next(batches)["length"]), 1.0))
    monkeypatch.setattr(loader, "first_batch", functools.partial(loader.first_batch, times=1))
    for kind in READERS:
        if max(kind.workers):
            monkeypatch.setattr(kind, "available", lambda reader: False)
    size = ["--vocab_size", str(VOCAB), "--block_lengths", f"[{LENGTH}]", "--positions", str(128 * LENGTH), "--shards", "2"]
    size += ["--tokens_a_batch", str(BATCH * LENGTH), "--distributions", "64", "--rounds", "2", "--many_shards", "16", "--order_rows", "20000"]
    assert loader.main([*size, "--output", str(tmp_path / "loader.json")]) == 0
    found = json.loads((tmp_path / "loader.json").read_text())
    measured = found["readers"][str(LENGTH)]
    assert measured["rows"] == 128 and found["order"]["rows"] == 20_000 and found["first_batch"]["shards"] == 16
    listed = [(reader["name"], reader.get("widths")) for reader in measured["readers"]]
    assert listed == [(kind.name, widths) for kind in READERS for widths in ([None] if max(kind.workers) else ["stored", "int64"])]
    said = capsys.readouterr().out
    for reader in measured["readers"]:
        if "install" in reader:
            assert f"pip install '{reader['install']}'" in said and "rows_a_second" not in reader
        else:
            assert reader["rows_a_second"] == [BATCH, BATCH] and reader["to_memmap"] == 1
    assert [(goal["widths"], goal["of_memmap"], goal["times_best_peer"]) for goal in measured["goals"]] == [("stored", 1, 1), ("int64", 1, 1)]
