"""Noise to text: a student that knew the teacher would return what the noise determines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from eval.metrics import bootstrap_weights
from eval.reconstruct import by_position, full_rows, reconstruct, returned, shares
from noise import philox
from noise.commit import commit_shard
from noise.dataset import Manifest, Plan
from noise.sketch import Codec
from noise.storage import DatasetError
from tests.eval.world import LENGTH, VOCAB, write_heldout
from tests.noise.teachers import BigramTeacher, identity_of, rows_of
from trainer.config import NoiseConfig
from trainer.data import NoiseDataset


def next_log_probs(teacher: BigramTeacher) -> torch.Tensor:
    """[V, V]: row v is what follows token v."""
    last_V = torch.arange(teacher.vocab_size)
    return teacher.log_probs(torch.stack([last_V, last_V], 1))[:, 1]


class Oracle:
    """Writes position t as the teacher would after the token that it holds at t - 1, argmax(log p + g), else from BOS."""

    def __init__(self, noise: str = "gumbel"):
        self.vocab_size, self.mask_id, self.ahead = VOCAB, VOCAB, 0
        self.noise = NoiseConfig(kind=noise, readout=True)
        self.table = next_log_probs(BigramTeacher(VOCAB))

    def logits(self, ids_BL: torch.Tensor, g_NV: torch.Tensor | None) -> torch.Tensor:
        before = ids_BL.roll(1, 1)[ids_BL == self.mask_id]
        logits_NV = self.table[before.where(before != self.mask_id, 0)]
        return logits_NV if g_NV is None else logits_NV + g_NV


def test_every_token_that_follows_a_known_one_comes_back(tmp_path: Path) -> None:
    write_heldout(tmp_path / "pairs", rows=200, length=2)
    assert (reconstruct(Oracle(), NoiseDataset(tmp_path / "pairs"), 500, 1, "random", seed=1) == 1).all()  # type: ignore[arg-type]


def test_noise_helps_and_no_noise_guesses(tmp_path: Path) -> None:
    write_heldout(tmp_path / "rows", rows=100)
    dataset = NoiseDataset(tmp_path / "rows")
    with_noise, without = (reconstruct(Oracle(kind), dataset, 99, 4, "random", seed=1).mean() for kind in ("gumbel", "none"))  # type: ignore[arg-type]
    assert with_noise > without + 0.1


def test_positions_tell_where_the_text_comes_back(tmp_path: Path) -> None:
    write_heldout(tmp_path / "rows", rows=100)
    same = returned(Oracle(), NoiseDataset(tmp_path / "rows"), 99, 1, "random", seed=1)
    assert same.shape == (99, LENGTH) and (same[:, 0] == -1).all() and set(np.unique(same[:, 1:])) == {0, 1}
    parts = by_position(same, bootstrap_weights(99, 50, 1))
    assert [(part["first"], part["last"]) for part in parts] == [(t, t) for t in range(1, LENGTH)]
    first, *later = (part["share"] for part in parts)
    assert first["low"] == first["value"] == 1  # only it follows a known token, BOS; the others are written as if they did
    assert all(0 < share["low"] < share["value"] < share["high"] < 1 for share in later)
    assert shares(same).mean() == pytest.approx(np.mean([part["share"]["value"] for part in parts]))


def test_long_rows_are_told_in_runs_of_positions_and_given_tokens_are_left_out() -> None:
    same = np.array([[-1, -1, -1, 1, 0, 1], [-1, -1, 1, 1, 1, 0]], np.int8)
    parts = by_position(same, np.ones((1, 2)), most=2)
    assert [(part["first"], part["last"], part["share"]["value"]) for part in parts] == [(1, 3, 1.0), (4, 5, 0.5)]
    assert [part["first"] for part in by_position(same, np.ones((1, 2)))] == [2, 3, 4, 5]  # at position 1 both are given
    assert shares(same).tolist() == pytest.approx([2 / 3, 3 / 4])


def test_sequential_noise_is_the_prior_draw_that_wrote_the_text(tmp_path: Path) -> None:
    teacher, codec = BigramTeacher(VOCAB), Codec(VOCAB)
    plan = Plan(identity_of(codec, 2, "sequential"), {}, [{}])
    plan.write(tmp_path)
    ids = torch.zeros(50, 2, dtype=torch.int64)
    g = philox.gumbel(philox.rows(int(plan.identity["seed"]), torch.arange(50), torch.ones(50, dtype=torch.int64)), VOCAB)
    ids[:, 1] = (next_log_probs(teacher)[0] + g).argmax(1)
    rows = rows_of(teacher, plan.metadata(0), ids, torch.full((50,), 2))
    rows.log_prob[:, 1] = next_log_probs(teacher)[0][ids[:, 1]]
    commit_shard(tmp_path, plan.metadata(0), [rows], 0)
    Manifest.write(tmp_path, plan)
    assert (reconstruct(Oracle(), NoiseDataset(tmp_path), 50, 1, "random", seed=1) == 1).all()  # type: ignore[arg-type]


def test_rows_shorter_than_the_block_are_left_out(tmp_path: Path) -> None:
    write_heldout(tmp_path / "rows", rows=20)
    dataset = NoiseDataset(tmp_path / "rows")
    assert full_rows(dataset, 500).shape == (19, LENGTH) and full_rows(dataset, 7).shape == (7, LENGTH)
    assert np.array_equal(full_rows(dataset, 7), full_rows(dataset, 500)[:7])


def test_a_dataset_without_noise_or_full_rows_is_refused(tmp_path: Path) -> None:
    write_heldout(tmp_path / "tokens", extraction="none")
    with pytest.raises(DatasetError, match=r"no noise \(extraction: none\)"):
        reconstruct(Oracle(), NoiseDataset(tmp_path / "tokens"), 9, 1, "random", seed=1)  # type: ignore[arg-type]
    write_heldout(tmp_path / "short", rows=1)
    with pytest.raises(DatasetError, match="no row fills its block"):
        full_rows(NoiseDataset(tmp_path / "short"), 9)
