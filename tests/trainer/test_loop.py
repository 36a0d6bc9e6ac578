"""Whole runs, in real processes: any number of processes, figures, refusals, and what stops a run."""

import errno
import json
import os
import shutil
import sys
import types

import pytest
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from tests.trainer import processes
from tests.trainer.chain import write_chain
from tests.trainer.processes import RunOutOfMemory
from tests.trainer.runs import arguments, lines, refuse, steps
from trainer import checkpoint, loop
from trainer.__main__ import main
from trainer.average import Average
from trainer.batch import Batch
from trainer.config import OptimConfig
from trainer.heldout import Heldout
from trainer.loop import learning_rate
from trainer.students import load_student, load_tensors
from trainer.students.mdlm import MDLM


def test_two_processes_and_accumulation_train_on_the_same_global_batches(data, undisturbed_two, tmp_path):
    """Losses before any update are the same; dropout then differs, a stream for each process."""
    output = tmp_path / "run"
    for size, micro in ((1, 0), (2, 2)):
        ended = processes.run(arguments(output / str(size), data, optim__steps=6, student__dropout=0.0, optim__micro_batch=micro), tmp_path, size)
        assert not any(process.status for process in ended), ended
    for a, b in zip(steps(output / "1"), steps(output / "2"), strict=True):
        assert a["train/nelbo"] == pytest.approx(b["train/nelbo"], rel=1e-4)
        assert a["train/grad_norm"] == pytest.approx(b["train/grad_norm"], rel=1e-3)


def count_reductions(_: int) -> None:
    """Each time that gradients are summed over the processes, the process says so."""

    def counted(student: torch.nn.Module) -> torch.nn.Module:
        model = DistributedDataParallel(student)
        model.register_comm_hook(None, said)
        return model

    def said(_, bucket):
        if bucket.is_last():
            print("gradients reduced", file=sys.stderr)
        return allreduce_hook(None, bucket)

    loop.DistributedDataParallel = counted


def test_accumulation_sums_gradients_over_the_processes_once_a_step(data, tmp_path):
    ended = processes.run(arguments(tmp_path / "run", data, optim__steps=3, optim__micro_batch=1), tmp_path, 2, count_reductions)
    assert [(process.status, process.said.count("gradients reduced")) for process in ended] == [(0, 3), (0, 3)], ended


def test_the_probe_gives_even_a_single_row_the_noise_of_another(data, tmp_path):
    assert main(arguments(tmp_path / "run", data, optim__steps=2, data__heldout=data, eval_rows=2, optim__micro_batch=1)) == 0
    last = lines(tmp_path / "run")[-1]
    assert last["heldout/nelbo"] != last["heldout/nelbo_other_noise"]


def test_a_finished_run_is_a_student_with_its_provenance_and_running_again_does_nothing(data, undisturbed, capsys):
    student = load_student(undisturbed)
    assert student.provenance["root_hash"] == json.loads((data / "manifest.json").read_text())["root_hash"]
    assert student.recipe["optim"]["steps"] == 12
    before = (undisturbed / "model.safetensors").stat().st_mtime_ns
    assert main(arguments(undisturbed, data)) == 0 and "trained already" in capsys.readouterr().out
    assert (undisturbed / "model.safetensors").stat().st_mtime_ns == before


def test_training_makes_the_loss_fall_and_the_probe_sees_that_noise_is_used(tmp_path, capsys):
    data, heldout = write_chain(tmp_path / "data", rows=512), write_chain(tmp_path / "heldout", rows=60, text_seed=9, seed=78)
    larger = {"student__dropout": 0.0, "student__hidden": 32, "optim__steps": 200, "optim__lr": 1e-2, "optim__global_batch": 64}
    assert main(arguments(tmp_path / "run", data, checkpoint_every=0, log_every=20, data__heldout=heldout, **larger)) == 0
    losses = [line["train/nelbo"] for line in steps(tmp_path / "run")]
    assert losses[-1] < 0.6 * losses[0]
    last = lines(tmp_path / "run")[-1]
    assert last["heldout/nelbo"] < 0.6 * last["heldout/nelbo_other_noise"]
    said = capsys.readouterr().err
    assert (
        "no likelihood bound" in said and "waiting for data" in said and all(0 <= line["train/waiting"] <= 1 for line in lines(tmp_path / "run")[:-1])
    )


def test_bfloat16_and_compile_train_to_nearly_the_same_loss(data, undisturbed, tmp_path):
    assert main(arguments(tmp_path / "run", data, precision="bfloat16", compile="true")) == 0
    for ours, exact in zip(steps(tmp_path / "run"), steps(undisturbed), strict=True):
        assert ours["train/nelbo"] == pytest.approx(exact["train/nelbo"], rel=0.03) and ours["train/nelbo"] != exact["train/nelbo"]
    assert all(tensor.dtype == torch.float32 for tensor in load_tensors(tmp_path / "run" / "model.safetensors").values())


NO_NOISE = {"student__noise__kind": "none", "student__noise__readout": "false", "student__noise__drafts": "[]"}


