"""truth.md, and the tables that a terminal shows of truth.json."""

from __future__ import annotations

from typing import Any

from eval.chain_page import Table, markdown_table
from eval.taught import LIMIT

Report = dict[str, Any]

TITLES = {
    "valid": "Share of what is written that is a sentence, higher is better",
    "distance": "Total variation between the joint of what is written and the truth, lower is better",
}
LIMIT_LABEL = "no noise, exact limit"


def figure_table(truth: Report, figure: str) -> Table:
    """By language, system and NFE: mean of the seeds, lowest to highest; a star where everything that the system is compared with is beaten."""
    nfe = [str(value) for value in truth["settings"]["nfe"]]
    rows = []
    for name, known in truth["languages"].items():
        rows.append([name, LIMIT_LABEL, *(f"{known[LIMIT][at][figure]:.3f}" for at in nfe)])
        for system, found in known["summary"]["systems"].items():
            rows.append([name, system, *(spread(found["nfe"][at][figure]) + _star(truth, system, found["nfe"][at], figure) for at in nfe)])
    return ["language", "system", *(f"NFE {at}" for at in nfe)], rows


def one_call_table(truth: Report) -> Table:
    """By language and system: what one call gives back from noise, and how much of one call's draft the teacher accepts."""
    rows = []
    for name, known in truth["languages"].items():
        rows.append([name, LIMIT_LABEL, "", f"{known['limit_accepted']:.2f} of {known['tokens']}"])
        for system, found in known["summary"]["systems"].items():
            rows.append([name, system, spread(found["reconstruction"]), f"{spread(found['accepted'], 2)} of {known['tokens']}"])
    return ["language", "system", "held-out tokens from their noise", "tokens accepted of a draft"], rows


def comparison_table(truth: Report) -> Table:
    """System minus what it is compared with, seed by seed; a star where the whole interval says that the system is better."""
    rows = []
    for name, known in truth["languages"].items():
        for seed, found in known["seeds"].items():
            for at in found["comparisons"]:
                valid = _interval(at["valid"]) + (" *" if at["valid"]["low"] > 0 else "")
                distance = _interval(at["distance"]) + (" *" if at["distance"]["high"] < 0 else "")
                rows.append([name, seed, at["system"], at["against"], str(at["nfe"]), valid, distance])
    return ["language", "seed", "system", "against", "NFE", "sentences", "total variation"], rows


def markdown(truth: Report, picture: str) -> str:
    """The whole page."""
    settings = truth["settings"]
    model, optim = settings["model"], settings["optim"]
    parts = [
        "# Students of languages of which everything is known",
        *(
            f"**{name}**: {known['about']} {known['sentences']} sentences of {known['tokens']} tokens, {known['entropy']:.2f} nats."
            for name, known in truth["languages"].items()
        ),
        f"All students: {settings['rows']:,} rows of {settings['draws']} draws of noise, {optim['steps']:,} steps of {optim['global_batch']}, "
        f"{model['layers']} layers of {model['hidden']}; they differ in noise alone. What is written without noise is summed exactly, with noise "
        f"integrated over {settings['integration']:,} draws (distances within {_error(truth, 'distance'):.3f}, shares within "
        f"{_error(truth, 'valid'):.3f}, 95%); mean of seeds "
        f"{', '.join(map(str, settings['seeds']))} (lowest to highest). * better than everything it is compared with, the limit included, in every "
        "seed, beyond the errors of all integrals.",
        f"![Sentences against calls]({picture})",
        f"## {TITLES['valid']}",
        markdown_table(*figure_table(truth, "valid")),
        "The limit is exact: what a student without noise tends to, however large and long trained.",
        f"## {TITLES['distance']}",
        markdown_table(*figure_table(truth, "distance")),
        "The teacher is at 0: this is no count of a sample, which would be off even for the teacher's own.",
        "## One call",
        markdown_table(*one_call_table(truth)),
        "With the teacher's noise, a token of a draft is accepted where the teacher writes the same from that noise, up to the first difference. "
        "Without, by the rule of speculative sampling; that expectation is exact for the limit and for a student without noise. Held-out tokens: "
        f"of {settings['heldout_rows']:,} rows.",
        "## Differences",
        markdown_table(*comparison_table(truth)),
    ]
    return "\n\n".join(parts) + "\n"


def show(truth: Report) -> None:
    """The tables on the terminal."""
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console()
    tables = [(title, figure_table(truth, figure)) for figure, title in TITLES.items()]
    caption = "mean of the seeds (lowest to highest); * better than the limit and every system it is compared with, in every seed"
    for title, (head, rows) in [*tables, ("One call", one_call_table(truth))]:
        table = RichTable(title=title, caption=caption)
        for number, column in enumerate(head):
            table.add_column(column, justify="left" if number < 2 else "right")
        for row, following in zip(rows, [*rows[1:], [""]], strict=True):
            table.add_row(*row, end_section=row[0] != following[0])
        console.print(table)


def _error(truth: Report, figure: str) -> float:
    """The widest half of an integral's interval."""
    systems = [found for known in truth["languages"].values() for seed in known["seeds"].values() for found in seed["systems"].values()]
    return max((at[figure]["high"] - at[figure]["low"]) / 2 for found in systems for at in found["nfe"].values())


def spread(value: dict[str, float], digits: int = 3) -> str:
    mean, low, high = (f"{value[name]:.{digits}f}" for name in ("mean", "low", "high"))
    return mean if low == high else f"{mean} ({low} to {high})"


def _star(truth: Report, system: str, at: dict[str, Any], figure: str) -> str:
    """Whether everything that the system is compared with is beaten."""
    settings = truth["settings"]
    others = {*settings["against"].get(system, []), LIMIT}
    return " *" if others <= set(at["beats"][figure]) else ""


def _interval(value: dict[str, float]) -> str:
    return f"{value['value']:+.3f} [{value['low']:+.3f}, {value['high']:+.3f}]"
