"""The pictures of docs/why.md, drawn from a finished study of known languages.

why_truth.png    sentences against calls: the exact limit of factorised decoding, and every student
why_cities.png   which second word follows which first one: the truth, independent choices, and one call of a student with noise
why_noise.png    log p + g of the first two words of one trip: the noise decides
why_maze.png     ways through the maze that students drew in a few calls
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from eval.languages import MAZE, MOVES, Language, language
from eval.metrics import Array
from eval.stream import NOISE_DRAW
from eval.taught import KNOWS_NOTHING, LIMIT
from noise import philox
from noise.storage import atomic_file

if TYPE_CHECKING:
    from eval.truth import TruthConfig

Report = dict[str, Any]

_COLOURS = {"none": "#8a8a8a", "independent": "#e0912f", "gumbel": "#2a6fbb"}
_MORE = ("#3d8c5c", "#7d5ba6", "#c1272d")
_TEACHER, _WRONG = "#3d8c5c", "#c1272d"
_WAYS = 24  # drawn on one maze


def draw(config: TruthConfig, truth: Report, folder: Path) -> list[Path]:
    """Every picture that the study's languages allow; the paths that were written."""
    from matplotlib.figure import Figure

    noisy = next((name for name, noise in config.systems.items() if noise.kind not in KNOWS_NOTHING), None)
    plain = next((name for name, noise in config.systems.items() if noise.kind == "none"), None)
    figures: dict[str, Figure] = {"why_truth.png": _sentences(truth)}
    if "cities" in config.languages:
        figures["why_noise.png"] = _noise(language("cities"), config.seeds[0])
        if noisy is not None and 1 in config.nfe:
            figures["why_cities.png"] = _cities(language("cities"), _samples(config, "cities", noisy, 1), noisy)
    if "maze" in config.languages and noisy is not None and plain is not None:
        figures["why_maze.png"] = _maze(config, plain, noisy)
    for name, figure in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
        with atomic_file(folder / name) as file:
            file.write(buffer.getvalue())
    return [folder / name for name in figures]


def _samples(config: TruthConfig, name: str, system: str, nfe: int) -> Array:
    """Of the first seed, without BOS."""
    return config.taught(name, config.seeds[0]).sampled(system, config.decoding(system, nfe))[:, 1:]


def _sentences(truth: Report) -> Any:
    from matplotlib.figure import Figure

    nfe = truth["settings"]["nfe"]
    figure = Figure(figsize=(3.1 * len(truth["languages"]), 3.5), dpi=100, layout="constrained")
    axes = figure.subplots(1, len(truth["languages"]), sharey=True, squeeze=False)[0]
    spare = iter(_MORE * 9)
    colours = {name: _COLOURS.get(name) or next(spare) for name in truth["settings"]["systems"]}
    for axis, (name, known) in zip(axes, truth["languages"].items(), strict=True):
        axis.axhline(1, color=_TEACHER, lw=1, label="teacher, one call a token")
        axis.plot(nfe, [known[LIMIT][str(at)]["valid"] for at in nfe], "k--", lw=1.2, label="no noise, exact limit")
        for system, found in known["summary"]["systems"].items():
            at_nfe = [found["nfe"][str(at)]["valid"] for at in nfe]
            axis.plot(nfe, [at["mean"] for at in at_nfe], "o-", ms=4, color=colours[system], label=f"student, {system}")
            axis.fill_between(nfe, [at["low"] for at in at_nfe], [at["high"] for at in at_nfe], color=colours[system], alpha=0.25, lw=0)
        axis.set_title(f"{name}, {known['tokens']} tokens", fontsize=10)
        axis.set_xticks(nfe)
        axis.set_ylim(0, 1.04)
        axis.set_xlabel("calls (NFE)")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("share of what is written\nthat is a sentence")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)
    return figure


def _cities(known: Language, drawn_SL: Array, noisy: str) -> Any:
    """The first two words of a trip."""
    from matplotlib.figure import Figure

    joint_VV = np.zeros((known.vocab_size, known.vocab_size))
    np.add.at(joint_VV, (known.ids_ML[:, 0], known.ids_ML[:, 1]), known.p_M)
    seen_VV = np.zeros_like(joint_VV)
    np.add.at(seen_VV, (drawn_SL[:, 0], drawn_SL[:, 1]), 1 / len(drawn_SL))
    first, second = joint_VV.sum(1).nonzero()[0], joint_VV.sum(0).nonzero()[0]
    panels = {
        "the teacher": joint_VV,
        "independent choices, one call (exact)": np.outer(joint_VV.sum(1), joint_VV.sum(0)),
        f"student, {noisy}, one call": seen_VV,
    }
    figure = Figure(figsize=(12, 3.9), dpi=100, layout="constrained")
    for axis, (title, p_VV) in zip(figure.subplots(1, 3, sharey=True), panels.items(), strict=True):
        shown = p_VV[np.ix_(first, second)]
        axis.imshow(shown, cmap="Blues", vmin=0, vmax=joint_VV.max(), aspect="auto")
        wrong = np.argwhere((shown > 0.0005) & (joint_VV[np.ix_(first, second)] == 0))
        axis.plot(wrong[:, 1], wrong[:, 0], "x", color=_WRONG, ms=5, ls="")
        axis.set_xticks(range(len(second)), [known.symbols[token] for token in second], rotation=60, ha="right", fontsize=8)
        axis.set_yticks(range(len(first)), [known.symbols[token] for token in first], fontsize=8)
        cities = float(p_VV[joint_VV > 0].sum())
        axis.set_title(f"{title}: {cities:.0%} are cities", fontsize=10)
    figure.supylabel("first word", fontsize=9)
    return figure


