"""Samples of students of known languages -> every figure of truth.json.

    settings      what was asked for
    languages     name -> {about, sentences, tokens, vocab_size, entropy, limit, limit_accepted, seeds, summary}
      limit       nfe -> {valid, distance} of the best student without noise; exact numbers
      seeds       seed -> {teacher: {valid, distance}, systems: name -> {nfe: nfe -> {valid, distance}, reconstruction, accepted}, comparisons}
                  comparisons: [{nfe, system, against, valid, distance}], system minus against, paired; the limit is a constant
      summary     {floor, systems: name -> {nfe: nfe -> {valid, distance}, reconstruction, accepted}}: mean, lowest and highest of the seeds;
                  with every nfe {beats}: what the system is better than in every seed, with the whole interval, by figure

Figures of one seed are {value, low, high}: 95%, bootstrap over samples. valid: share of samples that are sentences. distance: total
variation between the joint of the samples and the truth; a finite sample overstates it, so the teacher's own samples (rollouts
from the same noise, as many) stand beside it as its floor, and its interval is the estimate and 1.96 standard deviations.
Of a student without noise both are computed, over all ways to write each sentence: value, low and high are equal.
reconstruction: share of held-out tokens that one call gives back from their noise. accepted: tokens of one call's draft that the
teacher accepts. Shapes: S samples, L positions, M sentences, R replicates + 1.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from eval.factorised import accepted, factorised, valid_and_distance
from eval.languages import LANGUAGES, Language, language
from eval.metrics import Array, Interval, bootstrap_weights
from eval.taught import LIMIT

if TYPE_CHECKING:
    from eval.truth import TruthConfig

FORMAT_VERSION = 1
FIGURES = ("valid", "distance")

Report = dict[str, Any]
Replicates = dict[str, Array]
"""figure -> float64 [R], the estimate first"""


@dataclass(frozen=True)
class Measured:
    """What one student did."""

    samples: dict[int, Array]
    """NFE -> tokens int32 [S, L], BOS first."""
    returned_S: Array
    """Share of each held-out row that one call gives back."""
    accepted_S: Array
    """Tokens of one call's draft that the teacher accepts."""
    computed: dict[int, list[float]] | None = None
    """NFE -> (valid, distance), exact, of a student without noise: its samples are not asked."""


Cells = dict[tuple[str, int, str], Measured]
"""(language, seed, system) -> what that student did"""


def report(config: TruthConfig, cells: Cells) -> Report:
    """Every figure."""
    return {
        "format_version": FORMAT_VERSION,
        "settings": asdict(config),
        "languages": {name: _of_language(config, name, cells) for name in config.languages},
    }


def _of_language(config: TruthConfig, name: str, cells: Cells) -> dict[str, Any]:
    known = language(name)
    limit = {nfe: dict(zip(FIGURES, valid_and_distance(known, factorised(known, nfe)), strict=True)) for nfe in config.nfe}
    seeds = {
        str(seed): _of_seed(config, known, seed, {system: cells[name, seed, system] for system in config.systems}, limit) for seed in config.seeds
    }
    return {
        "about": (LANGUAGES[name].__doc__ or "").strip(),
        "sentences": len(known.p_M),
        "tokens": known.length,
        "vocab_size": known.vocab_size,
        "entropy": known.entropy,
        LIMIT: {str(nfe): figures for nfe, figures in limit.items()},
        "limit_accepted": float(accepted(known, known.marginals[None])[0]),
        "seeds": seeds,
        "summary": _summary(config, list(seeds.values())),
    }


def _of_seed(config: TruthConfig, known: Language, seed: int, students: dict[str, Measured], limit: dict[int, dict[str, float]]) -> dict[str, Any]:
    weights_RS = bootstrap_weights(config.sequences, config.replicates, seed)
    teacher = replicates(known, known.rollout(torch.arange(config.sequences), known.length + 1, seed).numpy(), weights_RS)
    found = {(system, nfe): replicates(known, ids_SL, weights_RS) for system, student in students.items() for nfe, ids_SL in student.samples.items()}
    for system, student in students.items():
        for nfe, figures in (student.computed or {}).items():
            found[system, nfe] = {figure: np.full(len(weights_RS), value) for figure, value in zip(FIGURES, figures, strict=True)}
    constant = {(LIMIT, nfe): {figure: np.full(len(weights_RS), value) for figure, value in figures.items()} for nfe, figures in limit.items()}
    mean = functools.partial(_mean, config.replicates, seed)
    return {
        "teacher": _intervals(teacher),
        "systems": {
            system: {
                "nfe": {str(nfe): _intervals(found[system, nfe]) for nfe in config.nfe},
                "reconstruction": mean(student.returned_S),
                "accepted": mean(student.accepted_S),
            }
            for system, student in students.items()
        },
        "comparisons": [
            {"nfe": nfe, "system": system, "against": other, **_intervals(_difference(found[system, nfe], (found | constant)[other, nfe]))}
            for system in students
            for other in config.compared_with(system)
            for nfe in config.nfe
        ],
    }


def replicates(known: Language, ids_SL: Array, weights_RS: Array) -> Replicates:
    """Share of sentences among the samples, and total variation between their joint and the truth."""
    found_S = known.find(ids_SL[:, 1:])
    counts_RM = np.stack([np.bincount(found_S + 1, weights=weight_S, minlength=len(known.p_M) + 1)[1:] for weight_S in weights_RS])
    share_RM = counts_RM / len(ids_SL)
    return {"valid": share_RM.sum(1), "distance": np.maximum(known.p_M - share_RM, 0).sum(1)}


def _difference(ours: Replicates, theirs: Replicates) -> Replicates:
    return {figure: ours[figure] - theirs[figure] for figure in FIGURES}


def _intervals(statistics: Replicates) -> dict[str, Any]:
    return {"valid": asdict(Interval.of(statistics["valid"])), "distance": asdict(Interval.normal(statistics["distance"]))}


def _mean(count: int, seed: int, value_S: Array) -> dict[str, float]:
    return asdict(Interval.of(bootstrap_weights(len(value_S), count, seed).astype(np.float64) @ value_S / len(value_S)))


def _summary(config: TruthConfig, seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Over the seeds."""

    def at_nfe(system: str, nfe: int) -> dict[str, Any]:
        figures = {figure: _spread([seed["systems"][system]["nfe"][str(nfe)][figure]["value"] for seed in seeds]) for figure in FIGURES}
        return {**figures, "beats": {figure: _beaten(seeds, system, nfe, figure) for figure in FIGURES}}

    systems = {
        system: {
            "nfe": {str(nfe): at_nfe(system, nfe) for nfe in config.nfe},
            **{figure: _spread([seed["systems"][system][figure]["value"] for seed in seeds]) for figure in ("reconstruction", "accepted")},
        }
        for system in config.systems
    }
    return {"floor": _spread([seed["teacher"]["distance"]["value"] for seed in seeds]), "systems": systems}


def _spread(values: list[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "low": min(values), "high": max(values)}


def _beaten(seeds: list[dict[str, Any]], system: str, nfe: int, figure: str) -> list[str]:
    """What the system is better than in every seed, with the whole interval."""

    def better(line: dict[str, Any]) -> bool:
        return bool(line["valid"]["low"] > 0 if figure == "valid" else line["distance"]["high"] < 0)

    beaten = [{line["against"] for line in seed["comparisons"] if (line["system"], line["nfe"]) == (system, nfe) and better(line)} for seed in seeds]
    return sorted(set.intersection(*beaten))
