"""Clipped mask rates: their draws, the search for the interval of least variance, and its place in a run that stops and resumes."""

import math
import os
import signal

import numpy as np
import pytest
import torch

from tests.trainer.chain import write_chain
from tests.trainer.test_bd3lm import student_of
from trainer import checkpoint, clip
from trainer.__main__ import main
from trainer.chance import Chance
from trainer.config import StudentConfig, TrainConfig
from trainer.data import NoiseDataset
from trainer.students import load_tensors


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    return NoiseDataset(write_chain(tmp_path_factory.mktemp("chain") / "dataset", ragged=True)).batch(np.arange(24))


def test_antithetic_rates_cover_the_interval_evenly_in_every_block():
    rates = Chance(5, 7, 100).rates(torch.arange(100), 6, 0.2, 0.7)
    assert rates.shape == (100, 6) and float(rates.min()) >= 0.2 and float(rates.max()) <= 0.7
    gaps = rates.sort(0).values.diff(dim=0)
    assert torch.allclose(gaps, torch.full_like(gaps, 0.005), atol=1e-5)
    assert len(set(rates[0].tolist())) == 6  # blocks of a row have rates of their own
    assert torch.equal(Chance(5, 7, 100).rates(torch.arange(40, 60), 6, 0.2, 0.7), rates[40:60])
    assert torch.equal(Chance(5, 7, 100).rates(torch.arange(100), 1, 1e-3, 1.0)[:, 0], Chance(5, 7, 100).times(torch.arange(100)))


def test_the_search_finds_the_interval_of_least_variance():
    rate = (torch.arange(20_000) + 0.5) / 20_000
    masked = torch.rand(20_000, generator=torch.Generator().manual_seed(0)) < rate
    one_token = clip.moments(rate, masked / rate)  # Var = log(omega / beta) / (omega - beta) - 1
    assert clip.variance(one_token, 8, 18) == pytest.approx(math.log(0.9 / 0.4) / 0.5 - 1, rel=0.05)
    assert clip.search(one_token) == (0.5, 1.0)
    valley = clip.moments(rate, (rate - 0.45) ** 2)  # the loss varies least around its minimum
    assert clip.search(valley) == (0.2, 0.7)
    assert clip.search(clip.moments(rate, torch.ones_like(rate))) == (0.0, 1.0)
    halves = clip.moments(rate[::2], masked[::2] / rate[::2]) + clip.moments(rate[1::2], masked[1::2] / rate[1::2])
    assert torch.allclose(halves, one_token)


def test_evaluation_searches_with_its_own_blocks_and_training_takes_what_was_found(batch):
    student = student_of(4, clip_search=True, clip=(0.1, 0.9))
    assert student.train().rates() == (0.1, 0.9)
    assert student.eval().rates() == (1e-3, 1.0)
    with torch.no_grad():
        chance = Chance(1, 0, 24)
        student(batch, chance)
        student(batch, chance, noise_of=batch)  # the probe does not count
    rate = chance.rates(batch.place_B, 2, 1e-3, 1.0)
    (moments,) = student._moments
    blocks = torch.stack([batch.valid_BL[:, :4].any(1), batch.valid_BL[:, 4:].any(1)], 1)
    assert float(moments[:, 0].sum()) == blocks.sum()
    assert torch.equal(torch.bincount((rate[blocks] * 20).long(), minlength=20).double(), moments[:, 0])
    one_row, one_block = batch.split(1)[3], student_of(8, clip_search=True).eval()
    with torch.no_grad():
        loss = float(one_block(one_row, Chance(1, 0, 1))[0]) / one_row.tokens()
    assert loss > 0 and one_block._moments[0].sum(0).tolist() == pytest.approx([1, loss, loss**2])
    student.after_heldout({})
    assert student.train().rates() == tuple(max(1e-3, value) for value in clip.search(moments)) and not student._moments
    assert "clip" in student.own_state() and "clip" not in student_of(4).own_state()


def test_a_search_without_evaluations_is_refused():
    with pytest.raises(ValueError, match="searches at held-out evaluations"):
        TrainConfig(output="x", student=StudentConfig(kind="bd3lm", block_size=4, clip_search=True))


def settings(output, data, **changes) -> list[str]:
    values = {
        "output": output, "data.path": data, "data.heldout": data, "student.kind": "bd3lm", "student.layers": 2, "student.hidden": 16,
        "student.heads": 2, "student.block_size": 4, "student.clip_search": "true", "student.dropout": 0.1, "student.noise.kind": "gumbel",
        "student.noise.readout": "true", "student.noise.drafts": "[1]", "optim.global_batch": 8, "optim.steps": 9, "optim.ema": 0.9,
        "eval_every": 2, "eval_rows": 24, "checkpoint_every": 3, "log_every": 1, "device": "cpu", "threads": 1, "tensorboard": "false", **changes,
    }  # fmt: skip
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def test_a_resumed_run_has_the_bits_of_one_that_never_stopped_and_the_intervals_that_it_searched(tmp_path, monkeypatch, capsys):
    data = write_chain(tmp_path / "data", rows=60)
    assert main(settings(tmp_path / "whole", data)) == 0
    save = checkpoint.save

    def stop(*args, **more) -> None:
        save(*args, **more)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(checkpoint, "save", stop)
    assert main(settings(tmp_path / "run", data)) == 130  # stopped after its first checkpoint, one search before
    monkeypatch.undo()
    assert main(settings(tmp_path / "run", data)) == 0 and "resumed at step" in capsys.readouterr().err
    whole, resumed = (load_tensors(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert whole["clip"].tolist() != [0.0, 1.0]
    assert main(settings(tmp_path / "run", data, eval_every=3)) == 1 and "eval_every: 3 here, 2 there" in capsys.readouterr().err
