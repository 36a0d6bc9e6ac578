"""What a run is made of has what its recipe says, and settings that cannot train are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.trainer.runs import SMALL, arguments
from trainer import setup
from trainer.__main__ import main, parse
from trainer.config import DataConfig, NoiseConfig, OptimConfig, StudentConfig, TrainConfig
from trainer.data import open_data, unigram
from trainer.students import build, load_student


def test_the_optimizer_has_the_recipes_settings_and_the_weights_that_are_trained() -> None:
    student = build(StudentConfig(layers=1, hidden=16, heads=2), 13, 8)
    frozen = next(student.parameters()).requires_grad_(False)
    optimizer = setup.new_optimizer(student, OptimConfig(lr=0.01, betas=(0.7, 0.95), weight_decay=0.3))
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.01, (0.7, 0.95), 0.3)
    trained = {id(parameter) for parameter in student.parameters() if parameter is not frozen}
    assert {id(parameter) for parameter in group["params"]} == trained


def test_a_student_gets_the_log_unigram_of_its_dataset_and_keeps_it_through_training_and_resume(data: Path, tmp_path: Path) -> None:
    dataset = open_data(DataConfig(path=str(data)))
    expected_V = unigram(dataset)
    assert len(expected_V.unique()) > 2
    noise = NoiseConfig(kind="gumbel", input="add", prior="unigram")
    config = TrainConfig("", student=StudentConfig(layers=1, hidden=16, heads=2, noise=noise))
    assert torch.equal(setup.new_student(config, dataset, start=True)[0].input.log_unigram_V, expected_V)
    changes = {"student__noise__input": "add", "student__noise__prior": "unigram", "optim__steps": 4}
    for _ in ("trained", "resumed"):
        assert main(arguments(tmp_path / "run", data, **changes)) == 0
        assert torch.equal(load_student(tmp_path / "run").input.log_unigram_V, expected_V)
        (tmp_path / "run" / "student.json").unlink()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("optim.clip", "-1", "optim.clip is -1.0; it must be at least 0"),
        ("optim.clip", ".nan", "optim.clip is nan; it must be at least 0"),
        ("optim.warmup", "-3", "optim.warmup is -3; it must be at least 0"),
        ("optim.weight_decay", "-0.1", "optim.weight_decay is -0.1; it must be at least 0"),
        ("threads", "-1", "threads is -1; it must be at least 0"),
        ("optim.lr", "0", "optim.lr is 0.0; it must be above 0"),
        ("optim.lr", ".nan", "optim.lr is nan; it must be above 0"),
        ("optim.ema", "1.5", "optim.ema is 1.5; it must be in [0, 1), 0 for no average"),
        ("optim.ema", "1.0", "optim.ema is 1.0; it must be in [0, 1)"),
        ("optim.ema", "-0.5", "optim.ema is -0.5; it must be in [0, 1)"),
        ("optim.betas", "[0.9, 1.0]", "optim.betas is [0.9, 1.0]; both must be in [0, 1)"),
        ("optim.betas", "[-0.1, 0.9]", "optim.betas is [-0.1, 0.9]; both must be in [0, 1)"),
        ("student.dropout", "1.0", "student.dropout is 1.0; it must be in [0, 1), 0 for none"),
        ("student.dropout", "-0.1", "student.dropout is -0.1; it must be in [0, 1)"),
        ("student.mlp", "-5", "student.mlp is -5; it must be at least 0, which takes the usual width"),
    ],
)
def test_a_setting_that_cannot_train_is_refused_by_name(capsys: pytest.CaptureFixture[str], name: str, value: str, message: str) -> None:
    assert main(["--output", "nowhere", "--data.path", "nowhere", f"--{name}={value}"]) == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_the_least_values_that_can_train_are_taken() -> None:
    least = {"optim.clip": 0, "optim.warmup": 0, "optim.weight_decay": 0, "threads": 0, "optim.ema": 0, "student.dropout": 0, "student.mlp": 0}
    settings = {**SMALL, "output": "x", **least, "optim.betas": "[0, 0]"}
    config = parse([part for name, value in settings.items() for part in (f"--{name}", str(value))])
    assert config.optim.ema == 0 and tuple(config.optim.betas) == (0, 0)
