"""chain.md, and the tables that a terminal and a report show of chain.json."""

from __future__ import annotations

from typing import Any

from eval.page import interval

Report = dict[str, Any]
Table = tuple[list[str], list[list[str]]]
"""(head, rows)"""


def matched_table(chain: Report) -> Table:
    """By system and NFE: share of valid transitions at the teacher's entropy. What a report of text shows beside its own table."""
    nfe = [str(value) for value in chain["settings"]["nfe"]]
    limit = chain["references"]["limit"]
    rows = [["exact marginals, no noise", "sample", *(interval(limit[at]["valid"], 3) for at in nfe)]]
    for name, output, by_nfe in _outputs(chain):
        cells = [interval(by_nfe[at]["matched"]["valid"], 3) + ("" if by_nfe[at]["matched"]["position"] == "inside" else " †") for at in nfe]
        rows.append([name, output, *cells])
    return ["system", "output", *(f"NFE {at}" for at in nfe)], rows


def distance_table(chain: Report) -> Table:
    """By system and NFE: distance of pairs at the temperature and noise temperature that was traced first."""
    nfe = [str(value) for value in chain["settings"]["nfe"]]
    limit = chain["references"]["limit"]
    rows = [["exact marginals, no noise", "sample", *(interval(limit[at]["pair_distance"], 3) for at in nfe)]]
    for name, output, by_nfe in _outputs(chain):
        rows.append([name, output, *(interval(by_nfe[at]["points"][0]["pair_distance"], 3) for at in nfe)])
    return ["system", "output", *(f"NFE {at}" for at in nfe)], rows


def point_table(chain: Report) -> Table:
    """Every traced point, and the references."""
    rows = [[name, "", nfe, "", "", *_cells(figures)] for name, by_nfe in chain["references"].items() for nfe, figures in by_nfe.items()]
    for name, output, by_nfe in _outputs(chain):
        for nfe, at in by_nfe.items():
            for point in at["points"]:
                temperature = "" if output == "argmax" else f"{point['temperature']:g}"
                noise = "" if chain["systems"][name]["noise"]["kind"] == "none" else f"{point['noise_temperature']:g}"
                rows.append([name, output, nfe, temperature, noise, *_cells(point)])
    head = ["system", "output", "NFE", "temperature", "noise temperature", "valid", "entropy", "distance of pairs", "rollout followed"]
    return head, rows


def comparison_table(chain: Report) -> Table:
    """System minus what it is compared with; a star where the whole interval says that the system is better."""
    rows = []
    for at in chain["comparisons"]:
        valid = interval(at["valid"], 3) + (" *" if at["valid"]["low"] > 0 else "") + ("" if at["position"] == "inside" else " †")
        distance = interval(at["distance"], 3) + (" *" if at["distance"]["high"] < 0 else "")
        rows.append([at["system"], at["output"], at["against"], str(at["nfe"]), valid, distance])
    return ["system", "output", "against", "NFE", "valid at the teacher's entropy", "distance of pairs"], rows


def markdown(chain: Report) -> str:
    """The whole page."""
    settings, truth = chain["settings"], chain["truth"]
    teacher, teacher_figures = settings["chain"], chain["references"]["teacher"][str(settings["length"])]
    parts = [
        "# Students of an exactly known teacher",
        f"A Markov chain of {teacher['states']} states with {teacher['successors']} possible successors each, rows of {settings['length']} tokens. "
        f"All students: the same {settings['rows']:,} rows, {settings['optim']['steps']:,} steps of {settings['optim']['global_batch']}, "
        f"{settings['model']['layers']} layers of {settings['model']['hidden']}, seed {settings['seed']}; they differ in noise alone. "
        f"{settings['sequences']:,} sequences a figure, brackets are 95% bootstrap intervals.",
        "## Distance of pairs",
        markdown_table(*distance_table(chain)),
        "Total variation between the joint of adjacent tokens and the true one, at the temperature and noise temperature that was traced first: "
        "lower is better. The teacher's own "
        f"{settings['sequences']:,} rollouts have {interval(teacher_figures['pair_distance'], 3)}. Exact marginals are what a student without noise "
        "becomes, however large and long trained: being better at some NFE is beyond all of them.",
        "## Valid transitions at the teacher's entropy",
        markdown_table(*matched_table(chain)),
        "Share of adjacent tokens that the teacher allows, higher is better. † the teacher's entropy lies outside what the system traced: the "
        "nearest end is shown. Sampling at the output of a student with a readout adds noise twice; its argmax is the sample.",
        "## Differences",
        markdown_table(*comparison_table(chain)),
        "System minus what it is compared with; * the whole interval says that the system is better.",
        "## Every traced point",
        markdown_table(*point_table(chain)),
        f"True entropy of a token {truth['entropy']:.3f} nats, given the one before {truth['entropy_rate']:.3f}. Rollout followed: tokens equal to "
        "what the teacher writes from the same noise, before the first difference.",
    ]
    return "\n\n".join(parts) + "\n"


def show(chain: Report) -> None:
    """The two tables by NFE on the terminal, half an interval after the sign; a star where all that the system is compared with is beaten."""
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console()
    titles = {
        "valid": "Valid transitions at the teacher's entropy, higher is better",
        "distance": "Distance of pairs of adjacent tokens from the truth, lower is better",
    }
    for figure, title in titles.items():
        table = RichTable(title=title, caption="* better than every system it is compared with, with the whole interval")
        table.add_column("system")
        for nfe in chain["settings"]["nfe"]:
            table.add_column(f"NFE {nfe}", justify="right")
        limit = chain["references"]["limit"].values()
        table.add_row("no noise, exact", *(_short(at["valid" if figure == "valid" else "pair_distance"]) for at in limit))
        for name, output, by_nfe in _outputs(chain):
            cells = [_short(at["matched"]["valid"] if figure == "valid" else at["points"][0]["pair_distance"]) for at in by_nfe.values()]
            stars = ["*" if _beats_all(chain, name, output, nfe, figure) else "" for nfe in chain["settings"]["nfe"]]
            table.add_row(name if output == "sample" else f"{name}, {output}", *(cell + star for cell, star in zip(cells, stars, strict=True)))
        console.print(table)


def _short(value: dict[str, float]) -> str:
    return f"{value['value']:.3f}±{(value['high'] - value['low']) / 2:.3f}"


def _beats_all(chain: Report, name: str, output: str, nfe: int, figure: str) -> bool:
    """Whether the system beats all systems it is compared with; the limit is no system."""
    lines = [at for at in chain["comparisons"] if (at["system"], at["output"], at["nfe"]) == (name, output, nfe) and at["against"] != "limit"]
    return bool(lines) and all(at["valid"]["low"] > 0 if figure == "valid" else at["distance"]["high"] < 0 for at in lines)


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(row) + " |" for row in rows)]
    return "\n".join(lines)


def _outputs(chain: Report) -> list[tuple[str, str, dict[str, Any]]]:
    return [(name, output, by_nfe) for name, system in chain["systems"].items() for output, by_nfe in system["outputs"].items()]


def _cells(figures: dict[str, Any]) -> list[str]:
    return [
        interval(figures["valid"], 3),
        interval(figures["entropy"], 3),
        interval(figures["pair_distance"], 3),
        interval(figures["rollout_prefix"], 2),
    ]
