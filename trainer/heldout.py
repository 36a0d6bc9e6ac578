"""The held-out evaluation: loss a token with each row's own noise and, as a probe, with another row's.

A student that sees the dataset's own noise is told about the text by it. Its held-out loss is no bound on the likelihood and
ranks no students, which is said wherever it is printed. With another row's noise the loss is a bound (that noise knows nothing of the
row), but the least is reached by the student that trusts its noise least, so it ranks none either: `figure` refuses to choose one.
The distance between the two says whether the noise is used.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from trainer.chance import Chance
from trainer.data import NoiseDataset
from trainer.distributed import World
from trainer.students.base import Base

OTHER = "_other_noise"


class Heldout:
    """Some first rows of a held-out dataset, shared out over the processes."""

    def __init__(self, dataset: NoiseDataset, rows: int, seed: int, world: World, micro: int):
        self._dataset, self._rows, self._world, self._micro = dataset, min(rows, len(dataset)), world, micro
        self._chance = Chance(seed, 0, self._rows)

    @torch.no_grad()
    def figures(self, student: Base, autocast: Any) -> dict[str, float]:
        """The student's figures, nats a token; `autocast()` is the precision's context."""
        probes = (False, True) if student.noise.informed and self._rows > 1 else (False,)
        names = [name + (OTHER if other else "") for name in student.figure_names for other in probes]
        sums = {name: torch.zeros((), dtype=torch.float64, device=self._world.device) for name in names}
        tokens = 0
        for start in range(self._world.rank * self._micro, self._rows, self._world.size * self._micro):
            at = np.arange(start, min(start + self._micro, self._rows))
            batch = self._dataset.batch(at, 0, at)
            tokens += batch.tokens()
            batch = batch.to(self._world.device)
            for other in probes:
                neighbour = self._dataset.batch((at + 1) % self._rows).to(self._world.device) if other else None
                with autocast():
                    _, found = student(batch, self._chance, neighbour)
                for name in student.figure_names:
                    sums[name + (OTHER if other else "")] += found[name]
        own = torch.stack([*sums.values()]).tolist() if sums else []
        total, *values = self._world.sum([float(tokens), *own])
        return {name: value / total for name, value in zip(names, values, strict=True)}


def figure(student: Base, heldout: Heldout | None) -> str:
    """The held-out figure by which checkpoints of a student may be ranked. Raises ValueError where there is none."""
    if heldout is None:
        raise ValueError("keep_best is set, but data.heldout is empty, so no checkpoint is evaluated; set data.heldout, or drop keep_best")
    if student.noise.informed:
        raise ValueError(
            f"keep_best is set and student.noise.kind is {student.noise.kind}: that noise knows the held-out text, so its loss ranks nothing, and "
            "with another row's noise the student that ignores noise would win; drop keep_best and compare samples with `python -m eval`"
        )
    return student.figure_names[0]


def reminder(student: Base) -> str:
    return "  (posterior noise knows the text: no likelihood bound, choose nothing by it)" if student.noise.informed else ""
