"""A sample set is drawn once, survives an interruption at any batch, and is known by its request."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from eval import samples, tables
from noise.storage import DatasetError

REQUEST = {"student": "a", "nfe": 4}


class Counting:
    """Row i is [i, i, i]; fails at the batch it is told to."""

    def __init__(self, fail_at: int = -1):
        self.calls: list[int] = []
        self.fail_at = fail_at

    def __call__(self, sequence_id_B: torch.Tensor) -> torch.Tensor:
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append(int(sequence_id_B[0]))
        return sequence_id_B[:, None].expand(-1, 3)


def test_an_interrupted_set_continues_at_another_batch_size_and_is_then_never_drawn_again(tmp_path: Path) -> None:
    path = tables.piece(tmp_path, "set", REQUEST)
    with pytest.raises(KeyboardInterrupt):
        samples.obtain(path, REQUEST, 10, 4, Counting(fail_at=1))
    assert not path.exists()
    rest = Counting()
    ids = samples.obtain(path, REQUEST, 10, 3, rest)
    assert rest.calls == [4, 7] and np.array_equal(ids, np.repeat(np.arange(10)[:, None], 3, 1))
    assert np.array_equal(samples.obtain(path, REQUEST, 10, 3, Counting(fail_at=0)), ids)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_another_request_is_another_file(tmp_path: Path) -> None:
    assert tables.piece(tmp_path, "set", REQUEST) != tables.piece(tmp_path, "set", {**REQUEST, "nfe": 5})


def test_a_piece_says_what_made_it_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "piece.arrow"
    tables.write(path, {"nll": np.array([0.5, 2.0]), "ids": np.array([[1, 2], [3, 4]], np.int32)}, REQUEST)
    columns, request = tables.read(path)
    assert request == REQUEST and columns["nll"].tolist() == [0.5, 2.0] and columns["ids"].tolist() == [[1, 2], [3, 4]]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DatasetError, match=r"piece.arrow is damaged"):
        tables.read(path)
