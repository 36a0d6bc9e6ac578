"""What students of known languages do -> every figure of truth.json.

    settings      what was asked for
    languages     name -> {about, sentences, tokens, vocab_size, entropy, limit, limit_accepted, seeds, summary}
      limit       nfe -> {valid, distance} of the best student without noise; exact numbers
      seeds       seed -> {systems: name -> {nfe: nfe -> {valid, distance}, reconstruction, accepted}, comparisons}
                  comparisons: [{nfe, system, against, valid, distance}], system minus against
      summary     {systems: name -> {nfe: nfe -> {valid, distance}, reconstruction, accepted}}: mean, lowest and highest of the seeds;
                  with every nfe {beats}: what the system is better than in every seed, with the whole interval, by figure

Figures of one seed are {value, low, high}. valid: share of sentences among all that the student writes. distance: total
variation between the joint of what it writes and the truth. Of a student without noise both are exact, and the three are
equal; of one that reads noise they are integrated over it, low and high the bounds of that integral's error (95%, see
integrated). A difference of two goes from the least to the most that their bounds allow.
reconstruction: share of held-out tokens that one call gives back from their noise, 95% over rows. accepted: tokens of one call's
draft that the teacher accepts. Shapes: S values, M sentences, G groups of draws.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.factorised import accepted, factorised, valid_and_distance
from eval.integrated import distance, share_of_sentences
from eval.languages import LANGUAGES, Language, language
from eval.metrics import Array, Interval
from eval.taught import LIMIT

if TYPE_CHECKING:
    from eval.truth import TruthConfig

FORMAT_VERSION = 2
FIGURES = ("valid", "distance")

Report = dict[str, Any]
Figures = dict[str, Interval]


@dataclass(frozen=True)
class Measured:
    """What one student does."""

    written: dict[int, Array]
    """NFE -> probability of every sentence, float64 [G, M]; one group where it is exact."""
    returned_S: Array
    """Share of each held-out row that one call gives back."""
    accepted_S: Array
    """Tokens of one call's draft that the teacher accepts, by draw of noise; one value where it is exact."""


Cells = dict[tuple[str, int, str], Measured]
"""(language, seed, system) -> what that student does"""


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
    seeds = {str(seed): _of_seed(config, known, {system: cells[name, seed, system] for system in config.systems}, limit) for seed in config.seeds}
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


def _of_seed(config: TruthConfig, known: Language, students: dict[str, Measured], limit: dict[int, dict[str, float]]) -> dict[str, Any]:
    found = {(system, nfe): figures(known, q_GM) for system, student in students.items() for nfe, q_GM in student.written.items()}
    exact = {(LIMIT, nfe): {figure: Interval(value, value, value) for figure, value in at.items()} for nfe, at in limit.items()}
    return {
        "systems": {
            system: {
                "nfe": {str(nfe): _plain(found[system, nfe]) for nfe in config.nfe},
                "reconstruction": asdict(Interval.of_mean(student.returned_S)),
                "accepted": asdict(Interval.of_mean(student.accepted_S)),
            }
            for system, student in students.items()
        },
        "comparisons": [
            {"nfe": nfe, "system": system, "against": other, **_plain(_difference(found[system, nfe], (found | exact)[other, nfe]))}
            for system in students
            for other in config.compared_with(system)
            for nfe in config.nfe
        ],
    }


def figures(known: Language, q_GM: Array) -> Figures:
    """Share of sentences, and total variation between what is written and the truth."""
    return {"valid": share_of_sentences(q_GM), "distance": distance(known.p_M, q_GM)}


def _difference(ours: Figures, theirs: Figures) -> Figures:
    """Whatever the two errors have to do with each other."""
    return {
        figure: Interval(at.value - theirs[figure].value, at.low - theirs[figure].high, at.high - theirs[figure].low) for figure, at in ours.items()
    }


def _plain(found: Figures) -> dict[str, Any]:
    return {figure: asdict(at) for figure, at in found.items()}


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
    return {"systems": systems}


def _spread(values: list[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "low": min(values), "high": max(values)}


def _beaten(seeds: list[dict[str, Any]], system: str, nfe: int, figure: str) -> list[str]:
    """What the system is better than in every seed, with the whole interval."""

    def better(line: dict[str, Any]) -> bool:
        return bool(line["valid"]["low"] > 0 if figure == "valid" else line["distance"]["high"] < 0)

    beaten = [{line["against"] for line in seed["comparisons"] if (line["system"], line["nfe"]) == (system, nfe) and better(line)} for seed in seeds]
    return sorted(set.intersection(*beaten))
