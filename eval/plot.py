"""report.png: perplexity and MAUVE at matched entropy against forwards and wall time, the frontiers behind them, and noise to text."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from noise.storage import atomic_file

Report = dict[str, Any]

_COLOURS = ("#4c4c4c", "#c1272d", "#2a6fbb", "#e0912f", "#3d8c5c", "#7d5ba6", "#8c6d46", "#d16ba5")
_MARKS = "osD^vP*X"


def draw(report: Report, path: Path) -> None:
    """Draw the report's panels into a PNG, atomically."""
    from matplotlib.figure import Figure

    panels = _panels(report)
    across = 4 if len(panels) in (4, 7, 8) else min(3, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(5.6 * across, 4.6 * down), dpi=110, layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flatten()
    colours = {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(report["systems"])}
    for axis, panel in zip(axes, panels, strict=False):
        panel(axis, report, colours)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    with atomic_file(path) as file:
        file.write(buffer.getvalue())


def _panels(report: Report) -> list[Callable[[Any, Report, dict[str, str]], None]]:
    near = bool(report["settings"]["mauve"]["featuriser"])
    panels: list[Any] = [functools.partial(_matched, figure="perplexity", against="nfe")]
    panels += [functools.partial(_matched, figure="perplexity", against="seconds")] if report["machine"] else []
    panels.append(functools.partial(_frontiers, figure="perplexity"))
    panels += [functools.partial(_matched, figure="mauve", against="nfe"), functools.partial(_frontiers, figure="mauve")] if near else []
    panels += [_reconstruction, _by_position] if report["reconstruction"] is not None else []
    return panels


def _matched(axis: Any, report: Report, colours: dict[str, str], figure: str, against: str) -> None:
    """At the entropy of real text, against forwards or seconds; a system that takes its own number is one point."""
    for name, system in report["systems"].items():
        at = [(_place(nfe, at, against), at["matched"]) for nfe, at in sorted(system["nfe"].items(), key=lambda pair: int(pair[0]))]
        x = [place for place, _ in at]
        axis.plot(x, [m[figure]["value"] for _, m in at], color=colours[name], label=name, zorder=3)
        banded = len(x) > 1 and against == "nfe"  # more forwards may take less time, where the machine is busy
        if banded:
            axis.fill_between(x, *([m[figure][end] for _, m in at] for end in ("low", "high")), color=colours[name], alpha=0.2, lw=0)
        for place, m in at:
            low, high = (abs(m[figure][end] - m[figure]["value"]) for end in ("low", "high"))
            face = colours[name] if m["position"] == "inside" else "white"
            axis.errorbar(place, m[figure]["value"], None if banded else [[low], [high]], fmt="o", color=colours[name], mfc=face, zorder=4)
    for name, style in (("teacher", "--"), ("real", ":")):
        if report[name] is not None and figure in report[name]:
            line, label = _line(report, name)
            axis.axhline(line[figure]["value"], color="black", ls=style, lw=1, label=label)
    _nfe_axis(axis, report) if against == "nfe" else _seconds_axis(axis, report)
    _value_axis(axis, figure)
    hollow = any(at["matched"]["position"] != "inside" for system in report["systems"].values() for at in system["nfe"].values())
    what = "Perplexity" if figure == "perplexity" else "MAUVE"
    axis.set_title(f"{what} at the entropy of real text" + (" (hollow: nearest traced end)" if hollow else ""), fontsize=10)
    axis.legend(fontsize=8, frameon=False)


def _line(report: Report, name: str) -> tuple[dict[str, Any], str]:
    """The figures of real text, or of the teacher where its entropy is that of real text and else as it is, and what to call them."""
    found, matched = report[name], report[name].get("matched")
    if name == "teacher" and matched is not None and matched["position"] == "inside":
        return matched, "the teacher, a forward a token"
    entropy = f"{found['entropy']['value']:.2f} nats"
    return found, f"the teacher's samples as they are ({entropy})" if name == "teacher" else f"real text ({entropy})"


def _place(nfe: str, at: dict[str, Any], against: str) -> float:
    return float(nfe) if against == "nfe" else 1e3 * float(at["seconds"]["value"])


def _frontiers(axis: Any, report: Report, colours: dict[str, str], figure: str) -> None:
    keys = _all_nfe(report)
    marks = {nfe: _MARKS[number % len(_MARKS)] for number, nfe in enumerate(keys)}
    for name, system in report["systems"].items():
        for nfe, at in system["nfe"].items():
            points = sorted((point["entropy"]["value"], point[figure]["value"]) for point in at["points"])
            axis.plot(*zip(*points, strict=True), color=colours[name], marker=marks[int(nfe)], ms=4, lw=1, alpha=0.85)
    for nfe in keys:
        axis.plot([], [], color="grey", marker=marks[nfe], ms=4, ls="", label=f"NFE {nfe}")
    axis.axvline(report["real"]["entropy"]["value"], color="black", ls=":", lw=1)
    teacher = report["teacher"]["points"] if report["teacher"] is not None else []
    for name, mark, of in (("real", "*", [report["real"]]), ("teacher", "P", teacher)):
        points = sorted((point["entropy"]["value"], point[figure]["value"]) for point in of if figure in point)
        if points:
            axis.plot(*zip(*points, strict=True), mark, color="black", ms=9, ls="-" if len(points) > 1 else "", lw=1, label=name)
    axis.set_xlabel("token entropy, nats")
    _value_axis(axis, figure)
    axis.set_title("Frontiers: " + ("perplexity" if figure == "perplexity" else "MAUVE") + " against entropy", fontsize=10)
    axis.legend(fontsize=7, frameon=False)


def _reconstruction(axis: Any, report: Report, colours: dict[str, str]) -> None:
    for name, by_nfe in report["reconstruction"].items():
        nfe, shares = [int(key) for key in by_nfe], list(by_nfe.values())
        axis.plot(nfe, [share["value"] for share in shares], "o-", color=colours[name], label=name)
        axis.fill_between(nfe, *([share[end] for share in shares] for end in ("low", "high")), color=colours[name], alpha=0.2, lw=0)
    _nfe_axis(axis, report)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("share of held-out tokens returned")
    axis.set_title("Noise to text: held-out rows from their noise", fontsize=10)
    axis.legend(fontsize=8, frameon=False)


def _by_position(axis: Any, report: Report, colours: dict[str, str]) -> None:
    for name, by_nfe in report["reconstruction_by_position"].items():
        for nfe, style in ((min(by_nfe, key=int), "-"), (max(by_nfe, key=int), "--")):
            parts = by_nfe[nfe]
            x = [(part["first"] + part["last"]) / 2 for part in parts]
            axis.plot(x, [part["share"]["value"] for part in parts], style, color=colours[name], label=f"{name}, NFE {nfe}")
            if style == "-":
                ends = ([part["share"][end] for part in parts] for end in ("low", "high"))
                axis.fill_between(x, *ends, color=colours[name], alpha=0.15, lw=0)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("position in the row")
    axis.set_ylabel("share of held-out tokens returned")
    axis.set_title("Noise to text along the row", fontsize=10)
    axis.legend(fontsize=7, frameon=False)


def _all_nfe(report: Report) -> list[int]:
    return sorted({int(nfe) for system in report["systems"].values() for nfe in system["nfe"]})


def _nfe_axis(axis: Any, report: Report) -> None:
    nfe = _all_nfe(report)
    axis.set_xscale("log", base=2)
    axis.set_xticks(nfe, [str(value) for value in nfe])
    axis.minorticks_off()
    axis.set_xlabel("function evaluations (NFE)")


def _seconds_axis(axis: Any, report: Report) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel(f"ms a sequence on this machine, batches of {report['settings']['timing_rows']}")


def _value_axis(axis: Any, figure: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.grid(alpha=0.25)
    if figure == "mauve":
        axis.set_ylim(0, 1.02)
        axis.set_ylabel("MAUVE against real text")
        return
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 1.5, 2, 3, 5, 7)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_ylabel("generative perplexity")
