"""Noise as numbers, for people without our decoder: rows of a dataset to safetensors or npy.

    g             [rows, L, V]    the noise; NaN where a position has none (position 0, padding, prompts)
    input_ids     [rows, L]       int32
    length        [rows]          int32
    log_prob      [rows, L]       float32, nats
    sequence_id   [rows]          uint64

`NAME.safetensors` holds all of them; `NAME.npy` holds g alone, and the others lie beside it as NAME.input_ids.npy and so on.
Costs what the sketch saves: 4 V bytes a position, 200 KB for GPT-2.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from noise import philox
from noise.dataset import Manifest
from noise.decode import Noise
from noise.folder import Where
from noise.shard import Array, Rows, ShardMetadata
from noise.sketch import Sketch
from noise.storage import DatasetError, atomic_file
from pipeline.progress import Progress, say
from pipeline.rewrite import RowSource

DTYPES = {"float32": np.float32, "float16": np.float16}
IN_MEMORY = 8 * 2**30
"""Bytes of g that a safetensors file may hold: it is written from memory."""


def export_dense(dataset: Where, first: int, stop: int, output: Path, draw: int = 0, dtype: str = "float32") -> None:
    """Rows first..stop-1. Raises DatasetError for rows or draws that are not there, a file that is, or a disk that is too small."""
    source = RowSource.of(dataset)
    identity = source.manifest.identity
    shape = (stop - first, identity["block_length"], identity["vocab_size"])
    size = int(np.prod(shape)) * np.dtype(DTYPES[dtype]).itemsize
    _check(source, first, stop, output, draw, size)
    say(f"export: {shape[0]:,} rows x {shape[1]:,} positions x {shape[2]:,} entries of {dtype}: {size:,} bytes")
    if output.suffix == ".npy":
        temporary = output.with_name(output.name + ".tmp")
        g_BLV: Array = np.lib.format.open_memmap(temporary, mode="w+", dtype=DTYPES[dtype], shape=shape)
    else:
        g_BLV = np.empty(shape, DTYPES[dtype])
    about = _fill(source, np.arange(first, stop), g_BLV, draw)
    if output.suffix == ".npy":
        g_BLV.flush()  # type: ignore[attr-defined]
        for name, value in about.items():
            with atomic_file(output.with_suffix(f".{name}.npy")) as file:
                np.save(file, value)
        temporary.rename(output)
        return
    from safetensors.numpy import save

    with atomic_file(output) as file:
        file.write(save({"g": g_BLV, **about}, {"root_hash": source.manifest.root_hash, "draw": str(draw), "first_row": str(first)}))


def _check(source: RowSource, first: int, stop: int, output: Path, draw: int, size: int) -> None:
    manifest: Manifest = source.manifest
    if manifest.identity["extraction"] == "none":
        raise DatasetError(f"{source.folder} has tokens but no noise (extraction: none)")
    if not 0 <= first < stop <= source.starts[-1]:
        raise DatasetError(f"rows are {first}:{stop}; {source.folder} has the rows 0:{source.starts[-1]}")
    if not 0 <= draw < manifest.identity["draws"]:
        raise DatasetError(f"draw is {draw}; {source.folder} has the draws 0..{manifest.identity['draws'] - 1}")
    if output.suffix not in (".safetensors", ".npy"):
        raise DatasetError(f"{output}: dense noise is written as .safetensors or .npy; name one of the two")
    if output.exists():
        raise DatasetError(f"{output} exists; name another file, or remove it")
    if output.suffix == ".safetensors" and size > IN_MEMORY:
        raise DatasetError(
            f"{size:,} bytes of noise do not go into one safetensors file; name a .npy file, or fewer rows (at most {IN_MEMORY:,} bytes)"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output.parent).free
    if size > free:
        raise DatasetError(f"{output} would have {size:,} bytes, and {free:,} are free; name fewer rows, or --dtype float16")


def _fill(source: RowSource, numbers: Array, g_BLV: Array, draw: int) -> dict[str, Array]:
    """Noise row by row into `g_BLV`; returns the other columns."""
    columns: dict[str, list[Array]] = {"input_ids": [], "length": [], "log_prob": [], "sequence_id": []}
    at = 0
    with Progress("export", "rows", len(numbers), len(numbers)) as progress:
        for metadata, rows in source.pieces(numbers):
            for row in range(len(rows)):
                g_BLV[at] = row_noise(rows[row : row + 1], metadata, draw)
                at += 1
                progress.advance(work=1, tokens=metadata.block_length)
            for name, values in columns.items():
                values.append(np.asarray(getattr(rows, name)))
    kinds: dict[str, Any] = {"input_ids": np.int32, "length": np.int32, "log_prob": np.float32, "sequence_id": np.uint64}
    return {name: np.concatenate(values).astype(kinds[name]) for name, values in columns.items()}


def row_noise(rows: Rows, metadata: ShardMetadata, draw: int) -> Array:
    """g, float32 [L, V], of one row."""
    position_N = torch.from_numpy(np.flatnonzero(rows.has_noise(metadata.extraction)[0]))
    sequence_N = torch.from_numpy(rows.sequence_id.view(np.int64).copy()).expand(len(position_N))
    rows_N5 = philox.rows(int(metadata.seed), sequence_N, position_N, draw)
    if metadata.extraction == "sequential":
        noise = Noise.prior(rows_N5, metadata.vocab_size)
    else:
        kept_N = torch.from_numpy(rows.kept[0].astype(np.int64))[position_N]
        entries = (torch.from_numpy(column.astype(np.int64)) for column in (rows.index, rows.code))
        sketch = Sketch(torch.from_numpy(rows.log_prob[0].copy())[position_N], kept_N, *entries)
        noise = Noise.posterior(sketch, torch.from_numpy(rows.input_ids[0].astype(np.int64))[position_N], rows_N5, metadata.codec)
    g_LV = np.full((metadata.block_length, metadata.vocab_size), np.nan, np.float32)
    g_LV[position_N.numpy()] = noise.dense().numpy()
    return g_LV
