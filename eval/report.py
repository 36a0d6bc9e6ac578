"""report.json: every figure of a comparison, computed from the pieces of a study.

    settings         the resolved recipe
    warnings         what a reader must know, in words
    provenance       root hash of the held-out data, identities of judge, teacher and students
    real, teacher    figures of real held-out text, and of the teacher's own samples (null without a teacher)
    systems          name -> {student, noise, nfe -> {points: [figures + decoding], matched}}
                     matched: {perplexity, entropy, position, clamped}: the frontier read at the entropy of real text
    comparisons      [{nfe, system, against, ratio, matched, below_one, sentence}]: perplexity of system / against, both matched
    reconstruction   name -> nfe -> share of held-out tokens that come back; null where the data has no noise
    shown            [{sequence_id, real, teacher, systems: {name: text}}], with shown_nfe

Figures are {perplexity, entropy, sequence_entropy, distinct_1..3, sequences}; intervals are {value, low, high}: 95%,
percentile bootstrap over sequences. NFE keys are strings, as JSON wants them. Entropies are nats a token of the students.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from eval.config import ReportConfig
from eval.frontier import Frontier, Matched, match, ratio
from eval.metrics import Array, Interval, Scored, agreement, bootstrap_weights, distinct, log_perplexity, pooled_entropy, sequence_entropy
from eval.study import Study, Traced

Report = dict[str, Any]

FORMAT_VERSION = 1


def build(config: ReportConfig, show_progress: bool = True) -> Report:
    """Make the pieces that are missing and compute every figure. Interrupted at any moment, it continues when called again."""
    study = Study(config, show_progress)
    try:
        return _Builder(study).report()
    finally:
        study.progress.close()


class _Builder:
    def __init__(self, study: Study):
        self.study, self.config = study, study.config
        self.weights_RS = bootstrap_weights(self.config.sequences, self.config.replicates, self.config.seed)
        # real text is drawn independently of the samples, from the same generator family
        self.real_weights_RS = bootstrap_weights(len(study.real_SL), self.config.replicates, self.config.seed + 2**32)

    def report(self) -> Report:
        study, config = self.study, self.config
        real = study.scored("real", study.real_SL)
        self.real_entropy_R = pooled_entropy(real.ids_SL, real.length_S, self.real_weights_RS)
        self.teacher_SL = study.teacher_samples() if config.teacher else None
        teacher = study.scored("teacher", self.teacher_SL) if self.teacher_SL is not None else None
        scored = {point: study.scored(point.name, study.sampled(point)) for point in study.points}
        matched = {(name, nfe): self._match(_points(scored, name, nfe)) for name in config.systems for nfe in config.nfe}
        return {
            "format_version": FORMAT_VERSION,
            "settings": asdict(config),
            "warnings": study.warnings,
            "provenance": self._provenance(),
            "real": figures(real, self.real_weights_RS),
            "teacher": figures(teacher, self.weights_RS) if teacher is not None else None,
            "systems": {name: self._system(name, scored, matched) for name in config.systems},
            "comparisons": self._comparisons(matched),
            "reconstruction": self._reconstruction(),
            "shown_nfe": self._shown_nfe(),
            "shown": self._shown(scored),
        }

    def _provenance(self) -> dict[str, Any]:
        study = self.study
        students = {name: {"identity": study.identities[name], **_trained_on(student)} for name, student in study.students.items()}
        models = {"judge": study.judge_identity, "teacher": study.teacher_identity, "students": students}
        return {"heldout_root_hash": study.heldout.manifest.root_hash, **models}

    def _match(self, points: dict[Traced, Scored]) -> Matched:
        return match(Frontier.trace(list(points.values()), self.weights_RS), self.real_entropy_R)

    def _system(self, name: str, scored: dict[Traced, Scored], matched: dict[tuple[str, int], Matched]) -> dict[str, Any]:
        by_nfe = {}
        for nfe in self.config.nfe:
            points = [{**asdict(point.decoding), **self._point(value)} for point, value in _points(scored, name, nfe).items()]
            at = matched[name, nfe]
            entropy = asdict(Interval.of(self.real_entropy_R))
            by_nfe[str(nfe)] = {
                "points": points,
                "matched": {"perplexity": asdict(at.perplexity), "entropy": entropy, "position": at.position, "clamped": at.clamped},
            }
        return {"student": self.config.systems[name].student, "noise": asdict(self.study.students[name].noise), "nfe": by_nfe}

    def _point(self, scored: Scored) -> dict[str, Any]:
        found = figures(scored, self.weights_RS)
        if self.teacher_SL is not None:
            found["teacher_agreement"], found["teacher_prefix"] = agreement(scored.ids_SL, self.teacher_SL)
        return found

    def _comparisons(self, matched: dict[tuple[str, int], Matched]) -> list[dict[str, Any]]:
        config = self.config
        pairs = [(name, config.baseline) for name in config.systems if name != config.baseline]
        pairs += [(name, config.control) for name in config.systems if config.control and name not in (config.baseline, config.control)]
        return [compare(nfe, ours, theirs, matched[ours, nfe], matched[theirs, nfe]) for ours, theirs in pairs for nfe in config.nfe]

    def _reconstruction(self) -> dict[str, Any] | None:
        config, study = self.config, self.study
        if study.heldout.extraction == "none" or not config.reconstruction_rows:
            return None
        found: dict[str, Any] = {}
        for name in config.systems:
            found[name] = {}
            for nfe in config.nfe:
                share_S = study.reconstructed(name, nfe)
                weights = bootstrap_weights(len(share_S), config.replicates, config.seed)
                found[name][str(nfe)] = asdict(Interval.of(weights @ share_S / len(share_S)))
        return found

    def _shown_nfe(self) -> int:
        return min(self.config.nfe, key=lambda nfe: (abs(nfe - self.config.shown_nfe), nfe))

    def _shown(self, scored: dict[Traced, Scored]) -> list[dict[str, Any]]:
        """The same sequence ids, so the same noise, side by side; each system at the point nearest to real entropy."""
        if not self.config.shown:
            return []
        chosen = {}
        for name in self.config.systems:
            points = list(_points(scored, name, self._shown_nfe()).values())
            gaps = [abs(pooled_entropy(p.ids_SL, p.length_S, self.weights_RS[:1])[0] - self.real_entropy_R[0]) for p in points]
            chosen[name] = points[int(np.argmin(gaps))].ids_SL
        return [
            {
                "sequence_id": row,
                "real": self._text(self.study.real_SL, row),
                "teacher": self._text(self.teacher_SL, row) if self.teacher_SL is not None else None,
                "systems": {name: self._text(ids_SL, row) for name, ids_SL in chosen.items()},
            }
            for row in range(min(self.config.shown, len(self.study.real_SL)))
        ]

    def _text(self, ids_SL: Array, row: int) -> str:
        return str(self.study.tokenizer.decode(ids_SL[row, 1:].tolist(), skip_special_tokens=False))


def figures(scored: Scored, weights_RS: Array) -> dict[str, Any]:
    """Figures of one set of sequences, ready for JSON."""
    ids_SL, length_S = scored.ids_SL, scored.length_S
    perplexity = Interval.of(np.exp(log_perplexity(scored.nll_S, scored.tokens_S, weights_RS)))
    return {
        "perplexity": asdict(perplexity),
        "entropy": asdict(Interval.of(pooled_entropy(ids_SL, length_S, weights_RS))),
        "sequence_entropy": sequence_entropy(ids_SL, length_S),
        **{f"distinct_{n}": distinct(ids_SL, length_S, n) for n in (1, 2, 3)},
        "sequences": len(ids_SL),
    }


def compare(nfe: int, system: str, against: str, ours: Matched, theirs: Matched) -> dict[str, Any]:
    """The verdict on two systems at one NFE. Only where both frontiers hold the entropy of real text is it one."""
    found = ratio(ours, theirs)
    matched = ours.position == theirs.position == "inside"
    below_one = matched and found.high < 1
    figure = f"{found.value:.3f} (95% interval {found.low:.3f} to {found.high:.3f})"
    head = f"NFE {nfe}: perplexity of {system} / {against}"
    if not matched:
        outside = " and ".join(f"{at.position} what {name} traced" for name, at in ((system, ours), (against, theirs)) if at.position != "inside")
        sentence = f"{head} cannot be matched: the entropy of real text lies {outside}; at the nearest ends it is {figure}."
    elif below_one:
        sentence = f"{head} at the entropy of real text is {figure}: better, the whole interval is below 1."
    elif found.low > 1:
        sentence = f"{head} at the entropy of real text is {figure}: worse, the whole interval is above 1."
    else:
        sentence = f"{head} at the entropy of real text is {figure}: undecided, the interval holds 1."
    return {
        "nfe": nfe,
        "system": system,
        "against": against,
        "ratio": asdict(found),
        "matched": matched,
        "below_one": below_one,
        "sentence": sentence,
    }


def _points(scored: dict[Traced, Scored], name: str, nfe: int) -> dict[Traced, Scored]:
    return {point: value for point, value in scored.items() if point.system == name and point.decoding.nfe == nfe}


def _trained_on(student: Any) -> dict[str, Any]:
    return {name: student.provenance[name] for name in ("dataset", "root_hash") if name in student.provenance}
