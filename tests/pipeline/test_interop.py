"""Stock tools read a dataset of ours without knowing of it: Hugging Face datasets, polars, DuckDB, pandas; and of both format versions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pytest

from noise.dataset import Manifest
from pipeline.rewrite import convert
from tests.pipeline.test_transfer import dataset as made_here

dataset = made_here


@pytest.fixture(scope="module", params=["version 2", "version 1", "zstd"])
def folder(request: pytest.FixtureRequest, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "version 2":
        return dataset
    output = tmp_path_factory.mktemp("interop") / "converted"
    convert(dataset, output, *((1, None) if request.param == "version 1" else (None, "zstd")))
    return output


@pytest.fixture(scope="module")
def truth(folder: Path) -> pa.Table:
    """All rows, in order, by bare pyarrow."""
    files = sorted((folder / "shards").glob("*.arrow"))
    return pa.concat_tables([pa.ipc.open_file(str(file)).read_all() for file in files])


def tokens(table: pa.Table) -> list[list[int]]:
    return table.column("input_ids").to_pylist()


def test_datasets_maps_it(folder: Path, truth: pa.Table, tmp_path: Path) -> None:
    from datasets import load_dataset

    rows = load_dataset(str(folder), cache_dir=str(tmp_path))["train"]
    assert rows["input_ids"][:] == tokens(truth) and rows["kept"][:] == truth.column("kept").to_pylist()
    assert rows.with_format("numpy")[3]["log_prob"].dtype == np.float32


def test_datasets_streams_it_and_resumes(folder: Path, truth: pa.Table, tmp_path: Path) -> None:
    from datasets import load_dataset

    stream = load_dataset(str(folder), cache_dir=str(tmp_path), streaming=True)["train"]
    first, seen = iter(stream), []
    for _ in range(7):
        seen.append(next(first)["input_ids"])
    state = stream.state_dict()
    again = load_dataset(str(folder), cache_dir=str(tmp_path), streaming=True)["train"]
    again.load_state_dict(state)
    assert seen + [row["input_ids"] for row in again] == tokens(truth)


def test_polars_reads_it(folder: Path, truth: pa.Table) -> None:
    import polars

    frame = polars.read_ipc(folder / "shards" / "*.arrow")
    assert frame["input_ids"].to_list() == tokens(truth) and frame["sequence_id"].to_list() == truth.column("sequence_id").to_pylist()
    assert frame.select(polars.col("kept").explode().sum()).item() == Manifest.read(folder).totals["kept"]


def test_duckdb_asks_it(folder: Path, truth: pa.Table) -> None:
    import duckdb

    rows = pads.dataset(str(folder / "shards"), format="ipc", exclude_invalid_files=True)
    assert rows.count_rows() == truth.num_rows
    found = duckdb.sql("select count(*), sum(list_sum(kept)), -sum(list_sum(log_prob)) from rows").fetchall()[0]
    totals = Manifest.read(folder).totals
    assert found[:2] == (totals["rows"], totals["kept"]) and abs(found[2] - totals["nll_sum"]) < 1e-3 * totals["nll_sum"]


def test_pandas_reads_it(folder: Path, truth: pa.Table) -> None:
    import pandas

    frame = pandas.concat([pandas.read_feather(file) for file in sorted((folder / "shards").glob("*.arrow"))])
    assert [row.tolist() for row in frame["input_ids"]] == tokens(truth) and list(frame.columns) == truth.column_names