def test_the_best_checkpoint_is_kept_beside_the_newest(data, tmp_path, monkeypatch):
    output, losses = tmp_path / "run", iter([2.0, 1.0, 1.5, 1.2])
    monkeypatch.setattr(Heldout, "figures", lambda *_: {"nelbo": next(losses)})
    changes = {**NO_NOISE, "data__heldout": data, "eval_every": 3, "checkpoint_every": 5, "keep_checkpoints": 1}
    assert main(arguments(output, data, keep_best="true", **changes)) == 0
    assert [path.name for path in checkpoint.checkpoints(output)] == ["000006", "000012"]
    assert checkpoint.best(output, "nelbo").name == "000006"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim__lr": 1e-2}, "optim.lr: 0.01 here, 0.0003 there"),
        ({"student__noise__drafts": "[2]"}, "student.noise.drafts"),
        ({"student__kind": "ar", **NO_NOISE}, "student.kind"),
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
        ({"student__init_from": "nowhere"}, "nowhere"),
        ({"keep_best": "true"}, "data.heldout is empty"),
        ({"wandb": "project"}, "pip install wandb"),
    ],
)
def test_what_cannot_work_ends_with_one_clear_line(data, tmp_path, capsys, changes, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert message in refuse(capsys, tmp_path / "run", data, **changes)
    assert not (tmp_path / "run" / "student.json").exists()


def test_no_checkpoint_is_called_best_by_a_loss_that_knows_the_text(data, tmp_path, capsys):
    assert "that noise knows the held-out text" in refuse(capsys, tmp_path / "run", data, data__heldout=data, keep_best="true")


def spoil(monkeypatch, step: int, place: int, loss) -> list[int]:
    """Make the loss of one step's micro-batch that begins at a place what `loss` makes of it; returns a list that will hold its sequence ids."""
    ids, forward = [], MDLM.forward

    def spoilt(self, batch, chance, noise_of=None):
        value, figures = forward(self, batch, chance, noise_of)
        if chance.step == step and int(batch.place_B[0]) == place:
            ids[:] = batch.sequence_id_B.tolist()
            value = loss(value)
        return value, figures

    monkeypatch.setattr(MDLM, "forward", spoilt)
    return ids


@pytest.mark.parametrize(
    ("step", "loss", "message", "stands"),
    [
        (6, lambda value: value * float("nan"), "the loss of step 6 is not finite; micro-batch 2 of 4", "000004"),
        (19, lambda value: value + 1e5, "nats a token, above optim.explode 100 times", "000018"),
        (4, lambda value: value + 1e5, "nats a token, above optim.explode 100 times 2.565;", "000002"),
    ],
    ids=["not a number", "explosion", "early explosion"],
)
@pytest.mark.parametrize("log_every", [1, 100])
def test_a_bad_loss_stops_the_run_with_the_sequences_of_its_micro_batch(data, tmp_path, capsys, monkeypatch, step, loss, message, stands, log_every):
    ids = spoil(monkeypatch, step, 2, loss)
    said = refuse(capsys, tmp_path / "run", data, optim__steps=24, optim__micro_batch=2, log_every=log_every)
    assert message in said and len(ids) == 2 and f"has sequence ids {ids[0]}, {ids[1]};" in said
    assert checkpoint.checkpoints(tmp_path / "run")[-1].name == stands, "no checkpoint holds what came after"
    again = refuse(capsys, tmp_path / "run", data, optim__steps=24, optim__micro_batch=2, log_every=log_every)
    assert again == said, "a resumed run judges by what came before it"


def test_a_run_that_explodes_in_its_first_steps_is_stopped_before_a_checkpoint(data, tmp_path, capsys):
    wild = {**NO_NOISE, "optim__lr": 30, "optim__warmup": 0, "optim__steps": 60, "checkpoint_every": 20, "log_every": 20}
    assert "nats a token, above optim.explode 100 times 2.565; micro-batch 1 of 1 has" in refuse(capsys, tmp_path / "run", data, **wild)
    assert not checkpoint.checkpoints(tmp_path / "run")


def test_a_loss_that_weighs_much_is_no_explosion(data, tmp_path):
    assert main(arguments(tmp_path / "run", data, student__objective__nelbo=1000.0, optim__steps=2)) == 0


def test_a_gradient_that_is_not_finite_stops_the_run_too(data, tmp_path, capsys, monkeypatch):
    spoil(monkeypatch, 3, 0, lambda value: value + (value - value.detach()) * float("inf"))
    said = refuse(capsys, tmp_path / "run", data)
    assert "of step 3 is not finite" in said and "sequence ids" in said


def test_two_processes_name_the_same_micro_batch(data, tmp_path):
    ended = processes.run(arguments(tmp_path / "run", data, optim__micro_batch=2), tmp_path, 2, bad_loss_on_one)
    first, second = (process.said.rpartition("error: ")[2] for process in ended)
    assert [process.status for process in ended] == [1, 1] and first == second
    assert "the loss of step 4 is not finite; micro-batch 1 of 2 on process 1 has sequence ids" in first


def bad_loss_on_one(rank: int) -> None:
    spoil(pytest.MonkeyPatch(), 4, 4, lambda value: value * float("nan"))  # the second process has places 4 to 7


@pytest.mark.parametrize(
    ("owner", "method"),
    [(Batch, "to"), (MDLM, "forward"), (torch.Tensor, "backward"), (torch.optim.AdamW, "step"), (Average, "update"), (Heldout, "figures")],
    ids=["to the device", "forward", "backward", "optimizer", "average", "evaluation"],
)
@pytest.mark.parametrize("size", [1, 2])
def test_out_of_memory_suggests_the_micro_batch_that_keeps_the_global_batch(data, tmp_path, size, owner, method):
    command = arguments(tmp_path / "run", data, optim__global_batch=12, data__heldout=data, eval_every=1)
    ended = processes.run(command, tmp_path, size, RunOutOfMemory(owner, method, calls=1, on=size - 1))
    assert all(process.status == 1 and "Traceback" not in process.said for process in ended), ended
    rows, smaller = 12 // size, 6 // size
    message = f"out of memory with micro-batches of {rows} rows; --optim.micro_batch {smaller} keeps the global batch of 12"
    assert message in ended[-1].said
    assert all("another process of this run ended" in process.said for process in ended[:-1])


def test_noise_is_refused_from_a_dataset_that_has_none_and_unknown_keys_are_errors(tmp_path, capsys):
    tokens = write_chain(tmp_path / "tokens", extraction="none")
    assert "tokens but no noise" in refuse(capsys, tmp_path / "run", tokens)
    with pytest.raises(SystemExit) as end:
        main(arguments(tmp_path / "run", tokens, optim__learning_rate=1.0))
    assert end.value.code == 2 and "learning_rate" in capsys.readouterr().err
    assert main(arguments(tmp_path / "run", tokens, log_every=0)) == 2
    assert "error: log_every is 0; it must be at least 1" in capsys.readouterr().err


def test_help_explains_every_setting_and_the_other_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Peak learning rate." in shown and "Add a learned scale times g to the output logits" in shown
    assert "python -m trainer export" in shown


def test_a_full_disk_ends_with_one_clear_line_and_the_last_checkpoint_stands(data, tmp_path, capsys, monkeypatch):
    output, fsync, writes = tmp_path / "run", os.fsync, []

    def full(descriptor: int) -> None:
        writes.append(descriptor)
        if len(writes) > 12:  # the recipe, a checkpoint, and then no more
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device; the last checkpoint stands" in refuse(capsys, output, data, optim__ema=0.0)
    monkeypatch.undo()
    finished = [folder.name for folder in (output / "checkpoints").iterdir() if folder.name.isdigit()]
    assert finished and all((output / "checkpoints" / name / "state.json").exists() for name in finished)
    assert main(arguments(output, data, optim__ema=0.0)) == 0
    assert "resumed at step" in capsys.readouterr().err


def test_tensorboard_has_the_figures_of_metrics_jsonl_once_each_after_a_resume_too(data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = tmp_path / "run"
    command = arguments(output, data, optim__steps=3, data__heldout=data, eval_every=2, tensorboard="true")
    assert main(command) == 0
    (output / "student.json").unlink()
    shutil.rmtree(output / "checkpoints" / "000003")  # what came after step 2 is trained again
    assert main(command) == 0
    events = EventAccumulator(str(output / "tensorboard")).Reload()
    found = {(tag, event.step): event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
    assert sum(len(events.Scalars(tag)) for tag in events.Tags()["scalars"]) == len(found)
    written = {(tag, line["step"]): value for line in lines(output) for tag, value in line.items() if tag != "step"}
    assert ("train/nelbo", 3) in written and ("heldout/nelbo", 2) in written
    assert found == pytest.approx(written, rel=1e-6)  # float32 there


def test_weights_and_biases_gets_the_figures_and_a_resumed_run_goes_on_in_the_same_place(data, tmp_path, monkeypatch):
    started, logged = [], []
    run = types.SimpleNamespace(log=lambda figures, step: logged.append((step, figures)), finish=lambda: logged.append("finished"))
    fake = types.SimpleNamespace(init=lambda **settings: started.append(settings) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for steps_ in (2, 2):
        assert main(arguments(tmp_path / "run", data, optim__steps=steps_, wandb="noise")) == 0
        (tmp_path / "run" / "student.json").unlink()
    assert [step for step, _ in logged[:2]] == [1, 2] and "train/nelbo" in logged[0][1] and logged[2] == "finished"
    assert started[0] == started[1] and started[0]["project"] == "noise" and started[0]["resume"] == "allow"
    assert started[0]["config"]["optim"]["steps"] == 2


def test_schedules_warm_up_and_end_where_they_say():
    linear, cosine, constant = (OptimConfig(lr=1.0, steps=110, warmup=10, schedule=name) for name in ("linear", "cosine", "constant"))
    assert learning_rate(linear, 5) == 0.5 and learning_rate(linear, 10) == 1.0 and learning_rate(linear, 110) == 0.0
    assert learning_rate(cosine, 110) == pytest.approx(0.1) and learning_rate(cosine, 60) == pytest.approx(0.55)
    assert learning_rate(constant, 110) == 1.0
