"""Checkpoints stand or are not there, whatever file operation was the last; they hold what is trained, and nothing that is frozen."""

import itertools
import json
import os

import pytest
import torch
from torch import nn

from noise.storage import DatasetError
from tests.trainer.processes import FILE_OPERATIONS
from trainer import checkpoint
from trainer.average import Average
from trainer.students.base import Base


class Small(Base):
    """A frozen layer, a trained one, a buffer that is kept and one that is not."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.frozen, self.head = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 1)
        self.register_buffer("clip", torch.tensor([float(seed), 1.0]))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    @property
    def figure_names(self) -> list[str]:
        return []

    def forward(self, batch, chance, noise_of=None):
        return self.head(self.frozen(torch.ones(2, 4))).sum(), {}


def stepped(seed: int = 0) -> tuple[Small, torch.optim.Optimizer]:
    student = Small(seed)
    optimizer = torch.optim.AdamW([parameter for parameter in student.parameters() if parameter.requires_grad], lr=0.1)
    student(None, None)[0].backward()
    optimizer.step()
    return student, optimizer


def save(run, step: int, seed: int = 0, keep: int = 2, heldout=None, best_by: str = "") -> None:
    student, optimizer = stepped(seed)
    checkpoint.save(run, checkpoint.State(step, 0, step, {}, "root", heldout=heldout or {}), student, None, optimizer, keep, best_by)


class Killed(BaseException):
    """Not an Exception, so that nothing on the way handles it."""


def killed_after(monkeypatch, number: int) -> None:
    count = itertools.count(1)

    def dying(operation):
        def counted(*args, **more):
            if next(count) > number:
                raise Killed
            return operation(*args, **more)

        return counted

    for name in FILE_OPERATIONS:
        monkeypatch.setattr(os, name, dying(getattr(os, name)))


@pytest.mark.parametrize(("first", "second", "keep"), [(100, 200, 1), (200, 200, 1)], ids=["the next step", "the same step again"])
def test_no_last_file_operation_leaves_a_run_without_its_newest_checkpoint(tmp_path, first, second, keep):
    survived = 0
    for number in itertools.count():
        run = tmp_path / str(number)
        save(run, first, seed=1, keep=keep)
        with pytest.MonkeyPatch.context() as patch:
            killed_after(patch, number)
            try:
                save(run, second, seed=2, keep=keep)
                break
            except Killed:
                pass
        for standing in checkpoint.checkpoints(run):
            checkpoint.check(standing)
        folder, said = checkpoint.newest(run)
        assert folder is not None and not said and checkpoint.step_of(folder) in (first, second)
        student = Small(9)
        checkpoint.restore(folder, student, stepped(9)[1])
        assert student.clip[0] in (1.0, 2.0), "it is one of the two, whole"
        save(run, second, seed=2, keep=keep)
        assert [path.name for path in (run / "checkpoints").iterdir()] == [f"{second:06d}"], "and the next one tidies up"
        survived += 1
    assert survived > 15


def test_checkpoints_are_in_order_past_a_million_steps_and_those_on_their_way_do_not_count(tmp_path):
    for name in ("999800", "1000000", "000200", "1000200.tmp", "000100.gone", "000300.damaged", "000400.old", "000200.old"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["000200", "000400.old", "999800", "1000000"]


def test_what_is_frozen_is_neither_saved_nor_averaged_and_buffers_are_kept(tmp_path):
    student, optimizer = stepped(3)
    average = Average(student, 0.9)
    average.update()
    checkpoint.save(tmp_path, checkpoint.State(1, 0, 8, {}, "root"), student, average.state(), optimizer, 1)
    folder, _ = checkpoint.newest(tmp_path)
    assert set(checkpoint.load_tensors(folder / "model.safetensors")) == {"head.weight", "head.bias", "clip"}
    assert set(checkpoint.load_tensors(folder / "average.safetensors")) == {"head.weight", "head.bias"}
    other, other_optimizer = stepped(4)
    checkpoint.restore(folder, other, other_optimizer)
    assert torch.equal(other.head.weight, student.head.weight) and torch.equal(other.clip, student.clip)
    assert not torch.equal(other.frozen.weight, student.frozen.weight), "the student finds its own"
    ours, theirs = optimizer.state[student.head.weight], other_optimizer.state[other.head.weight]
    assert all(torch.equal(ours[name], theirs[name]) for name in ("step", "exp_avg", "exp_avg_sq"))


def test_the_average_is_the_recursion_and_is_lent_to_the_student_without_a_copy():
    student, _ = stepped()
    average, expected = Average(student, 0.5), None
    for step in range(5):
        with torch.no_grad():
            student.head.weight.fill_(float(step))
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))  # the first update takes the weights as they are
        expected = float(step) if expected is None else decay * expected + (1 - decay) * step
    own = student.head.weight.data_ptr()
    with average.in_place():
        assert torch.allclose(student.head.weight, torch.tensor(expected)) and student.head.weight.data_ptr() != own
    assert student.head.weight.detach()[0, 0] == 4.0 and student.head.weight.data_ptr() == own


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 1.0), (6, 4.0)):
        save(tmp_path, step, keep=2, heldout={"nelbo": loss} if loss else None, best_by="nelbo")
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(tmp_path)] == [2, 5, 6]
    assert checkpoint.step_of(checkpoint.best(tmp_path, "nelbo")) == 2 and checkpoint.best(tmp_path, "nll") is None


@pytest.mark.parametrize("damage", ["flip", "truncate", "lose", "state"])
def test_damage_of_any_kind_is_seen_and_named(tmp_path, damage):
    save(tmp_path, 1, seed=1)
    save(tmp_path, 2, seed=2)
    folder = tmp_path / "checkpoints" / "000002"
    path = folder / ("state.json" if damage == "state" else "model.safetensors")
    content = bytearray(path.read_bytes())
    if damage == "lose":
        path.unlink()
    elif damage == "flip":
        content[-1] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(content[:-4])
    with pytest.raises(DatasetError, match=path.name.replace(".", r"\.")):
        checkpoint.check(folder)
    found, said = checkpoint.newest(tmp_path)
    assert found.name == "000001" and len(said) == 1 and "set aside as 000002.damaged" in said[0]
    save(tmp_path, 2, seed=2)
    assert (tmp_path / "checkpoints" / "000002.damaged").exists() and checkpoint.newest(tmp_path)[0].name == "000002"


def test_a_checkpoint_of_an_older_version_loads(tmp_path):
    """It knew nothing of hashes, of recent losses, or of held-out figures, and averaged buffers too."""
    save(tmp_path, 7, seed=2)
    path = tmp_path / "checkpoints" / "000007" / "state.json"
    about = json.loads(path.read_text())
    for name in ("files", "recent", "heldout"):
        del about[name]
    path.write_text(json.dumps(about))
    folder, said = checkpoint.newest(tmp_path)
    assert folder is not None and not said and checkpoint.read_state(folder).recent == []
    student, _ = stepped()
    average = Average(student, 0.9)
    average.load({**{name: tensor + 1 for name, tensor in average.state().items()}, "clip": torch.zeros(2)}, 7)
    with average.in_place():
        assert torch.allclose(student.head.bias, stepped()[0].head.bias + 1)
