"""report.png: perplexity at matched entropy against NFE, the frontiers behind it, and noise to text."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from noise.storage import atomic_file

Report = dict[str, Any]

_COLOURS = ("#4c4c4c", "#c1272d", "#2a6fbb", "#e0912f", "#3d8c5c", "#7d5ba6")
_MARKS = "osD^vP*X"


def draw(report: Report, path: Path) -> None:
    """Draw the report's panels into a PNG, atomically."""
    from matplotlib.figure import Figure

    panels = 2 + (report["reconstruction"] is not None)
    figure = Figure(figsize=(5.6 * panels, 4.6), dpi=110, layout="constrained")
    axes = figure.subplots(1, panels)
    colours = {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(report["systems"])}
    _against_nfe(axes[0], report, colours)
    _frontiers(axes[1], report, colours)
    if report["reconstruction"] is not None:
        _reconstruction(axes[2], report, colours)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    with atomic_file(path) as file:
        file.write(buffer.getvalue())


def _against_nfe(axis: Any, report: Report, colours: dict[str, str]) -> None:
    for name, system in report["systems"].items():
        nfe = [int(key) for key in system["nfe"]]
        matched = [at["matched"] for at in system["nfe"].values()]
        axis.plot(nfe, [at["perplexity"]["value"] for at in matched], color=colours[name], label=name, zorder=3)
        axis.fill_between(nfe, *([at["perplexity"][end] for at in matched] for end in ("low", "high")), color=colours[name], alpha=0.2, lw=0)
        for x, at in zip(nfe, matched, strict=True):
            face = colours[name] if at["position"] == "inside" else "white"
            axis.plot(x, at["perplexity"]["value"], "o", color=colours[name], mfc=face, zorder=4)
    for name, style in (("teacher", "--"), ("real", ":")):
        if report[name] is not None:
            axis.axhline(
                report[name]["perplexity"]["value"],
                color="black",
                ls=style,
                lw=1,
                label="teacher's own samples" if name == "teacher" else "real text",
            )
    _nfe_axis(axis, report)
    _log_perplexity(axis)
    hollow = any(at["matched"]["position"] != "inside" for system in report["systems"].values() for at in system["nfe"].values())
    axis.set_title("At the entropy of real text" + (" (hollow: nearest traced end)" if hollow else ""), fontsize=10)
    axis.legend(fontsize=8, frameon=False)


def _frontiers(axis: Any, report: Report, colours: dict[str, str]) -> None:
    for name, system in report["systems"].items():
        for number, (nfe, at) in enumerate(system["nfe"].items()):
            points = sorted((point["entropy"]["value"], point["perplexity"]["value"]) for point in at["points"])
            mark = _MARKS[number % len(_MARKS)]
            axis.plot(*zip(*points, strict=True), color=colours[name], marker=mark, ms=4, lw=1, alpha=0.85)
            if name == report["settings"]["baseline"]:
                axis.plot([], [], color="grey", marker=mark, ms=4, ls="", label=f"NFE {nfe}")
    axis.axvline(report["real"]["entropy"]["value"], color="black", ls=":", lw=1)
    for name, mark in (("real", "*"), ("teacher", "P")):
        if report[name] is not None:
            axis.plot(report[name]["entropy"]["value"], report[name]["perplexity"]["value"], mark, color="black", ms=9, ls="", label=name)
    axis.set_xlabel("token entropy, nats")
    _log_perplexity(axis)
    axis.set_title("Frontiers: perplexity bought with entropy", fontsize=10)
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


def _nfe_axis(axis: Any, report: Report) -> None:
    nfe = sorted(report["settings"]["nfe"])
    axis.set_xscale("log", base=2)
    axis.set_xticks(nfe, [str(value) for value in nfe])
    axis.minorticks_off()
    axis.set_xlabel("function evaluations (NFE)")


def _log_perplexity(axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 1.5, 2, 3, 5, 7)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_ylabel("generative perplexity")
    axis.grid(alpha=0.25)
