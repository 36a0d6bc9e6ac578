"""A finished piece of work: an Arrow file of columns with the request that made it in its metadata.

Contract: the file's name carries a hash of the request, and the file appears whole or not at all. So a piece that exists
is done, a piece of another request has another name, and an interrupted run loses what it was just making, no more.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from eval.metrics import Array
from noise.storage import DatasetError, atomic_file, canonical_json, sha256_text

_KEY = "eval"

Request = dict[str, Any]


def piece(folder: Path, name: str, request: Request) -> Path:
    """Where the piece that `request` describes is kept; `name` is for people."""
    return folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}-{sha256_text(canonical_json(request))[:10]}.arrow"


def write(path: Path, columns: dict[str, Array], request: Request) -> None:
    """Columns [S] or [S, L] as one Arrow file, atomically."""
    arrays = []
    for values in columns.values():
        flat = pa.array(np.ascontiguousarray(values).reshape(-1))
        arrays.append(flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1]))
    table = pa.table(dict(zip(columns, arrays, strict=True))).replace_schema_metadata({_KEY: canonical_json(request)})
    with atomic_file(path) as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def read(path: Path) -> tuple[dict[str, Array], Request]:
    """(columns, request) of a piece. Raises DatasetError that names the file when it is missing, damaged or another file."""
    try:
        with pa.memory_map(str(path)) as file:
            table = pa.ipc.open_file(file).read_all().combine_chunks()
            request = json.loads((table.schema.metadata or {})[_KEY.encode()])
            return {name: _numpy(table.column(name)) for name in table.column_names}, request
    except FileNotFoundError:
        raise DatasetError(f"{path} does not exist") from None
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise DatasetError(f"{path} is damaged or was not made by `python -m eval` ({error}); delete it and run again") from None


def digest(array: Array) -> str:
    """sha256 of an array's shape and int32 values."""
    values = np.ascontiguousarray(array, np.int32)
    return hashlib.sha256(str(values.shape).encode("ascii") + values.tobytes()).hexdigest()


def _numpy(column: pa.ChunkedArray) -> Array:
    array = column.combine_chunks()
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    if pa.types.is_fixed_size_list(array.type):
        return np.array(array.flatten().to_numpy().reshape(len(array), array.type.list_size))
    return np.array(array.to_numpy())
