"""The report for people, as blocks that render makes report.md and report.html of: verdicts first, then the figures behind them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eval.render import Block, Bullets, Details, Heading, Note, Paragraph, Picture, Table, Verbatim

Report = dict[str, Any]

_RECONSTRUCTION = (
    "All tokens of held-out rows masked, their posterior noise given: share of tokens that come back. This noise knows the text, so it measures the "
    "map from noise to text; it is not a likelihood, and says nothing of samples by itself. A system without noise shows what guessing gives."
)
_REPETITION = (
    "Means over sequences. Repeated: share of a row's n-grams that the row has had before. In loops: share of tokens in a segment that stands three "
    "times or more in a row. Length: tokens before the first end of a text, or of the row; ended: share of rows in which a text ends."
)


def blocks(report: Report, picture: Path) -> list[Block]:
    """The whole page. picture: the plot of the report."""
    parts: list[Block] = [
        Heading("Quality against function evaluations", 1),
        Paragraph(introduction(report)),
        *(Note(warning) for warning in report["warnings"]),
        Picture("Perplexity and MAUVE at matched entropy, frontiers and reconstruction", picture),
        Heading("Perplexity at the entropy of real text"),
        Table(["system", *columns(report)], [matched_row(report, name) for name in report["systems"]]),
        Paragraph(
            "Lower is better. † the entropy of real text lies outside what the system traced: the nearest end is shown, nothing is extrapolated."
        ),
    ]
    if report["settings"]["mauve"]["featuriser"]:
        parts += [Heading("MAUVE at the entropy of real text"), _mauve_table(report), Paragraph(_mauve_words(report))]
    if report["machine"]:
        parts += [Heading("Wall time"), _time_table(report), Paragraph(_time_words(report))]
    parts += [Heading("Verdicts"), Bullets([line["sentence"] for line in report["comparisons"]] or ["One system, nothing to compare."])]
    if report["reconstruction"] is not None:
        parts += [Heading("Noise to text"), Paragraph(_RECONSTRUCTION), _reconstruction(report), *_by_position(report)]
    parts += [Heading("Every traced point"), _points(report, _figure_cells, _FIGURES), Heading("Repetition and length"), Paragraph(_REPETITION)]
    parts.append(_points(report, _repetition_cells, _REPETITIONS))
    if report["shown"]:
        parts.append(Heading(f"The same noise, side by side (NFE {report['shown_nfe']})"))
        for shown in report["shown"]:
            parts += [Heading(f"Sequence {shown['sequence_id']}", 3), _side_by_side(shown)]
    return [*parts, Heading("Where it comes from"), *_provenance(report)]


def interval(value: dict[str, float], digits: int = 1) -> str:
    return f"{value['value']:.{digits}f} ({value['low']:.{digits}f}–{value['high']:.{digits}f})"


def columns(report: Report) -> list[str]:
    """Heads of the tables by NFE: every number that a scheduled system was asked for, and one for all that take their own."""
    found = {int(nfe) for system in report["systems"].values() if not system["free"] for nfe in system["nfe"]}
    free = any(system["free"] for system in report["systems"].values())
    return [f"NFE {nfe}" for nfe in sorted(found)] + (["its own NFE"] if free else [])


def matched_row(report: Report, name: str) -> list[str]:
    """A system's name and its perplexity at each NFE at the entropy of real text; † where that was not traced."""
    return _row(report, name, lambda at: interval(at["matched"]["perplexity"]) + ("" if at["matched"]["position"] == "inside" else " †"))


def _row(report: Report, name: str, cell: Any) -> list[str]:
    system = report["systems"][name]
    if system["free"]:
        ((nfe, at),) = system["nfe"].items()
        return [name, *[""] * (len(columns(report)) - 1), f"{cell(at)} at {nfe}"]
    return [name, *(cell(system["nfe"][head[4:]]) if head[4:] in system["nfe"] else "" for head in columns(report))]


def introduction(report: Report) -> str:
    """How its figures were made, and what real text and the teacher's have."""
    settings, real, teacher = report["settings"], report["real"], report["teacher"]
    lines = [
        f"{settings['sequences']} sequences a figure, judged by `{settings['judge']}`, past whose context a window slides by half of it; "
        "brackets are 95% bootstrap intervals over sequences. Perplexity can be bought with entropy, so every system is traced, and read and "
        "compared at the entropy of real text" + _refined(settings["refine"]) + ".",
        f"No sampler rejects or draws again (rate {report['rejected']:.0%}): all figures are of all samples.",
        f"Real held-out text: {_reference(real)} nats a token.",
    ]
    if teacher is not None:
        lines.append(f"The teacher's own samples, one forward a token: {_reference(teacher)}{teacher_matched(teacher)}.")
    return "  \n".join(lines)


