"""The generated tables of docs/ablation.md and docs/results.md: which JSON, which rows, in which words and digits.

A table is a function of `read`, which gives the content of benchmarks/results/NAME.json. Where a JSON says what a student is (`about`), those are
the words, and the order is that of the recipe that made it; elsewhere words and order stand here. A name in bold makes its first figures bold.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.zero_shot import NEXT, ORDER, TEXT, share
from eval.ablation import cell, rows
from eval.accept import REJECTION, SHARED
from eval.chain_page import markdown_table
from eval.page import interval

Figures = dict[str, Any]
Read = Callable[[str], Figures]
Table = Callable[[Read], str]

_RECIPES = Path(__file__).parents[1] / "recipes"
_MADE_BY = {"ablation": "demo_ablation", "ablation_long": "demo_ablation_long", "few_calls": "demo_few_calls"}


def students(json: str, group: str, read: Read) -> str:
    """All students of a group of `python -m eval ablation`."""
    found = read(json)["groups"][group]
    recipe = yaml.safe_load((_RECIPES / f"{_MADE_BY[json]}.yaml").read_text())["groups"][group]["students"]
    if unknown := set(found["students"]) - set(recipe):
        raise ValueError(f"{json}.json has {', '.join(sorted(unknown))} in {group}, which recipes/{_MADE_BY[json]}.yaml does not have")
    return markdown_table(["student", *found["columns"]], rows(found, [name for name in recipe if name in found["students"]], found["columns"]))


_PARTS = {
    "mdlm": [
        "none", "independent", "independent-input", "independent-readout", "independent-drafts", "blind-drafts", "input", "input-tied", "readout",
        "drafts", "all", "all-no-unigram", "sequential-all", "gaussian", "uniform", "token-kd", "sequence-kd",
    ],
    "bd3lm": ["none", "independent", "all"],
}  # fmt: skip


def parts(read: Read) -> str:
    """A selection of two groups, in the columns of the first."""
    groups = read("ablation")["groups"]
    columns = groups["mdlm"]["columns"]
    return markdown_table(["student", *columns], [row for group, names in _PARTS.items() for row in rows(groups[group], names, columns)])


_HEADS = {
    ("none", REJECTION): "no noise, rejection",
    ("independent", REJECTION): "independent noise and drafts (the control), rejection",
    ("input", SHARED): "Gumbel, input alone (the paper)",
    ("gumbel", SHARED): "**Gumbel noise and drafts**",
}


def heads(read: Read) -> str:
    """Tokens a call of Medusa's heads, each by one rule."""
    found = read("ablation")["groups"]["medusa"]["students"]
    lines = [_row(words, [cell(found[name]["columns"][f"tokens a call, {rule}"])], bold=1) for (name, rule), words in _HEADS.items()]
    return markdown_table(["heads", "tokens a call"], lines)


_DRAFTERS = {
    ("mdlm", REJECTION): "mdlm, no noise, rejection",
    ("mdlm", SHARED): "mdlm, no noise, same noise for both",
    ("mdlm-independent", REJECTION): "mdlm, independent noise (the control), rejection",
    ("mdlm-gumbel", SHARED): "**mdlm, Gumbel, all parts**",
    ("medusa", REJECTION): "medusa, no noise, rejection",
    ("medusa-gumbel", SHARED): "**medusa, Gumbel**",
    ("bd3lm", REJECTION): "bd3lm, no noise, rejection",
    ("bd3lm-gumbel", SHARED): "**bd3lm, Gumbel, all parts**",
    ("mtp", REJECTION): "mtp, no noise, rejection",
    ("mtp-gumbel", SHARED): "**mtp, Gumbel, all parts**",
    ("ar", REJECTION): "ar of the teacher's size, a forward a token, rejection",
}
_WIDE_DRAFTERS = {
    ("mdlm-none", REJECTION): "mdlm, no noise, rejection",
    ("mdlm-all", SHARED): "**mdlm, Gumbel, all parts**",
    ("bd3lm-none", REJECTION): "bd3lm, no noise, rejection",
    ("bd3lm-all", SHARED): "**bd3lm, Gumbel, all parts**",
    ("bd3lm-all-known", SHARED): "bd3lm, Gumbel, all parts, and at known tokens",
}


