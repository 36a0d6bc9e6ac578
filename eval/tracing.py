"""Draws the frontiers of a report: the points that were asked for, and further ones where the entropy of real text lies.

What is read at matched entropy is read between two traced points. The nearer they are, the less it matters that a frontier is curved,
so each is refined: a point is drawn where those before it say that the entropy is the one of real text (`ReportConfig.refine`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from eval.cautions import teacher_temperature
from eval.config import System
from eval.decoding import Decoding
from eval.metrics import Array, pooled_entropy
from eval.study import Study
from eval.systems import Traced, further

Drawn = tuple[Array, Array]
"""(tokens int32 [S, L], forwards int [S])"""

_TEACHER = "teacher as a reference"


class Tracing:
    """The drawn points of one study. `wanted`: the entropy of real text, nats."""

    def __init__(self, study: Study, wanted: float):
        self.study, self.wanted = study, wanted
        self.drawn: dict[Traced, Drawn] = {}

    def systems(self) -> dict[str, list[list[Traced]]]:
        """Every system's frontiers, one a number of forwards."""
        for point in self.study.points:
            self.drawn[point] = self.study.sampled(point)
        found: dict[str, list[list[Traced]]] = {}
        for name, system in self.study.config.systems.items():
            points = [point for point in self.study.points if point.system == name]
            found[name] = [[point for point in points if point.nfe == nfe] for nfe in dict.fromkeys(point.nfe for point in points)]
            for frontier in found[name]:
                self._refine(system, frontier, self.study.sampled)
        return found

    def teacher(self) -> list[Traced]:
        """The teacher's own samples as they are, first, and those to read them at the entropy of real text; none without a teacher."""
        config = self.study.config
        if not config.teacher:
            return []

        def draw(point: Traced) -> Drawn:
            ids_SL = self.study.teacher_samples(point.decoding.temperature)
            return ids_SL, np.full(len(ids_SL), ids_SL.shape[1] - 1)

        as_it_is = teacher_temperature(self.study.heldout.manifest.identity)
        points = [Traced(_TEACHER, Decoding(1, as_it_is), 0)]
        self.drawn[points[0]] = draw(points[0])
        if config.refine:
            towards = as_it_is * (0.9 if self._entropy(points[0]) > self.wanted else 1.1)
            points.append(Traced(_TEACHER, Decoding(1, towards), 0))
            self.drawn[points[1]] = draw(points[1])
            self._refine(System(config.teacher, [as_it_is, towards]), points, draw)
        return points

    def _refine(self, system: System, frontier: list[Traced], draw: Callable[[Traced], Drawn]) -> None:
        """Draw further points of a frontier, and add them to it."""
        for _ in range(self.study.config.refine if system.swept else 0):
            point = further(system, frontier, [self._entropy(point) for point in frontier], self.wanted)
            if point is None:
                self.study.progress.skip(self.study.config.sequences, (frontier[0].nfe or 2) + self.study.judged)
            else:
                self.drawn[point] = draw(point)
                frontier.append(point)

    def _entropy(self, point: Traced) -> float:
        ids_SL, _ = self.drawn[point]
        return float(pooled_entropy(ids_SL, np.full(len(ids_SL), ids_SL.shape[1]), np.ones((1, len(ids_SL)), np.float32))[0])
