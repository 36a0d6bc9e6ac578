"""report.md: the report for people. Verdicts first, then the figures behind them."""

from __future__ import annotations

from typing import Any

Report = dict[str, Any]


def markdown(report: Report, picture: str) -> str:
    """The whole page; `picture` is the file name of the plot beside it."""
    settings = report["settings"]
    parts = [
        "# Quality against function evaluations",
        _introduction(report),
        *(f"> **Note.** {warning}" for warning in report["warnings"]),
        f"![Perplexity at matched entropy, frontiers and reconstruction]({picture})",
        "## Perplexity at the entropy of real text",
        _table(["system", *(f"NFE {nfe}" for nfe in settings["nfe"])], [matched_row(name, system) for name, system in report["systems"].items()]),
        "Lower is better. † the entropy of real text lies outside what the system traced: the nearest end is shown, nothing is extrapolated.",
        "## Verdicts",
        "\n".join(f"- {line['sentence']}" for line in report["comparisons"]) or "One system, nothing to compare.",
    ]
    if report["reconstruction"] is not None:
        parts += ["## Noise to text", _RECONSTRUCTION, _reconstruction(report)]
    parts += ["## Every traced point", _points(report)]
    if report["shown"]:
        parts += [f"## The same noise, side by side (NFE {report['shown_nfe']})", *(_side_by_side(shown) for shown in report["shown"])]
    parts += ["## Where it comes from", _provenance(report)]
    return "\n\n".join(parts) + "\n"


_RECONSTRUCTION = (
    "All tokens of held-out rows masked, their posterior noise given: share of tokens that come back. This noise knows the text, so it measures the "
    "map from noise to text; it is not a likelihood, and says nothing of samples by itself. A system without noise shows what guessing gives."
)


def interval(value: dict[str, float], digits: int = 1) -> str:
    return f"{value['value']:.{digits}f} ({value['low']:.{digits}f}–{value['high']:.{digits}f})"


def _introduction(report: Report) -> str:
    settings, real, teacher = report["settings"], report["real"], report["teacher"]
    lines = [
        f"{settings['sequences']} sequences a figure, judged by `{settings['judge']}`; brackets are 95% bootstrap intervals over sequences. "
        "Perplexity can be bought with entropy, so every system is traced and read at the entropy of real text.",
        f"Real held-out text: {_reference(real)} nats a token.",
    ]
    if teacher is not None:
        lines.append(f"The teacher's own samples, one forward a token: {_reference(teacher)}.")
    return "  \n".join(lines)


def _reference(figures: dict[str, Any]) -> str:
    return f"perplexity {interval(figures['perplexity'])}, entropy {interval(figures['entropy'], 3)}"


def matched_row(name: str, system: dict[str, Any]) -> list[str]:
    """A system's name and its perplexity at each NFE at the entropy of real text; † where that was not traced."""
    cells = [interval(at["matched"]["perplexity"]) + ("" if at["matched"]["position"] == "inside" else " †") for at in system["nfe"].values()]
    return [name, *cells]


def _reconstruction(report: Report) -> str:
    head = ["system", *(f"NFE {nfe}" for nfe in report["settings"]["nfe"])]
    return _table(head, [[name, *(interval(value, 3) for value in by_nfe.values())] for name, by_nfe in report["reconstruction"].items()])


def _points(report: Report) -> str:
    head = [
        "system",
        "NFE",
        "temperature",
        "noise temperature",
        "perplexity",
        "entropy",
        "entropy in a sequence",
        "distinct-1",
        "distinct-2",
        "distinct-3",
    ]
    agreed = report["teacher"] is not None
    if agreed:
        head.append("as the teacher from this noise")
    rows = []
    for name, system in report["systems"].items():
        for nfe, at in system["nfe"].items():
            for point in at["points"]:
                temperature = "argmax" if point["output"] == "argmax" else f"{point['temperature']:g}"
                noise = "none" if system["noise"]["kind"] == "none" else f"{point['noise_temperature']:g}"
                rows.append([name, nfe, temperature, noise, *_figure_cells(point)] + ([f"{point['teacher_agreement']:.1%}"] if agreed else []))
    for name in ("teacher", "real"):
        if report[name] is not None:
            rows.append([name, "", "", "", *_figure_cells(report[name])] + ([""] if agreed else []))
    return _table(head, rows)


def _figure_cells(figures: dict[str, Any]) -> list[str]:
    distinct = [f"{figures[f'distinct_{n}']:.3f}" for n in (1, 2, 3)]
    return [interval(figures["perplexity"]), interval(figures["entropy"], 3), f"{figures['sequence_entropy']:.3f}", *distinct]


def _side_by_side(shown: dict[str, Any]) -> str:
    texts = [("real", shown["real"]), ("teacher", shown["teacher"]), *shown["systems"].items()]
    rows = [[name, _quoted(text)] for name, text in texts if text is not None]
    return f"Sequence {shown['sequence_id']}\n\n" + _table(["", "text"], rows)


def _quoted(text: str) -> str:
    """Text that stays text inside a Markdown table."""
    for special in "\\`*_{}[]<>#|~$":
        text = text.replace(special, "\\" + special)
    return text.replace("\r", " ").replace("\n", " ⏎ ")


def _provenance(report: Report) -> str:
    settings, provenance = report["settings"], report["provenance"]
    lines = [f"- held-out dataset `{settings['heldout']}`, root hash `{provenance['heldout_root_hash']}`", f"- judge `{settings['judge']}`"]
    if settings["teacher"]:
        lines.append(f"- teacher `{settings['teacher']}`")
    for name, system in report["systems"].items():
        trained = provenance["students"][name].get("root_hash")
        lines.append(f"- {name}: `{system['student']}`" + (f", trained on the dataset with root hash `{trained}`" if trained else ""))
    lines.append(f"- seed {settings['seed']}, {settings['replicates']} bootstrap replicates; everything else is in report.json")
    return "\n".join(lines)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(row) + " |" for row in rows)]
    return "\n".join(lines)