def drafters(read: Read) -> str:
    """Tokens a call, and how often each token of a draft stands."""
    report = read("accept")
    found = {(system["name"], system["rule"]): system for system in report["systems"]}
    lines = []
    for drafter, words in _DRAFTERS.items():
        stands = " ".join(_bare(f"{head['conditional']['value']:.3f}") for head in found[drafter]["heads"])
        lines.append(_row(words, [_to(found[drafter]["tokens_per_call"]), stands], bold=1))
    tokens = ", ".join(str(1 + at) for at in range(report["settings"]["block"]))
    return markdown_table(["drafter", "tokens a teacher call", f"token {tokens} stands, if those before it did"], lines)


def wide_drafters(read: Read) -> str:
    """Tokens a call, and wall time over plain sampling's, with packed weights and without. Whether they are packed changes no token."""
    packed, plain = ({(one["name"], one["rule"]): one for one in read(json)["systems"]} for json in ("accept_wide_packed", "accept_wide"))
    lines = []
    for drafter, words in _WIDE_DRAFTERS.items():
        tokens = f"{packed[drafter]['tokens_per_call']['value']:.2f}"
        lines.append(_row(words, [tokens, _to(packed[drafter]["speed"]), _to(plain[drafter]["speed"])], bold=2))
    return markdown_table(["drafter", "tokens a teacher call", "times as fast as plain sampling, weights packed", "as torch has them"], lines)


_CHAIN = {
    "none": "no noise",
    "independent": "independent noise, all parts (the control)",
    "input": "Gumbel, input alone (the paper)",
    "input-tied": "Gumbel, input alone, as below (tied projection, unigram)",
    "input-add": "Gumbel, input alone, added to the mask's embedding",
    "input-low-rank": "Gumbel, input alone, projection of rank 4",
    "input-only-tied": "Gumbel, input alone, tied projection, no unigram",
    "input-unigram": "Gumbel, input alone, projection of its own, unigram",
    "readout": "Gumbel, readout alone",
    "drafts": "Gumbel, drafts alone",
    "input-readout": "Gumbel, input and readout",
    "input-drafts": "Gumbel, input and drafts",
    "readout-drafts": "Gumbel, readout and drafts",
    "all": "Gumbel, all parts",
    "all-add": "Gumbel, all parts, added",
    "all-own": "Gumbel, all parts, projection of its own",
    "all-low-rank": "Gumbel, all parts, projection of rank 4",
    "all-no-unigram": "Gumbel, all parts, no unigram",
    "every": "Gumbel, all parts, drafts after every layer but the last",
}


def chain(read: Read) -> str:
    """Both seeds: share of pairs that the teacher allows at its entropy, and the distance of pairs where nothing is traced."""
    seeds = [read("chain_converged"), read("chain_converged_2")]
    nfe, length = [str(value) for value in seeds[0]["settings"]["nfe"]], str(seeds[0]["settings"]["length"])
    found = {"exact marginals: the limit without noise": [seed["references"]["limit"] for seed in seeds]}
    found |= {words: [_student(seed["systems"][name]) for seed in seeds] for name, words in _CHAIN.items()}
    lines = []
    for words, of in found.items():
        valid, distance = ([_seeds([by_nfe[at] for by_nfe in of], figure) for at in nfe] for figure in ("valid", "pair_distance"))
        lines.append([words, *valid, *distance])
    teacher = [seed["references"]["teacher"][length] for seed in seeds]
    blank = [""] * (len(nfe) - 1)
    lines.append(["the teacher's own rollouts", *[_seeds(teacher, "valid")] * len(nfe), _seeds(teacher, "pair_distance"), *blank])
    named = [f"{figure}, NFE {nfe[0]}" for figure in ("share of pairs that the teacher allows", "distance of pairs from the truth")]
    others = [f"NFE {at}" for at in nfe[1:]]
    return markdown_table(["student", named[0], *others, named[1], *others], lines)


def _student(system: Figures) -> Figures:
    """NFE -> both figures; of its argmax where that is the sample, as the readout has put the text's noise into the logits."""
    is_sample = system["noise"]["readout"] and system["noise"]["kind"] != "independent"
    by_nfe = system["outputs"]["argmax" if is_sample else "sample"]
    return {nfe: {**at["matched"], "pair_distance": at["points"][0]["pair_distance"]} for nfe, at in by_nfe.items()}


