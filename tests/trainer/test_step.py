"""What one step does to the weights, and through what it goes: AdamW at the scheduled rate, on gradients that are clipped; compiled layers."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from noise import compiled
from tests.trainer.runs import arguments, steps, weights_equal
from trainer import setup
from trainer.__main__ import main
from trainer.students import Student

BETAS, DECAY, RATES = (0.7, 0.95), 0.3, [0.01, 0.02, 0.01, 0.0]
OPTIM = {
    "optim__lr": 0.02, "optim__warmup": 2, "optim__steps": len(RATES), "optim__schedule": "linear", "optim__weight_decay": DECAY,
    "optim__betas": str(list(BETAS)),
}  # fmt: skip


@contextlib.contextmanager
def watched() -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """(gradients, weights) of every optimizer step, each one vector in float64; the weights of before the first step come first."""
    gradients: list[Tensor] = []
    weights: list[Tensor] = []

    def flat(optimizer: torch.optim.Optimizer, value: Callable[[Tensor], Any]) -> Tensor:
        return torch.cat([value(parameter).detach().double().flatten() for group in optimizer.param_groups for parameter in group["params"]])

    def before(optimizer: torch.optim.Optimizer, *_: object) -> None:
        gradients.append(flat(optimizer, lambda parameter: parameter.grad))
        if not weights:
            weights.append(flat(optimizer, lambda parameter: parameter))

    def after(optimizer: torch.optim.Optimizer, *_: object) -> None:
        weights.append(flat(optimizer, lambda parameter: parameter))

    hooks = register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)
    try:
        yield gradients, weights
    finally:
        for hook in hooks:
            hook.remove()


def test_every_step_is_adamw_at_the_rate_of_its_schedule(data: Path, tmp_path: Path) -> None:
    """Loshchilov & Hutter (2019), algorithm 2, in float64."""
    with watched() as (gradients, weights):
        assert main(arguments(tmp_path / "run", data, **OPTIM)) == 0
    assert len(gradients) == len(RATES)
    m, v = torch.zeros_like(gradients[0]), torch.zeros_like(gradients[0])
    for t, (rate, gradient) in enumerate(zip(RATES, gradients, strict=True), start=1):
        m, v = BETAS[0] * m + (1 - BETAS[0]) * gradient, BETAS[1] * v + (1 - BETAS[1]) * gradient**2
        step = m / (1 - BETAS[0] ** t) / ((v / (1 - BETAS[1] ** t)).sqrt() + 1e-8)
        expected = (1 - rate * DECAY) * weights[t - 1] - rate * step
        torch.testing.assert_close(weights[t], expected, rtol=1e-6, atol=1e-6)


def test_a_gradient_above_optim_clip_is_scaled_down_to_it_and_clip_0_leaves_it(data: Path, tmp_path: Path) -> None:
    seen = {}
    for clip in (0.0, 0.05, 1e9):
        with watched() as (gradients, _):
            assert main(arguments(tmp_path / str(clip), data, optim__steps=1, optim__clip=clip)) == 0
        seen[clip] = gradients[0]
        assert steps(tmp_path / str(clip))[0]["train/grad_norm"] == pytest.approx(float(seen[0.0].norm()), rel=1e-5), "the norm before clipping"
    norm = float(seen[0.0].norm())
    assert norm > 0.1 and math.isfinite(norm) and torch.equal(seen[0.0], seen[1e9])
    torch.testing.assert_close(seen[0.05], seen[0.0] * 0.05 / norm, rtol=1e-4, atol=1e-9)


def test_compile_wraps_each_layer_of_the_student_and_every_pass_goes_through_the_wrapped(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    students: list[Student] = []
    passes: Counter[int] = Counter()
    new_student = setup.new_student

    def kept(*given: Any, **more: Any) -> tuple[Student, list[str]]:
        made = new_student(*given, **more)
        students.append(made[0])
        return made

    def counting(function: Any, **_: object) -> Any:
        def call(*given: Any, **more: Any) -> Any:
            passes[id(getattr(function, "__self__", None))] += 1
            return function(*given, **more)

        return call

    monkeypatch.setattr(setup, "new_student", kept)
    monkeypatch.setattr(torch, "compile", counting)
    monkeypatch.setattr(compiled, "_broken", [])
    for name in ("true", "false"):
        assert main(arguments(tmp_path / name, data, optim__steps=2, optim__micro_batch=4, compile=name)) == 0
    with_it, without = students
    assert [passes[id(layer)] for layer in with_it.model.layers] == [4, 4], "two steps of two micro-batches"
    assert not any(passes[id(layer)] for layer in without.model.layers)
    assert weights_equal(tmp_path / "true", tmp_path / "false")
