"""What the guard takes for an explosion, from the first step on, known answers."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.distributed import World
from trainer.guard import Guard

ALONE = World(0, 1, torch.device("cpu"))
UNKNOWING = math.log(50_257)


def judge(losses: list[float], recent: list[float], explode: float = 100.0, unknowing: float = UNKNOWING) -> Guard:
    """Steps of one micro-batch of two tokens each, looked at together."""
    guard = Guard(ALONE, explode, unknowing, recent)
    for step, loss in enumerate(losses, start=1):
        guard.watch(step, 2.0, torch.tensor([2 * loss]), torch.tensor(1.0), torch.tensor([7, 8]))
    guard.look()
    return guard


@pytest.mark.parametrize(
    ("recent", "typical"),
    [
        ([], UNKNOWING),
        ([900.0] * 15, UNKNOWING),  # an explosion that stayed below the limit
        ([900.0] * 64, UNKNOWING),
        ([0.5] * 15, UNKNOWING),
        ([0.5] * 16, 1.0),
        ([3.0] * 9 + [1000.0] * 7, 3.0),
    ],
)
def test_a_loss_is_held_against_the_median_once_it_is_known_and_always_against_knowing_nothing(recent: list[float], typical: float) -> None:
    assert judge([99.9 * typical], recent).recent == [*recent, pytest.approx(99.9 * typical)][-64:]
    with pytest.raises(ValueError, match=rf"the loss of step 1 is .* above optim\.explode 100 times {typical:.4g}; .*sequence ids 7, 8;"):
        judge([100.1 * typical], recent)
    judge([100.1 * typical], recent, explode=0.0)


def test_a_vocabulary_of_one_or_a_student_that_learns_little_still_has_one_nat() -> None:
    judge([99.0], [], unknowing=0.0)
    with pytest.raises(ValueError, match="100 times 1;"):
        judge([101.0], [], unknowing=0.0)


def test_a_run_that_explodes_at_once_is_stopped_wherever_it_was_looked_at_and_resumed() -> None:
    losses = [11.0, 11.5, 40.0, 300.0, 5000.0, 26_000.0]
    said = set()
    for seen in range(5):
        recent = judge(losses[:seen], []).recent if seen else []
        with pytest.raises(ValueError, match="5000 nats a token") as stopped:
            judge(losses[seen:], recent)
        said.add(str(stopped.value).partition(" is ")[2])
    assert len(said) == 1