_SYSTEMS = {
    **{name: name for name in ("mdlm", "mdlm-gumbel", "mdlm-independent", "bd3lm", "bd3lm-gumbel", "mtp", "mtp-gumbel")},
    "ar": "ar, of the same size",
    "teacher-traced": "the teacher",
}
_NFE = {**{f"NFE {nfe}": [str(nfe)] for nfe in (1, 2, 4, 8, 16)}, "NFE 31 (32)": ["31", "32"]}
"""Block diffusion writes 32 tokens in whole blocks, the others 31 after BOS: one a token is one column."""


def perplexity(read: Read) -> str:
    report = read("quality")
    caption = f"**Perplexity under the judge** (held-out text: {report['real']['perplexity']['value']:.1f})"
    return f"{caption}\n\n{_by_nfe(report, lambda at: interval(at['matched']['perplexity']) + _end(at['matched']))}"


def mauve(read: Read) -> str:
    return _by_nfe(read("quality"), lambda at: interval(at["matched"]["mauve"], 3) + _end(at["matched"]))


def entropy(read: Read) -> str:
    """Of the traced point that is nearest to held-out text's."""
    report = read("quality")
    real = report["real"]["entropy"]
    caption = "**Entropy**, nats a token, at the traced point whose entropy is nearest to held-out text's"

    def nearest(at: Figures) -> str:
        return interval(min((point["entropy"] for point in at["points"]), key=lambda found: abs(found["value"] - real["value"])), 3)

    return f"{caption} ({interval(real, 3)}): what every other figure is read between\n\n{_by_nfe(report, nearest)}"


def distinct(n: int, read: Read) -> str:
    report, name = read("quality"), f"distinct_{n}"
    caption = f"**Distinct-{n}** (held-out text {interval(report['real'][name], 4)})"
    return f"{caption}\n\n{_by_nfe(report, lambda at: interval(at['matched'][name], 4))}"


def seconds(read: Read) -> str:
    """In milliseconds."""
    return _by_nfe(read("quality"), lambda at: interval({end: 1e3 * value for end, value in at["seconds"].items()}, 2))


def reconstruction(read: Read) -> str:
    """Of the systems that start from masks: the others have none."""
    found = read("quality")["reconstruction"]
    shown = {"systems": {name: {"nfe": by_nfe} for name, by_nfe in found.items()}}
    return _by_nfe(shown, lambda at: interval(at, 3), [name for name in _SYSTEMS if name in found])


def _by_nfe(report: Figures, shown: Callable[[Figures], str], names: Sequence[str] = tuple(_SYSTEMS)) -> str:
    lines = []
    for name in names:
        found = report["systems"][name]["nfe"]
        lines.append([_SYSTEMS[name], *(next((shown(found[nfe]) for nfe in column if nfe in found), "") for column in _NFE.values())])
    return markdown_table(["system", *_NFE], lines)


_SCORED = {
    "mdlm": ("mdlm", ""),
    "mdlm-independent": ("mdlm, independent noise", ""),
    "mdlm-gumbel": ("mdlm, Gumbel, all parts", ""),
    "bd3lm": ("bd3lm, blocks of 4", ", over all orders"),
    "bd3lm-gumbel": ("bd3lm, blocks of 4, Gumbel, all parts", ""),
    "mtp": ("mtp, eight tokens a call", ", call by call"),
    "mtp-gumbel": ("mtp, Gumbel, all parts", ""),
    "ar": ("ar", ""),
}
"""Name, and how its likelihood is exact."""


def zero_shot(read: Read) -> str:
    scored = {**read("zero_shot")["students"], **read("zero_shot_blocks")["students"]}
    found = {Path(student).name: figures for student, figures in scored.items()}
    lines = []
    for student, (words, exact) in _SCORED.items():
        one = found[student]
        likelihood = one["likelihood"].replace("a lower bound, estimated from", "bound,").replace(" of masks and", ",").removesuffix(" of masks")
        lines.append([words, likelihood + exact, *(_bare(share(one[task])) for task in (NEXT, ORDER)), f"{one[TEXT]['word_perplexity,none']:,.0f}"])
    return markdown_table(["student", "likelihood", "next", "order", "perplexity a word"], lines)