def _reference(figures: dict[str, Any]) -> str:
    near = f", MAUVE {interval(figures['mauve'], 3)}" if "mauve" in figures else ""
    return f"perplexity {interval(figures['perplexity'])}, entropy {interval(figures['entropy'], 3)}{near}"


def _refined(points: int) -> str:
    return f", between points of which {points} of each frontier {'is' if points == 1 else 'are'} placed there where it can be" if points else ""


def teacher_matched(teacher: dict[str, Any]) -> str:
    """What the teacher's frontier says at the entropy of real text; nothing where it was not traced so far."""
    matched = teacher["matched"]
    if matched is None or matched["position"] != "inside":
        return ""
    near = f", MAUVE {interval(matched['mauve'], 3)}" if matched["mauve"] is not None else ""
    return f"; at the entropy of real text perplexity {interval(matched['perplexity'])}{near}"


def _mauve_table(report: Report) -> Table:
    def cell(at: dict[str, Any]) -> str:
        return interval(at["matched"]["mauve"], 3) + ("" if at["matched"]["position"] == "inside" else " †")

    return Table(["system", *columns(report)], [_row(report, name, cell) for name in report["systems"]])


def _mauve_words(report: Report) -> str:
    settings, of = report["settings"]["mauve"], report["settings"]
    clusters = settings["clusters"] or max(2, round(min(report["real"]["sequences"], of["sequences"]) / 10))
    feature = "last hidden state of the last token" if settings["pooling"] == "last" else "mean of the last hidden states"
    return (
        f"Higher is better. {of['sequences']} samples against {report['real']['sequences']} rows of real text; featuriser "
        f"`{settings['featuriser']}`, {feature}; {clusters} clusters, {settings['variance']:.0%} of the variance, scale {settings['scale']:g}, "
        f"seed {settings['seed']}, implementation `{settings['implementation']}`. Compare it only with figures of the same settings and counts; "
        "its intervals hold the clusters fixed."
    )


def _time_table(report: Report) -> Table:
    def cell(at: dict[str, Any]) -> str:
        return f"{1e3 * at['seconds']['value']:.3g} ({1e3 * at['seconds']['low']:.3g}–{1e3 * at['seconds']['high']:.3g})"

    return Table(["system, ms a sequence", *columns(report)], [_row(report, name, cell) for name in report["systems"]])


def _time_words(report: Report) -> str:
    machine = report["machine"]
    return (
        f"Of this machine alone: {machine['name']} ({machine['device']}, {machine['threads']} threads, torch {machine['torch']}), in batches of "
        f"{report['settings']['timing_rows']} sequences; median and extremes of the repetitions. Noise, forwards and choices are timed. "
        "What else ran on the machine is in it too."
    )


def _reconstruction(report: Report) -> Table:
    found = report["reconstruction"]
    heads = sorted({int(nfe) for by_nfe in found.values() for nfe in by_nfe})
    cells = {name: [interval(by_nfe[str(nfe)], 3) if str(nfe) in by_nfe else "" for nfe in heads] for name, by_nfe in found.items()}
    return Table(["system", *(f"NFE {nfe}" for nfe in heads)], [[name, *row] for name, row in cells.items()])


def _by_position(report: Report) -> list[Block]:
    """The same share along the row, at the fewest forwards and the most."""
    found = report["reconstruction_by_position"]
    first = next(iter(next(iter(found.values())).values()))
    heads = [str(part["first"]) if part["first"] == part["last"] else f"{part['first']}–{part['last']}" for part in first]
    rows = []
    for name, by_nfe in found.items():
        for nfe in dict.fromkeys((min(by_nfe, key=int), max(by_nfe, key=int))):
            rows.append([name, nfe, *(f"{part['share']['value']:.2f}" for part in by_nfe[nfe])])
    return [
        Paragraph("By position in the row, at the fewest and the most forwards (intervals are in report.json):"),
        Table(["system", "NFE", *heads], rows),
    ]


