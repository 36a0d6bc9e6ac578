"""Averaged weights (EMA): torch.optim.swa_utils over what is trained, and nothing else.

The average at step s takes the decay min(decay, (1 + s) / (10 + s)), so that it forgets the random start. Frozen weights
and buffers have no copy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class Average:
    """The average of a student's trained weights."""

    def __init__(self, student: nn.Module, decay: float):
        named = [(name, parameter) for name, parameter in student.named_parameters() if parameter.requires_grad]
        self._names, self._student = [name for name, _ in named], nn.ParameterList(parameter for _, parameter in named)
        self._decay, self._updates = decay, 0
        self._average = AveragedModel(self._student, multi_avg_fn=self._towards)

    def update(self) -> None:
        """After an optimizer step."""
        self._average.update_parameters(self._student)
        self._updates += 1

    @torch.no_grad()
    def _towards(self, averages: Sequence[Tensor], currents: Sequence[Tensor], _: Tensor | int) -> None:
        n = self._updates  # the third argument is the same number on the device, and to read it would be to wait
        torch._foreach_lerp_(list(averages), list(currents), 1 - min(self._decay, (1 + n) / (10 + n)))

    def state(self) -> dict[str, Tensor]:
        return dict(zip(self._names, (parameter.detach() for parameter in self._average.module.parameters()), strict=True))

    def load(self, state: dict[str, Tensor], step: int) -> None:
        """Continue from what `state` gave after that many steps."""
        with torch.no_grad():
            for name, tensor in self.state().items():
                tensor.copy_(state[name])
        self._average.n_averaged.fill_(step)
        self._updates = step

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the student has the averaged weights; no copy is made."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for own, average in zip(self._student.parameters(), self._average.module.parameters(), strict=True):
            own.data, average.data = average.data, own.data
