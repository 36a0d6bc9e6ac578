"""report.json: every figure of a comparison, computed from the pieces of a study.

    settings         the resolved recipe
    warnings         what a reader must know, in words
    provenance       root hash and identity of the held-out data, identities of judge, teacher and students, each student's recipe and dataset
    machine          what the wall times were measured on; null without them
    real, teacher    figures of real held-out text, and of the teacher's own samples (null without a teacher), as they are; teacher too has
                     points and matched (refine 0: no points but that one, and null)
    systems          name -> {student, kind, noise, free, nfe -> {points: [figures + decoding + forwards], matched, seconds}}
                     matched: {perplexity, entropy, position, clamped, mauve, distinct_1..3}: the frontier read at the entropy of real text
                     seconds: wall time of a sequence in a batch, {value: median, low, high: extremes of the repetitions}
    comparisons      [{nfe, system, against, against_nfe, ratio, matched, below_one, sentence}]: perplexity of system / against, both matched
    reconstruction   name -> nfe -> share of held-out tokens that come back; null where the data has no noise
    reconstruction_by_position   name -> nfe -> [{first, last, share}], beside it
    shown            [{sequence_id, real, teacher, systems: {name: text}}], with shown_nfe
    rejected         share of samples that were drawn again or left out: 0, as no sampler does either; figures are of all samples

Figures are {perplexity, entropy, sequence_entropy, distinct_1..3, repeated_2..4, looped, length, sequences} and, beside a
featuriser, mauve; intervals are {value, low, high}: 95%, percentile bootstrap over sequences (jackknife for distinct, see
mauve for its own). A free system takes the forwards that it takes, and stands at their mean. NFE keys are strings, as JSON
wants them. Entropies are nats a token of the students.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from eval import mauve
from eval.cautions import cautions
from eval.config import ReportConfig, System
from eval.frontier import Frontier, Matched, match, ratio
from eval.metrics import Array, Interval, Scored, agreement, bootstrap_weights, distinct, log_perplexity, mean, pooled_entropy, sequence_entropy
from eval.reconstruct import by_position, shares
from eval.repetition import looped, repeated, written
from eval.study import Study
from eval.systems import Traced, is_free
from eval.tracing import Tracing

Report = dict[str, Any]

FORMAT_VERSION = 2


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
        self.ends = {token for token in (study.bos, study.tokenizer.eos_token_id) if token is not None}

    def report(self) -> Report:
        study, config = self.study, self.config
        real = study.scored("real", study.real_SL)
        self.real_entropy_R = pooled_entropy(real.ids_SL, real.length_S, self.real_weights_RS)
        tracing = Tracing(study, float(self.real_entropy_R[0]))
        teacher, groups, self.drawn = tracing.teacher(), tracing.systems(), tracing.drawn
        self.teacher_SL = self.drawn[teacher[0]][0] if teacher else None
        self.scored = {point: study.scored(point.name, ids_SL) for point, (ids_SL, _) in self.drawn.items()}
        self.mauve = {point: self._mauve(point.name, scored) for point, scored in self.scored.items()} if config.mauve.featuriser else {}
        self.points = {name: self._by_nfe(groups[name]) for name in config.systems}
        self.matched = {(name, nfe): self._match(points) for name, by_nfe in self.points.items() for nfe, points in by_nfe.items()}
        rebuilt = self._reconstruction()
        return {
            "format_version": FORMAT_VERSION,
            "settings": asdict(config),
            "warnings": study.left_out + cautions(config, study.heldout, len(study.real_SL), study.judge_identity, study.teacher_identity),
            "provenance": self._provenance(),
            "machine": study.machine if config.timing_rows else None,
            "real": self._figures(real, self.real_weights_RS),
            "teacher": self._teacher(teacher) if teacher else None,
            "systems": {name: self._system(name) for name in config.systems},
            "comparisons": self._comparisons(),
            "reconstruction": {name: {nfe: at["share"] for nfe, at in by_nfe.items()} for name, by_nfe in rebuilt.items()} or None,
            "reconstruction_by_position": {name: {nfe: at["positions"] for nfe, at in by_nfe.items()} for name, by_nfe in rebuilt.items()} or None,
            "shown_nfe": self._shown_nfe(),
            "shown": self._shown(),
            "rejected": 0.0,
        }

    def _teacher(self, points: list[Traced]) -> dict[str, Any]:
        found = [self._figures(self.scored[point], self.weights_RS, self.mauve.get(point)) for point in points]
        shown = [{"temperature": point.decoding.temperature, **figures} for point, figures in zip(points, found, strict=True)]
        return {**found[0], "points": shown, "matched": self._read(*self._match(points), found) if len(points) > 1 else None}

    def _by_nfe(self, frontiers: list[list[Traced]]) -> dict[str, list[Traced]]:
        """The points of one system at each number of forwards; a free system's is the mean of what it made."""
        own = round(float(np.mean([self.drawn[point][1].mean() for frontier in frontiers for point in frontier])))
        return {str(frontier[0].nfe or own): frontier for frontier in frontiers}

    def _provenance(self) -> dict[str, Any]:
        study = self.study
        students = {name: {"identity": study.identities[name], **_trained_on(student)} for name, student in study.students.items()}
        models = {"judge": study.judge_identity, "teacher": study.teacher_identity, "students": students}
        return {"heldout_root_hash": study.heldout.manifest.root_hash, "heldout_identity": study.heldout.manifest.identity, **models}

    def _match(self, points: list[Traced]) -> tuple[Matched, dict[str, Any] | None]:
        """The frontier of log-perplexity, and of MAUVE, at the entropy of real text."""
        frontier = Frontier.trace([self.scored[point] for point in points], self.weights_RS)
        if not self.mauve:
            return match(frontier, self.real_entropy_R), None
        kept = min(1 + mauve.REPLICATES, frontier.entropy_PR.shape[1])
        values_PR = np.stack([self.mauve[point][:kept] for point in points])
        at = match(Frontier(frontier.entropy_PR[:, :kept], values_PR), self.real_entropy_R[:kept])
        return match(frontier, self.real_entropy_R), asdict(mauve.interval(at.value_R))

    def _mauve(self, name: str, scored: Scored) -> Array:
        return mauve.replicates(self.study.mauve(name, scored.ids_SL), self.config.mauve)

    def _system(self, name: str) -> dict[str, Any]:
        study, system, by_nfe = self.study, self.config.systems[name], {}
        for nfe, points in self.points[name].items():
            at, near = self.matched[name, nfe]
            found = [self._point(point) for point in points]
            matched = self._read(at, near, found)
            seconds = _spread(study.seconds(points[0])) if self.config.timing_rows else None
            shown = [{**asdict(point.decoding), **figures} for point, figures in zip(points, found, strict=True)]
            by_nfe[nfe] = {"points": shown, "matched": matched, "seconds": seconds}
        student = study.students[name]
        about = {"student": system.student, "kind": student.config.kind, "noise": asdict(student.noise), "free": is_free(system, student)}
        return {**about, "nfe": by_nfe}

    def _read(self, at: Matched, near: dict[str, Any] | None, figures: list[dict[str, Any]]) -> dict[str, Any]:
        """A frontier at the entropy of real text: its perplexity and MAUVE, and its points' other figures."""
        entropy = asdict(Interval.of(self.real_entropy_R))
        matched = {"perplexity": asdict(at.perplexity), "entropy": entropy, "position": at.position, "clamped": at.clamped, "mauve": near}
        return matched | {name: _interval_at(figures, name, self.real_entropy_R[0]) for name in ("distinct_1", "distinct_2", "distinct_3")}

    def _point(self, point: Traced) -> dict[str, Any]:
        scored, made_S = self.scored[point], self.drawn[point][1]
        found = self._figures(scored, self.weights_RS, self.mauve.get(point))
        found["forwards"] = {"mean": float(made_S.mean()), "least": int(made_S.min()), "most": int(made_S.max())}
        if self.teacher_SL is not None:
            found["teacher_agreement"], found["teacher_prefix"] = agreement(scored.ids_SL, self.teacher_SL)
        return found

    def _figures(self, scored: Scored, weights_RS: Array, mauve_R: Array | None = None) -> dict[str, Any]:
        found = figures(scored, weights_RS, self.ends)
        if mauve_R is not None:
            found["mauve"] = asdict(mauve.interval(mauve_R))
        return found

    def _comparisons(self) -> list[dict[str, Any]]:
        """Each system with the baseline and the control, at the same number of forwards or, of free systems, each at its own; and all with those of
        one forward a token."""
        config, systems = self.config, self.config.systems
        causal = [name for name in systems if self.study.students[name].config.kind == "ar"]
        free = {name for name in systems if is_free(systems[name], self.study.students[name])}
        pairs = [(name, config.baseline) for name in systems if name != config.baseline]
        pairs += [(name, config.control) for name in systems if config.control and name not in (config.baseline, config.control)]
        found = [
            compare(int(nfe), ours, theirs, self.matched[ours, nfe][0], self.matched[theirs, nfe][0])
            for ours, theirs in pairs if not free & {ours, theirs} for nfe in self.points[ours] if nfe in self.points[theirs]
        ]  # fmt: skip
        own = free_pairs(systems, [name for name in systems if name in free and name not in causal], pairs)
        return found + [
            compare(int(nfe), ours, theirs, self.matched[ours, nfe][0], self.matched[theirs, at][0], int(at))
            for ours, theirs in [*own, *((ours, theirs) for theirs in causal for ours in systems if ours not in causal)]
            for nfe in self.points[ours] for at in self.points[theirs]
        ]  # fmt: skip

    def _reconstruction(self) -> dict[str, dict[str, dict[str, Any]]]:
        config, study = self.config, self.study
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for name in config.systems if config.reconstruction_rows else ():
            for nfe in study.rebuilt_at(name):
                same_SL = study.reconstructed(name, nfe)
                weights_RS = bootstrap_weights(len(same_SL), config.replicates, config.seed)
                share = asdict(mean(shares(same_SL), weights_RS))
                found.setdefault(name, {})[str(nfe)] = {"share": share, "positions": by_position(same_SL, weights_RS)}
        return found

    def _shown_nfe(self) -> int:
        return min(self.config.nfe, key=lambda nfe: (abs(nfe - self.config.shown_nfe), nfe))

    def _shown(self) -> list[dict[str, Any]]:
        """The same sequence ids, so the same noise, side by side; each system at the point nearest to real entropy."""
        if not self.config.shown:
            return []
        chosen = {}
        for name, by_nfe in self.points.items():
            nfe = min(by_nfe, key=lambda nfe: (abs(int(nfe) - self._shown_nfe()), int(nfe)))
            points = [self.scored[point] for point in by_nfe[nfe]]
            gaps = [abs(pooled_entropy(p.ids_SL, p.length_S, self.weights_RS[:1])[0] - self.real_entropy_R[0]) for p in points]
            label = name if nfe == str(self._shown_nfe()) else f"{name}, NFE {nfe}"
            chosen[label] = points[int(np.argmin(gaps))].ids_SL
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