def _noise(known: Language, seed: int) -> Any:
    """log p + g of the first two words of the first trip of this seed's noise."""
    from matplotlib.figure import Figure

    ids_L = known.rollout(torch.zeros(1, dtype=torch.int64), known.length + 1, seed)[0].tolist()
    state_L = known.walk(torch.tensor([ids_L]))[0]
    figure = Figure(figsize=(9.5, 3.2), dpi=100, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True, width_ratios=[8, 3])
    for position, axis in enumerate(axes, start=1):
        log_p_V = known.log_p[state_L[position - 1]].numpy()
        place = torch.tensor([position])
        g_V = philox.gumbel(philox.rows(seed, torch.zeros(1, dtype=torch.int64), place, NOISE_DRAW), known.vocab_size)[0].numpy()
        possible = np.isfinite(log_p_V).nonzero()[0]
        at = np.arange(len(possible))
        axis.bar(at - 0.27, log_p_V[possible], 0.26, color="#8a8a8a", label="log p, the teacher")
        axis.bar(at, g_V[possible], 0.26, color="#e0912f", label="g, the noise")
        axis.bar(at + 0.27, (log_p_V + g_V)[possible], 0.26, color="#2a6fbb", label="log p + g")
        winner = int((log_p_V + g_V)[possible].argmax())
        axis.plot(winner + 0.27, (log_p_V + g_V)[possible[winner]] + 0.35, "v", color=_TEACHER, ms=8, label="the largest: the token")
        axis.axhline(0, color="black", lw=0.8)
        axis.set_xticks(at, [known.symbols[token] for token in possible], rotation=30, ha="right", fontsize=9)
        written = " ".join(["", *(known.symbols[token] for token in ids_L[1:position])])
        axis.set_title("first word" if position == 1 else f"second word after{written}", fontsize=10)
    axes[0].legend(fontsize=8, frameon=False, ncols=2)
    return figure


def _maze(config: TruthConfig, plain: str, noisy: str) -> Any:
    from matplotlib.figure import Figure

    known, shown = language("maze"), [nfe for nfe in config.nfe if nfe <= 3]
    figure = Figure(figsize=(2.6 * len(shown), 5.6), dpi=100, layout="constrained")
    axes = figure.subplots(2, len(shown), squeeze=False)
    for row, system in zip(axes, (plain, noisy), strict=True):
        for axis, nfe in zip(row, shown, strict=True):
            drawn_SL = _samples(config, "maze", system, nfe)
            good_S = known.find(drawn_SL) >= 0
            _ways(axis, known, drawn_SL[:_WAYS], good_S[:_WAYS])
            axis.set_title(f"{system}, {nfe} call{'s' * (nfe > 1)}: {good_S.mean():.0%} valid", fontsize=9)
    return figure


def _ways(axis: Any, known: Language, drawn_SL: Array, good_S: Array) -> None:
    """Each way a little beside the others, valid ones blue; a way leaves the picture where it leaves the maze."""
    for row, line in enumerate(MAZE):
        for column, square in enumerate(line):
            axis.add_patch(_square(column, row, "#4c4c4c" if square == "#" else "#f4f4f4"))
    for number in np.argsort(good_S, kind="stable"):
        steps = np.array([MOVES.get(known.symbols[token], (0, 0)) for token in drawn_SL[number]], float)
        way = np.concatenate([np.zeros((1, 2)), steps.cumsum(0)]) + 0.5 * ((number + 0.5) / len(drawn_SL) - 0.5)
        axis.plot(way[:, 1], way[:, 0], color=_COLOURS["gumbel"] if good_S[number] else _WRONG, lw=0.9, alpha=0.75, solid_joinstyle="round")
    axis.set_xlim(-1, len(MAZE[0]))
    axis.set_ylim(len(MAZE), -1)
    axis.set_aspect("equal")
    axis.axis("off")


def _square(column: int, row: int, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=colour, edgecolor="white", lw=1)
