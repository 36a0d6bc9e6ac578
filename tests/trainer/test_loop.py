"""Whole runs, in real processes: exact resume after any death, any number of processes, clear refusals."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.trainer.chain import write_chain
from trainer import checkpoint
from trainer.__main__ import main
from trainer.config import OptimConfig
from trainer.loop import learning_rate
from trainer.students import load_student, load_tensors

SMALL = {
    "student.layers": 2, "student.hidden": 16, "student.heads": 2, "student.dropout": 0.1, "optim.global_batch": 8, "optim.steps": 12,
    "optim.warmup": 2, "optim.ema": 0.9, "student.noise.kind": "gumbel", "student.noise.readout": "true", "student.noise.drafts": "[1]",
    "log_every": 1, "eval_every": 0, "checkpoint_every": 2, "device": "cpu", "threads": 1, "tensorboard": "false",
}  # fmt: skip
ALONE = [sys.executable, "-m", "trainer"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "trainer"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_chain(tmp_path_factory.mktemp("data") / "dataset", rows=60)  # 12 steps of 8 rows: an epoch ends inside step 8


def command(output: Path, data: Path, launcher: list[str] = ALONE, **changes) -> list[str]:
    settings = {"output": output, "data.path": data, **SMALL, **{name.replace("__", "."): value for name, value in changes.items()}}
    return launcher + [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def refuse(capsys, output: Path, data: Path, **changes) -> str:
    """Run in this process; returns the message of a refusal, the last thing that it said."""
    status = main(command(output, data, [], **changes))
    progress, _, message = capsys.readouterr().err.rpartition("error: ")
    assert status == 1 and message and "Traceback" not in progress
    return message


def run(*args, **changes) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command(*args, **changes), capture_output=True, text=True, env=environment, check=False, timeout=600)


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run(output, data)
    assert done.returncode == 0, done.stderr
    return output


def steps(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines() if "train/nelbo" in line]


def weights_equal(a: Path, b: Path) -> bool:
    x, y = load_tensors(a / "model.safetensors"), load_tensors(b / "model.safetensors")
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def test_a_signal_during_a_checkpoint_stops_the_run_and_is_not_lost(data, tmp_path, capsys, monkeypatch):
    save = checkpoint.save

    def interrupted(run: Path, state: checkpoint.State, *rest) -> None:
        if state.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        save(run, state, *rest)

    monkeypatch.setattr(checkpoint, "save", interrupted)
    assert main(command(tmp_path / "run", data, [])) == 130
    assert "stopped at step 5" in capsys.readouterr().err and not (tmp_path / "run" / "student.json").exists()


def test_checkpoints_are_in_order_past_a_million_steps(tmp_path):
    for name in ("999800", "1000000", "000200", "1000200.tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["000200", "999800", "1000000"]


def test_a_resumed_run_may_change_its_micro_batch_and_the_place_of_its_data(data, tmp_path, capsys):
    output, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(data, moved)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            checkpoint, "save", lambda run, state, *rest, save=checkpoint.save: (save(run, state, *rest), os.kill(os.getpid(), signal.SIGINT))
        )
        assert main(command(output, data, [])) == 130
    assert main(command(output, moved, [], optim__micro_batch=4)) == 0
    assert "resumed at step" in capsys.readouterr().err


def test_the_probe_gives_even_a_single_row_the_noise_of_another(data, tmp_path):
    assert main(command(tmp_path / "run", data, [], optim__steps=2, data__heldout=data, eval_rows=2, optim__micro_batch=1)) == 0
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["heldout/nelbo"] != last["heldout/nelbo_other_noise"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_was_killed_ends_with_the_bits_of_one_that_was_not(data, undisturbed, tmp_path, number):
    output = tmp_path / "run"
    process = subprocess.Popen(command(output, data), stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for line in process.stderr:
        if "step 5/12" in line:
            process.send_signal(number)
            break
    process.stderr.read()
    assert process.wait() == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    assert not (output / "student.json").exists()
    resumed = run(output, data)
    assert resumed.returncode == 0 and "resumed at step" in resumed.stderr, resumed.stderr
    assert weights_equal(output, undisturbed)
    figures = [{name: line[name] for name in ("step", "train/nelbo", "train/grad_norm")} for line in steps(output)]
    assert figures == [{name: line[name] for name in ("step", "train/nelbo", "train/grad_norm")} for line in steps(undisturbed)]


def test_two_processes_and_accumulation_train_on_the_same_global_batches(data, tmp_path):
    without_dropout = {"student__dropout": 0.0, "optim__steps": 6}
    alone, two = tmp_path / "alone", tmp_path / "two"
    for output, launcher, micro in ((alone, ALONE, 0), (two, TWO, 2)):
        done = run(output, data, launcher, optim__micro_batch=micro, **without_dropout)
        assert done.returncode == 0, done.stderr
    for a, b in zip(steps(alone), steps(two), strict=True):
        assert a["train/nelbo"] == pytest.approx(b["train/nelbo"], rel=1e-4)
        assert a["train/grad_norm"] == pytest.approx(b["train/grad_norm"], rel=1e-3)


def test_a_finished_run_is_a_student_with_its_provenance_and_running_again_does_nothing(data, undisturbed):
    student = load_student(undisturbed)
    assert student.provenance["root_hash"] == json.loads((data / "manifest.json").read_text())["root_hash"]
    assert student.recipe["optim"]["steps"] == 12
    before = (undisturbed / "model.safetensors").stat().st_mtime_ns
    again = run(undisturbed, data)
    assert again.returncode == 0 and "trained already" in again.stdout
    assert (undisturbed / "model.safetensors").stat().st_mtime_ns == before


def test_training_makes_the_loss_fall_and_the_probe_sees_that_noise_is_used(tmp_path, capsys):
    data, heldout = write_chain(tmp_path / "data", rows=512), write_chain(tmp_path / "heldout", rows=60, text_seed=9, seed=78)
    larger = {"student__dropout": 0.0, "student__hidden": 32, "optim__steps": 200, "optim__lr": 1e-2, "optim__global_batch": 64}
    assert main(command(tmp_path / "run", data, [], checkpoint_every=0, log_every=20, data__heldout=heldout, **larger)) == 0
    losses = [line["train/nelbo"] for line in steps(tmp_path / "run")]
    assert losses[-1] < 0.6 * losses[0]
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["heldout/nelbo"] < 0.6 * last["heldout/nelbo_other_noise"]
    assert "no likelihood bound" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim__lr": 1e-2}, "optim.lr: 0.01 here, 0.0003 there"),
        ({"student__noise__drafts": "[2]"}, "student.noise.drafts"),
        ({"student__kind": "ar", "student__noise__kind": "none", "student__noise__readout": "false", "student__noise__drafts": "[]"}, "student.kind"),
    ],
)
def test_another_run_in_the_same_folder_is_refused_by_field(data, undisturbed, capsys, changes, message):
    assert message in refuse(capsys, undisturbed, data, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__path": "nowhere"}, "not a noise dataset"),
        ({"optim__micro_batch": 3}, "whole accumulation"),
        ({"student__hidden": 18}, "multiple of 2 x student.heads"),
        ({"optim__lr": 1e30, "optim__clip": 0.0, "student__dropout": 0.0}, "sequence ids"),
        ({"student__init_from": "nowhere"}, "nowhere/model.safetensors does not exist"),
    ],
)
def test_what_cannot_work_ends_with_one_clear_line(data, tmp_path, capsys, changes, message):
    assert message in refuse(capsys, tmp_path / "run", data, **changes)
    assert not (tmp_path / "run" / "student.json").exists()


def test_noise_is_refused_from_a_dataset_that_has_none_and_unknown_keys_are_errors(tmp_path, capsys):
    tokens = write_chain(tmp_path / "tokens", extraction="none")
    assert "tokens but no noise" in refuse(capsys, tmp_path / "run", tokens)
    with pytest.raises(SystemExit) as end:
        main(command(tmp_path / "run", tokens, [], optim__learning_rate=1.0))
    assert end.value.code == 2 and "learning_rate" in capsys.readouterr().err
    assert main(command(tmp_path / "run", tokens, [], log_every=0)) == 2
    assert "error: log_every is 0; it must be at least 1" in capsys.readouterr().err


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Peak learning rate." in shown and "Add a learned scale times g to the output logits" in shown


def test_a_full_disk_ends_with_one_clear_line_and_the_last_checkpoint_stands(data, tmp_path, capsys, monkeypatch):
    output, fsync, writes = tmp_path / "run", os.fsync, []

    def full(descriptor: int) -> None:
        writes.append(descriptor)
        if len(writes) > 12:  # the recipe, two checkpoints of five files, and then no more
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device; the last checkpoint stands" in refuse(capsys, output, data, optim__ema=0.0)
    monkeypatch.undo()
    finished = [folder.name for folder in (output / "checkpoints").iterdir() if folder.name.isdigit()]
    assert finished and all((output / "checkpoints" / name / "state.json").exists() for name in finished)
    assert main(command(output, data, [], optim__ema=0.0)) == 0
    assert "resumed at step" in capsys.readouterr().err


def test_schedules_warm_up_and_end_where_they_say():
    linear, cosine, constant = (OptimConfig(lr=1.0, steps=110, warmup=10, schedule=name) for name in ("linear", "cosine", "constant"))
    assert learning_rate(linear, 5) == 0.5 and learning_rate(linear, 10) == 1.0 and learning_rate(linear, 110) == 0.0
    assert learning_rate(cosine, 110) == pytest.approx(0.1) and learning_rate(cosine, 60) == pytest.approx(0.55)
    assert learning_rate(constant, 110) == 1.0
