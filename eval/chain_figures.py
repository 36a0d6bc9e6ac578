"""Samples of students of a known chain -> every figure of chain.json.

    settings, truth      what was asked for; truth is exact
    references           teacher (its own rollouts) and limit (exact marginals, what a student without noise tends to): name -> nfe -> figures
    systems              name -> {noise, outputs: output -> nfe -> {points: [decoding + figures], matched}}
                         matched: {valid, position, clamped}: the share of valid transitions where entropy is the teacher's, which is known exactly
    comparisons          [{nfe, system, output, against, position, valid, distance}], system minus against: valid shares at
                         matched entropy, and distances of pairs at the points traced first

Figures are {valid, entropy, rollout_prefix, pair_distance}, each {value, low, high}: 95%, bootstrap over sequences, paired
between systems. A distance of a finite sample is too large, and of its replicates more so, hence its interval is the
estimate and 1.96 standard deviations of the replicates; all others are percentiles.
Shapes: S sequences, L positions, V vocabulary, R replicates + 1.
"""

from __future__ import annotations

import functools
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from eval.frontier import Frontier, Matched, match
from eval.metrics import Array, Interval, bootstrap_weights, pooled_entropy
from eval.taught import LIMIT

if TYPE_CHECKING:
    from eval.chain import ChainConfig
    from eval.decoding import Decoding

FORMAT_VERSION = 1
_DISTANCE_REPLICATES = 200

Report = dict[str, Any]
Sets = dict[tuple[str, str], "dict[Decoding, Array]"]
"""(system, output) -> decoding -> tokens int32 [S, L]"""


def report(config: ChainConfig, sets: Sets, limit: dict[int, Array]) -> Report:
    """Every figure; `limit` holds the samples of exact marginals by NFE."""
    return _Figures(config, sets, limit).report()


class _Figures:
    def __init__(self, config: ChainConfig, sets: Sets, limit: dict[int, Array]):
        self.config, self.chain, self.sets, self.limit = config, config.chain, sets, limit
        self.weights_RS = bootstrap_weights(config.sequences, config.replicates, config.seed)
        self.possible_VV, self.joint_VV = (self.chain.transition > 0).numpy(), self.chain.joint.numpy()
        self.teacher_SL = self.chain.rollout(torch.arange(config.sequences), config.length + 1, config.seed).numpy()
        self.entropy_R = np.full(len(self.weights_RS), self.chain.entropy)

    def report(self) -> Report:
        config, chain = self.config, self.chain
        references = {
            "teacher": {str(config.length): self.figures(self.teacher_SL)},
            LIMIT: {str(nfe): self.figures(ids_SL) for nfe, ids_SL in self.limit.items()},
        }
        return {
            "format_version": FORMAT_VERSION,
            "settings": asdict(config),
            "truth": {"entropy": chain.entropy, "entropy_rate": chain.entropy_rate},
            "references": references,
            "systems": {name: self._system(name) for name in config.systems},
            "comparisons": [self._comparison(*key, nfe, other) for key in self.sets for other in config.compared_with(key[0]) for nfe in config.nfe],
        }

    def figures(self, ids_SL: Array) -> dict[str, Any]:
        """Share of valid transitions, entropy of a token, distance of the joint of adjacent tokens, tokens before the teacher is left."""
        same_SL = ids_SL[:, 1:] == self.teacher_SL[:, 1:]
        return {
            "valid": asdict(Interval.of(self._valid(ids_SL))),
            "entropy": asdict(Interval.of(self._entropy(ids_SL))),
            "rollout_prefix": asdict(Interval.of(self._mean(np.cumprod(same_SL, axis=1).sum(1)))),
            "pair_distance": asdict(Interval.normal(self._distance(ids_SL))),
        }

    def _mean(self, value_S: Array) -> Array:
        return np.asarray(self.weights_RS.astype(np.float64) @ value_S / len(value_S))

    def _valid(self, ids_SL: Array) -> Array:
        return self._mean(self.possible_VV[ids_SL[:, 1:-1], ids_SL[:, 2:]].mean(1))

    def _entropy(self, ids_SL: Array) -> Array:
        return pooled_entropy(ids_SL, np.full(len(ids_SL), ids_SL.shape[1]), self.weights_RS)

    def _distance(self, ids_SL: Array) -> Array:
        return pair_distance(ids_SL, self.joint_VV, self.weights_RS[: _DISTANCE_REPLICATES + 1])

    def _match(self, points: list[Array]) -> Matched:
        # the frontier's quality is here the share of valid transitions, where text has a log-perplexity
        frontier = Frontier(np.stack([self._entropy(ids) for ids in points]), np.stack([self._valid(ids) for ids in points]))
        return match(frontier, self.entropy_R)

    @functools.cache  # noqa: B019 (lives as long as one report)
    def _matched(self, name: str, output: str, nfe: int) -> Matched:
        if name == LIMIT:
            return self._match([self.limit[nfe]])
        return self._match(list(self._points(name, output, nfe).values()))

    def _points(self, name: str, output: str, nfe: int) -> dict[Decoding, Array]:
        return {decoding: ids_SL for decoding, ids_SL in self.sets[name, output].items() if decoding.nfe == nfe}

    def _first(self, name: str, output: str, nfe: int) -> Array:
        """The samples of the point that was traced first."""
        return self.limit[nfe] if name == LIMIT else next(iter(self._points(name, output, nfe).values()))

    def _system(self, name: str) -> dict[str, Any]:
        outputs = {output: {str(nfe): self._at(name, output, nfe) for nfe in self.config.nfe} for output in self.config.outputs(name)}
        return {"noise": asdict(self.config.systems[name]), "outputs": outputs}

    def _at(self, name: str, output: str, nfe: int) -> dict[str, Any]:
        at = self._matched(name, output, nfe)
        points = [{**asdict(decoding), **self.figures(ids_SL)} for decoding, ids_SL in self._points(name, output, nfe).items()]
        matched = {"valid": asdict(Interval.of(at.value_R)), "position": at.position, "clamped": at.clamped}
        return {"points": points, "matched": matched}

    def _comparison(self, name: str, output: str, nfe: int, other: str) -> dict[str, Any]:
        ours, theirs = self._matched(name, output, nfe), self._matched(other, "sample", nfe)
        valid = Interval.of(ours.value_R - theirs.value_R)
        distance = Interval.normal(self._distance(self._first(name, output, nfe)) - self._distance(self._first(other, "sample", nfe)))
        line = {"nfe": nfe, "system": name, "output": output, "against": other, "position": ours.position}
        return {**line, "valid": asdict(valid), "distance": asdict(distance)}


def pair_distance(ids_SL: Array, joint_VV: Array, weights_RS: Array | None = None) -> Array:
    """Total variation between the pooled joint of adjacent tokens after BOS and the true one, float64 [R]; not 0 for a finite exact sample."""
    width, pairs = len(joint_VV), ids_SL.shape[1] - 2
    code = ids_SL[:, 1:-1].ravel().astype(np.int64) * width + ids_SL[:, 2:].ravel()
    weights_RS = np.ones((1, len(ids_SL))) if weights_RS is None else weights_RS
    found = []
    for weight_S in weights_RS:
        count = np.bincount(code, weights=np.repeat(weight_S, pairs), minlength=width * width)
        found.append(np.abs(count / count.sum() - joint_VV.ravel()).sum() / 2)
    return np.array(found)
