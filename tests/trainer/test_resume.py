"""Runs that are killed, stopped, damaged and moved go on to the same bits, in real processes."""

import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest

from tests.trainer import processes
from tests.trainer.processes import DieAtFileOperation, Terminated
from tests.trainer.runs import arguments, refuse, steps, weights_equal
from trainer import checkpoint
from trainer.__main__ import main


def kill_until_done(output: Path, data: Path, size: int, seed: int, **changes) -> int:
    """Run again and again, each process killed at a random file operation, until one run gets through; returns the number of deaths."""
    chance, deaths, before = random.Random(seed), 0, 0
    while not (output / "student.json").exists():
        die = DieAtFileOperation(chance.randrange(8, 60), after=chance.random() < 0.5)
        ended = processes.run(arguments(output, data, **changes), output.with_name("said"), size, die)
        found = checkpoint.checkpoints(output)
        assert int(found[-1].name[:6]) >= before if found else not before, "a checkpoint was lost"
        assert f"resumed at step {before}" in ended[0].said or not before
        if ended[0].status:
            assert ended[0].status == -signal.SIGKILL, ended[0].said
            assert all(peer.status == 1 and "another process of this run ended" in peer.said for peer in ended[1:])
            deaths += 1
        before = int(found[-1].name[:6]) if found else 0
    return deaths


def test_a_run_that_dies_at_random_file_operations_ends_with_the_bits_of_one_that_does_not(data, undisturbed, tmp_path):
    assert kill_until_done(tmp_path / "run", data, size=1, seed=5) >= 3
    assert weights_equal(tmp_path / "run", undisturbed)
    assert steps(tmp_path / "run") == steps(undisturbed)


def test_so_does_a_run_of_two_processes(data, undisturbed_two, tmp_path):
    assert kill_until_done(tmp_path / "run", data, size=2, seed=6, optim__micro_batch=2) >= 2
    assert weights_equal(tmp_path / "run", undisturbed_two)
    assert steps(tmp_path / "run") == steps(undisturbed_two)


def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(data, undisturbed_two, tmp_path):
    command = arguments(tmp_path / "run", data, optim__micro_batch=2, checkpoint_every=0)
    ended = processes.run(command, tmp_path, 2, Terminated(step=5, on=1))
    assert [process.status for process in ended] == [130, 130] and "stopped at step 5" in ended[0].said
    assert [process.status for process in processes.run(command, tmp_path, 2)] == [0, 0]
    assert weights_equal(tmp_path / "run", undisturbed_two) and steps(tmp_path / "run") == steps(undisturbed_two)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_signal_between_checkpoints_costs_no_bit_either(data, undisturbed, tmp_path, number):
    output, log = tmp_path / "run", tmp_path / "said"
    with processes.training(arguments(output, data), log) as (process,):
        while process.is_alive() and not ((log / "said.0").exists() and "step 5/12" in (log / "said.0").read_text()):
            process.join(0.005)
        os.kill(process.pid, number)
        process.join(600)
        assert process.exitcode == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    assert not (output / "student.json").exists()
    assert main(arguments(output, data)) == 0
    assert weights_equal(output, undisturbed) and steps(output) == steps(undisturbed)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_run_goes_on_in_another_number_of_processes_with_the_same_global_batches(data, tmp_path, before, after):
    """Without dropout, which differs by process, and across the end of an epoch."""
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    assert main(arguments(whole, data, student__dropout=0.0)) == 0
    command = arguments(moved, data, student__dropout=0.0)
    assert [process.status for process in processes.run(command, tmp_path, before, Terminated(step=5, on=0))] == [130] * before
    assert [process.status for process in processes.run(command, tmp_path, after)] == [0] * after
    for line, expected in zip(steps(moved), steps(whole), strict=True):
        assert line == pytest.approx(expected, rel=5e-6)


def test_a_signal_during_a_checkpoint_stops_the_run_and_is_not_lost(data, tmp_path, capsys, monkeypatch):
    save = checkpoint.save

    def interrupted(run: Path, state: checkpoint.State, *rest) -> None:
        if state.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        save(run, state, *rest)

    monkeypatch.setattr(checkpoint, "save", interrupted)
    assert main(arguments(tmp_path / "run", data)) == 130
    assert "stopped at step 5" in capsys.readouterr().err and not (tmp_path / "run" / "student.json").exists()


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_continues_to_the_same_bits(data, undisturbed, tmp_path, capsys):
    output = tmp_path / "run"
    shutil.copytree(undisturbed, output)
    (output / "student.json").unlink()
    damaged = output / "checkpoints" / "000012" / "optimizer.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    assert main(arguments(output, data)) == 0
    said = capsys.readouterr().err
    assert "optimizer.safetensors is damaged" in said and "set aside as 000012.damaged" in said and "resumed at step 10" in said
    assert weights_equal(output, undisturbed) and steps(output) == steps(undisturbed)
    (output / "student.json").unlink()
    for folder in checkpoint.checkpoints(output):
        (folder / "state.json").write_text("{}")
    assert "is whole; remove the folder to train from the start" in refuse(capsys, output, data)


def test_a_resumed_run_may_change_its_micro_batch_and_the_place_of_its_data(data, tmp_path, capsys):
    """Without dropout, which differs by micro-batch. The sums are those of another order, so equal but for rounding."""
    whole, output, moved = tmp_path / "whole", tmp_path / "run", tmp_path / "moved"
    assert main(arguments(whole, data, student__dropout=0.0)) == 0
    shutil.copytree(data, moved)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            checkpoint, "save", lambda run, state, *rest, save=checkpoint.save: (save(run, state, *rest), os.kill(os.getpid(), signal.SIGINT))
        )
        assert main(arguments(output, data, student__dropout=0.0)) == 130
    assert main(arguments(output, moved, student__dropout=0.0, optim__micro_batch=4)) == 0
    assert "resumed at step 3" in capsys.readouterr().err
    for line, expected in zip(steps(output), steps(whole), strict=True):
        assert line == pytest.approx(expected, rel=5e-6)


def test_a_resumed_run_needs_what_it_started_from_no_more(data, undisturbed, tmp_path):
    start, output = tmp_path / "start", tmp_path / "run"
    shutil.copytree(undisturbed, start)
    assert main(arguments(output, data, student__init_from=start, optim__steps=4)) == 0
    shutil.rmtree(start)
    (output / "student.json").unlink()
    assert main(arguments(output, data, student__init_from=start, optim__steps=4)) == 0


def test_settings_that_a_run_did_not_know_had_their_defaults(data, undisturbed, tmp_path, capsys):
    """A run of an older version continues, and is finished."""
    output = tmp_path / "run"
    shutil.copytree(undisturbed, output)
    for path in (output / "student.json", output / "checkpoints" / "000012" / "state.json"):
        about = json.loads(path.read_text())
        del about["recipe"]["student"]["noise"]["draft_restart"], about["recipe"]["optim"]["schedule"]
        path.write_text(json.dumps(about))
    assert main(arguments(output, data)) == 0 and "trained already" in capsys.readouterr().out
    assert "optim.schedule: 'linear' here, 'constant' there" in refuse(capsys, output, data, optim__schedule="linear")