def _interval_at(points: list[dict[str, Any]], figure: str, entropy: float) -> dict[str, float]:
    """A figure's estimate and both ends of its interval between the traced points, where the entropy is this one."""
    entropy_P3 = np.array([[point["entropy"]["value"]] * 3 for point in points])
    ends_P3 = np.array([[point[figure][end] for end in ("value", "low", "high")] for point in points])
    return asdict(Interval(*match(Frontier(entropy_P3, ends_P3), np.full(3, entropy)).value_R.tolist()))


def free_pairs(systems: dict[str, System], free: list[str], pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Which free systems are compared: those of `pairs` (ours, reference), and ours with what its sampler writes of the reference's student."""
    found: dict[tuple[str, str], None] = {}
    for ours, reference in pairs:
        for theirs in free if ours in free else []:
            one, other = systems[ours], systems[theirs]
            stands_in = one.sampler == other.sampler and other.student == systems[reference].student != one.student
            if (theirs == reference or stands_in) and (theirs, ours) not in found:
                found[ours, theirs] = None
    return list(found)


def figures(scored: Scored, weights_RS: Array, ends: set[int]) -> dict[str, Any]:
    """Figures of one set of sequences, ready for JSON; `ends`: the tokens that end a text."""
    ids_SL, length_S = scored.ids_SL, scored.length_S
    perplexity = Interval.of(np.exp(log_perplexity(scored.nll_S, scored.tokens_S, weights_RS)))
    return {
        "perplexity": asdict(perplexity),
        "entropy": asdict(Interval.of(pooled_entropy(ids_SL, length_S, weights_RS))),
        "sequence_entropy": asdict(mean(sequence_entropy(ids_SL, length_S), weights_RS)),
        **{f"distinct_{n}": asdict(distinct(ids_SL, length_S, n)) for n in (1, 2, 3)},
        **{f"repeated_{n}": asdict(mean(repeated(ids_SL, length_S, n), weights_RS)) for n in (2, 3, 4)},
        "looped": asdict(mean(looped(ids_SL, length_S), weights_RS)),
        "length": _lengths(*written(ids_SL, length_S, ends), weights_RS),
        "sequences": len(ids_SL),
    }


def _lengths(length_S: Array, ended_S: Array, weights_RS: Array) -> dict[str, Any]:
    """Tokens before the first end of a text: their mean and quantiles, and the share of rows that come to an end."""
    quantiles = {f"{q}%": float(np.quantile(length_S, q / 100)) for q in (5, 25, 50, 75, 95)}
    return {"mean": asdict(mean(length_S, weights_RS)), "quantiles": quantiles, "ended": asdict(mean(ended_S, weights_RS))}


def _spread(seconds: Array) -> dict[str, float]:
    return {"value": float(np.median(seconds)), "low": float(seconds.min()), "high": float(seconds.max())}


def compare(nfe: int, system: str, against: str, ours: Matched, theirs: Matched, against_nfe: int | None = None) -> dict[str, Any]:
    """The verdict on two systems at one NFE, or at one each. Only where both frontiers hold the entropy of real text is it one."""
    found = ratio(ours, theirs)
    matched = ours.position == theirs.position == "inside"
    below_one = matched and found.high < 1
    figure = f"{found.value:.3f} (95% interval {found.low:.3f} to {found.high:.3f})"
    head = f"NFE {nfe}: perplexity of {system} / {against}" + (f" at its NFE {against_nfe}" if against_nfe is not None else "")
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
        "against_nfe": nfe if against_nfe is None else against_nfe,
        "ratio": asdict(found),
        "matched": matched,
        "below_one": below_one,
        "sentence": sentence,
    }


def _trained_on(student: Any) -> dict[str, Any]:
    provenance = {name: student.provenance[name] for name in ("dataset", "root_hash") if name in student.provenance}
    return {**provenance, "dataset_identity": student.provenance.get("identity"), "recipe": student.recipe}