_SAMPLED = {
    "mdlm": "mdlm, no noise",
    "all": "mdlm, all parts, noise held through the steps",
    "all-fresh": "mdlm, all parts, noise drawn afresh in each",
    "input": "mdlm, input alone, held",
    "input-fresh": "mdlm, input alone, afresh",
    "mdlm-adaptive": "mdlm, no noise, adaptive",
    "all-adaptive": "**mdlm, all parts, adaptive**",
}


def sampling(read: Read) -> str:
    """Perplexity; of a free system in one column, and the forwards that it takes at that entropy, between its traced points."""
    report = read("sampling")
    nfe, lines = [str(value) for value in report["settings"]["nfe"]], []
    for name, words in _SAMPLED.items():
        system = report["systems"][name]
        cells = {at: interval(found["matched"]["perplexity"]) + _end(found["matched"]) for at, found in system["nfe"].items()}
        if system["free"]:
            ((own, found),) = system["nfe"].items()
            cells = {"its own": f"{cells[own]} in {_forwards(report, found):.0f}"}
        lines.append(_row(words, [cells.get(at, "") for at in (*nfe, "its own")], bold=len(nfe) + 1))
    return markdown_table(["student and sampler", *(f"NFE {at}" for at in nfe), "its own"], lines)


_VIEWS = {
    "": "all, all (exact)", "-M8": "8, all", "-M4": "4, all", "-M2": "2, all", "-W8": "all, 8", "-W1": "all, 1", "-M4-W1": "4, 1",
}  # fmt: skip


def lookahead(read: Read) -> str:
    """Adaptive decoding by how many masks are in view and how much is read anew, both students at the entropy of held-out text."""
    report, students, lines = read("lookahead"), ("mdlm", "mdlm-gumbel"), []
    for view, words in _VIEWS.items():
        cells = []
        for student in students:
            (found,) = report["systems"][student + view]["nfe"].values()
            cells += [f"{_forwards(report, found):.2f}", interval(found["matched"]["perplexity"], 2) + _end(found["matched"])]
        lines.append([words, *cells])
    return markdown_table(["M, W", *(head for student in students for head in (f"{student}: NFE", "perplexity"))], lines)


def _forwards(report: Figures, found: Figures) -> float:
    """Those that a free system takes where it has the entropy of held-out text, between its traced points."""
    points_P2 = np.array(sorted((point["entropy"]["value"], point["forwards"]["mean"]) for point in found["points"]))
    return float(np.interp(report["real"]["entropy"]["value"], points_P2[:, 0], points_P2[:, 1]))


PAGES: dict[str, dict[str, Table]] = {
    "docs/ablation.md": {
        **{group: partial(students, "ablation", group) for group in ("mdlm", "bd3lm", "bd3lm_two_stage", "mtp", "medusa")},
        "mdlm_long": partial(students, "ablation_long", "mdlm"),
        "chain": chain,
        "few_calls": partial(students, "few_calls", "mdlm"),
    },
    "docs/results.md": {
        "parts": parts, "heads": heads, "drafters": drafters, "wide_drafters": wide_drafters,
        "perplexity": perplexity, "mauve": mauve, "entropy": entropy, **{f"distinct_{n}": partial(distinct, n) for n in (1, 2, 3)},
        "seconds": seconds, "reconstruction": reconstruction, "zero_shot": zero_shot, "sampling": sampling,
        "lookahead": lookahead,
    },
}  # fmt: skip
"""Page -> name of a table -> what makes it."""


def _row(words: str, cells: list[str], bold: int) -> list[str]:
    """A row whose first cells are bold where its name is."""
    strong = bold if words.startswith("**") else 0
    return [words, *(f"**{text}**" if text else "" for text in cells[:strong]), *cells[strong:]]


def _to(value: dict[str, float]) -> str:
    return f"{value['value']:.2f} ({value['low']:.2f} to {value['high']:.2f})"


def _seeds(found: list[Figures], figure: str) -> str:
    """One value a seed, or 1 where all are."""
    values = [one[figure]["value"] for one in found]
    return "1" if all(value == 1 for value in values) else ", ".join(_bare(f"{value:.3f}") for value in values)


def _end(matched: Figures) -> str:
    """The mark of a frontier that does not reach the entropy at which it is read."""
    return "" if matched["position"] == "inside" else " †"


def _bare(text: str) -> str:
    """Shares without the zero before the point."""
    return re.sub(r"\b0\.", ".", text)
