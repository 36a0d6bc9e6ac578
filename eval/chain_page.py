"""chain.md, and the tables that a terminal and a report show of chain.json."""

from __future__ import annotations

from typing import Any

from eval.page import interval

Report = dict[str, Any]
Table = tuple[list[str], list[list[str]]]
"""(head, rows)"""


def matched_table(chain: Report) -> Table:
    """Share of valid transitions at the teacher's entropy, by system and NFE; what a report of text shows beside its own."""
    nfe = [str(value) for value in chain["settings"]["nfe"]]
    rows = []
    for name, output, by_nfe in _outputs(chain):
        cells = [interval(by_nfe[at]["matched"]["valid"], 3) + ("" if by_nfe[at]["matched"]["position"] == "inside" else " †") for at in nfe]
        rows.append([name, output, *cells])
    return ["system", "output", *(f"NFE {at}" for at in nfe)], rows


def point_table(chain: Report) -> Table:
    """Every traced point."""
    rows = []
    for name, output, by_nfe in _outputs(chain):
        for nfe, at in by_nfe.items():
            for point in at["points"]:
                temperature = "" if output == "argmax" else f"{point['temperature']:g}"
                noise = "" if chain["systems"][name]["noise"]["kind"] == "none" else f"{point['noise_temperature']:g}"
                rows.append([name, output, nfe, temperature, noise, *_cells(point)])
    rows.append(["teacher", "", str(chain["settings"]["length"]), "", "", *_cells(chain["teacher"])])
    head = ["system", "output", "NFE", "temperature", "noise temperature", "valid", "entropy", "distance of pairs", "rollout followed"]
    return head, rows


def sentences(chain: Report) -> list[str]:
    """One line a comparison."""
    lines = []
    for at in chain["comparisons"]:
        verdict = "more valid" if at["above_zero"] else "less valid" if at["difference"]["high"] < 0 else "no clear difference"
        points = {name: 100 * value for name, value in at["difference"].items()}
        lines.append(f"NFE {at['nfe']}: {at['system']} ({at['output']}) against {at['against']}: {interval(points)} points, {verdict}")
    return lines


def markdown(chain: Report) -> str:
    """The whole page."""
    settings, truth = chain["settings"], chain["truth"]
    teacher = settings["chain"]
    parts = [
        "# Students of an exactly known teacher",
        f"A Markov chain of {teacher['states']} states with {teacher['successors']} possible successors each, rows of {settings['length']} tokens. "
        f"All students: the same {settings['rows']:,} rows, {settings['optim']['steps']:,} steps of {settings['optim']['global_batch']}, "
        f"{settings['model']['layers']} layers of {settings['model']['hidden']}, seed {settings['seed']}; they differ in the noise they are given alone. "
        f"{settings['sequences']:,} sequences a figure, brackets are 95% bootstrap intervals.",
        "## Valid transitions at the teacher's entropy",
        markdown_table(*matched_table(chain)),
        "Share of adjacent tokens that the teacher allows; higher is better, the teacher has 1. † the teacher's entropy lies outside what the system "
        "traced: the nearest end is shown. Sampling at the output of a student with a readout adds noise twice; its argmax is the sample.",
        "## Verdicts",
        "\n".join(f"- {line}" for line in sentences(chain)),
        "## Every traced point",
        markdown_table(*point_table(chain)),
        f"True entropy of a token {truth['entropy']:.3f} nats, given the one before {truth['entropy_rate']:.3f}. Distance of pairs: total variation between "
        "the joint of adjacent tokens and the true one (the teacher's own samples show what is left of it at this number of sequences). Rollout "
        "followed: tokens equal to what the teacher writes from the same noise, before the first difference.",
    ]
    return "\n\n".join(parts) + "\n"


def show(chain: Report) -> None:
    """The tables on the terminal."""
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console()
    for title, (head, rows) in {"Every traced point": point_table(chain), "Valid transitions at the teacher's entropy": matched_table(chain)}.items():
        table = RichTable(title=title)
        for name in head:
            table.add_column(name, justify="left" if name in ("system", "output") else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for line, at in zip(sentences(chain), chain["comparisons"], strict=True):
        console.print(line, style="green" if at["above_zero"] else None, highlight=False, soft_wrap=True)


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(row) + " |" for row in rows)]
    return "\n".join(lines)


def _outputs(chain: Report) -> list[tuple[str, str, dict[str, Any]]]:
    return [(name, output, by_nfe) for name, system in chain["systems"].items() for output, by_nfe in system["outputs"].items()]


def _cells(figures: dict[str, Any]) -> list[str]:
    return [interval(figures["valid"], 3), interval(figures["entropy"], 3), f"{figures['pair_distance']:.3f}", interval(figures["rollout_prefix"], 2)]
