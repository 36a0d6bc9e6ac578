"""Whole training runs, as tests make them: a small recipe on a chain's dataset, and runs that nothing disturbed, to compare with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.trainer.chain import write_chain
from trainer.__main__ import main
from trainer.students import load_tensors

SMALL = {
    "student.layers": 2, "student.hidden": 16, "student.heads": 2, "student.dropout": 0.1, "optim.global_batch": 8, "optim.steps": 12,
    "optim.warmup": 2, "optim.ema": 0.9, "student.noise.kind": "gumbel", "student.noise.readout": "true", "student.noise.drafts": "[1]",
    "log_every": 1, "eval_every": 0, "checkpoint_every": 2, "device": "cpu", "threads": 1, "tensorboard": "false",
}  # fmt: skip
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "trainer"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_chain(tmp_path_factory.mktemp("data") / "dataset", rows=60)  # 12 steps of 8 rows: an epoch ends inside step 8


def arguments(output: Path, data: Path, **changes) -> list[str]:
    settings = {"output": output, "data.path": data, **SMALL, **{name.replace("__", "."): value for name, value in changes.items()}}
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def refuse(capsys, output: Path, data: Path, **changes) -> str:
    """Run in this process; returns the message of a refusal, the last thing that it said."""
    status = main(arguments(output, data, **changes))
    progress, _, message = capsys.readouterr().err.rpartition("error: ")
    assert status == 1 and message and "Traceback" not in progress
    return message


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main(arguments(output, data)) == 0
    return output


@pytest.fixture(scope="module")
def undisturbed_two(data, tmp_path_factory):
    """By torchrun, in accumulation."""
    output = tmp_path_factory.mktemp("undisturbed_two") / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = TWO + arguments(output, data, optim__micro_batch=2)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return output


def lines(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def steps(output: Path) -> list[dict]:
    """What training logged, but for the clock."""
    timed = ("train/tokens/s", "train/waiting")
    return [{name: value for name, value in line.items() if name not in timed} for line in lines(output) if "train/nelbo" in line]


def weights_equal(a: Path, b: Path) -> bool:
    x, y = load_tensors(a / "model.safetensors"), load_tensors(b / "model.safetensors")
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