_FIGURES = ["perplexity", "entropy", "entropy in a sequence", "distinct-1", "distinct-2", "distinct-3"]
_REPETITIONS = ["repeated 2-grams", "repeated 3-grams", "repeated 4-grams", "in loops", "length, mean", "length, 5% to 95%", "ended"]


def _points(report: Report, cells: Any, heads: list[str]) -> Table:
    agreed = cells is _figure_cells and report["teacher"] is not None
    near = cells is _figure_cells and bool(report["settings"]["mauve"]["featuriser"])
    rows = []
    for name, system in report["systems"].items():
        for nfe, at in system["nfe"].items():
            for point in at["points"]:
                made = f"{point['forwards']['mean']:.4g}"
                own = [interval(point["mauve"], 3)] if near else []
                own += [f"{point['teacher_agreement']:.1%}"] if agreed else []
                rows.append([name, nfe + (f" ({made} made)" if made != nfe else ""), _decoding(system, point), *cells(point), *own])
    teacher = report["teacher"]["points"] if report["teacher"] is not None else []
    for name, point in [*(("teacher", point) for point in teacher), ("real", report["real"])]:
        own = [interval(point["mauve"], 3) if "mauve" in point else ""] if near else []
        decoding = f"temperature {point['temperature']:g}" if name == "teacher" else ""
        rows.append([name, "", decoding, *cells(point), *own, *([""] if agreed else [])])
    last = (["MAUVE"] if near else []) + (["as the teacher from this noise"] if agreed else [])
    return Table(["system", "NFE", "decoding", *heads, *last], rows)


def _decoding(system: dict[str, Any], point: dict[str, Any]) -> str:
    """What differs from sampling plainly."""
    parts = ["argmax" if point["output"] == "argmax" else f"temperature {point['temperature']:g}"]
    if system["noise"]["kind"] != "none":
        parts.append(f"noise temperature {point['noise_temperature']:g}" + (", fresh noise" if point["fresh_noise"] else ""))
    parts += [f"nucleus {point['nucleus']:g}"] if point["nucleus"] != 1 else []
    parts += [f"top-k {point['top_k']}"] if point["top_k"] else []
    parts += [point["order"]] if point["order"] != "random" else []
    parts += [point["sampler"]] if point["sampler"] != "even" else []
    return ", ".join(parts)


def _figure_cells(figures: dict[str, Any]) -> list[str]:
    return [
        interval(figures["perplexity"]),
        *(interval(figures[name], 3) for name in ("entropy", "sequence_entropy", *(f"distinct_{n}" for n in (1, 2, 3)))),
    ]


def _repetition_cells(figures: dict[str, Any]) -> list[str]:
    length = figures["length"]
    shares = [interval(figures[name], 3) for name in (*(f"repeated_{n}" for n in (2, 3, 4)), "looped")]
    spread = f"{length['quantiles']['5%']:g} to {length['quantiles']['95%']:g}"
    return [*shares, interval(length["mean"]), spread, interval(length["ended"], 3)]


def _side_by_side(shown: dict[str, Any]) -> Table:
    texts = [("real", shown["real"]), ("teacher", shown["teacher"]), *shown["systems"].items()]
    return Table(["", "text"], [[name, Verbatim(text)] for name, text in texts if text is not None])


def _provenance(report: Report) -> list[Block]:
    settings, provenance = report["settings"], report["provenance"]
    lines = [f"held-out dataset `{settings['heldout']}`, root hash `{provenance['heldout_root_hash']}`", f"judge `{settings['judge']}`"]
    if settings["teacher"]:
        lines.append(f"teacher `{settings['teacher']}`")
    folded: list[Block] = [Details("held-out dataset: identity", _json(provenance["heldout_identity"]))]
    for name, system in report["systems"].items():
        student = provenance["students"][name]
        trained = student.get("root_hash")
        lines.append(
            f"{name}: `{system['student']}`, kind {system['kind']}" + (f", trained on the dataset with root hash `{trained}`" if trained else "")
        )
        folded += [
            Details(f"{name}: recipe", _json(student["recipe"])),
            Details(f"{name}: identity of its dataset", _json(student["dataset_identity"])),
        ]
    lines.append(f"seed {settings['seed']}, {settings['replicates']} bootstrap replicates; everything else is in report.json")
    return [Bullets(lines), *folded]


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)
