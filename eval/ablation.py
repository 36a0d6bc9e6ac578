"""What each part of a student is worth: students that differ in one thing, on the same data, over several seeds.

    python -m eval ablation --config recipes/demo_ablation.yaml

Each group has a baseline; a student's figure is its perplexity over the baseline's of the same seed, both read at the entropy of real
text, at each number of function evaluations (NFE). Students that draft for their teacher are compared by the tokens that a call of it
writes (`measure: accept`). Every student, sample set and score is a file: interrupted at any moment, the same command continues.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from eval.causal import CausalLM
from eval.chain_page import markdown_table
from eval.config import AcceptConfig, ReportConfig, System
from eval.reconstruct import full_rows
from eval.taught import make_all
from trainer.config import TrainConfig
from trainer.data import NoiseDataset

Report = dict[str, Any]

_ACCEPT_BATCH = 16


@dataclass
class Variant:
    """One student: what of the group's recipe it changes, and how it is traced."""

    set: dict[str, Any] = field(default_factory=dict)
    """Dotted settings of the trainer that differ from the group's recipe."""
    temperatures: list[float] = field(default_factory=lambda: [0.8, 0.95, 1.1])
    """Traces the frontier of a student that samples at its output."""
    noise_temperatures: list[float] = field(default_factory=lambda: [1.0])
    """Traces the frontier of a student whose noise is the sample."""
    output: Literal["auto", "sample", "argmax"] = "auto"
    """As in `eval report`."""
    about: str = ""
    """What it is, in the table's words; empty: its name."""


@dataclass
class Group:
    """Students that are compared with one of them."""

    recipe: str
    """Recipe of the trainer that all start from."""
    baseline: str
    """The student that the others are compared with."""
    students: dict[str, Variant]
    """Name -> what it changes."""
    measure: Literal["perplexity", "accept"] = "perplexity"
    """perplexity: of samples, at matched entropy. accept: tokens a call of the teacher, for which they draft samples from fresh noise."""
    nfe: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    """Function evaluations of a row."""
    teacher: str = ""
    """accept: the causal LM whose samples are drafted."""
    block: int = 4
    """accept: tokens of a draft at most."""

    def __post_init__(self) -> None:
        if self.baseline not in self.students:
            raise ValueError(f"baseline is {self.baseline!r}, which is not among the students: {', '.join(self.students)}")
        for name, default, reads in (("nfe", [1, 2, 4, 8], "perplexity"), ("block", Group.block, "accept"), ("teacher", "", "accept")):
            if self.measure != reads and getattr(self, name) != default:
                raise ValueError(f"{name} is {getattr(self, name)!r}, but measure is {self.measure}, which does not read it; drop it")
        if self.measure == "accept" and not self.teacher:
            raise ValueError("measure is accept, but teacher is empty; name the causal LM that is drafted for")
        usual = Variant()
        for student, variant in self.students.items() if self.measure == "accept" else ():
            for name in ("temperatures", "noise_temperatures", "output"):
                if getattr(variant, name) != getattr(usual, name):
                    raise ValueError(f"{name} of {student} is {getattr(variant, name)}, but measure is accept, which samples nothing; drop it")


@dataclass
class AblationConfig:
    """Groups of students, trained and compared over seeds."""

    output: str
    """Folder of students, samples, scores and ablation.json."""
    groups: dict[str, Group]
    """Name -> students."""
    heldout: str
    """Held-out rows: the text whose entropy is matched."""
    judge: str
    """Causal LM that scores the samples; not the teacher."""
    page: str = ""
    """Markdown file for the tables; empty: ablation.md in output."""
    title: str = "Ablation"
    """Its first line."""
    seeds: list[int] = field(default_factory=lambda: [1, 2])
    """Each names initial weights, order, masks and samples of one whole repetition."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Dotted settings of the trainer for all students, over their recipes: fewer steps, another dataset."""
    refine: int = 1
    """As in `eval report`: further points of each frontier, placed at the entropy of held-out text."""
    sequences: int = 512
    """Sequences behind each figure."""
    workers: int = 0
    """Students trained at a time, each with one thread; 0: one a core, one where there is a GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds is {self.seeds}; give at least one, each once")
        if self.refine < 0 or self.sequences < 2:
            raise ValueError(f"refine is {self.refine} and sequences {self.sequences}; they must be at least 0 and 2")

    @property
    def folder(self) -> Path:
        return Path(self.output)

    def student(self, group: str, name: str, seed: int) -> Path:
        return self.folder / f"seed-{seed}" / "students" / f"{group}-{name}"


def training(config: AblationConfig, group: str, name: str, seed: int) -> TrainConfig:
    """One student's run: its group's recipe, the settings of all, its own, in this order."""
    from trainer.__main__ import parse

    of = config.groups[group]
    changed = config.settings | of.students[name].set | {"output": str(config.student(group, name, seed)), "seed": seed, "device": config.device}
    return parse(["--config", of.recipe, *(f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in changed.items())])


def build(config: AblationConfig) -> Report:
    """Make what is missing and compute every figure. Raises ValueError, before any work, for a recipe or setting that is not one."""
    from trainer.loop import train

    places = [(group, name) for group, of in config.groups.items() for name in of.students]
    for group, of in config.groups.items():
        if of.measure == "accept":
            _accept_configs(config, group)
            CausalLM(of.teacher)
    jobs = {f"{group} {name}, seed {seed}": training(config, group, name, seed) for seed in config.seeds for group, name in places}
    make_all({name: partial(train, job) for name, job in jobs.items()}, config.workers, config.device)
    measures = {"perplexity": _perplexities, "accept": _accepted}
    groups = {name: measures[of.measure](config, name) for name, of in config.groups.items()}
    found = {}
    for name, students in groups.items():
        baseline = config.groups[name].baseline
        optim = training(config, name, baseline, config.seeds[0]).optim
        found[name] = {"baseline": baseline, "steps": optim.steps, "rows": optim.global_batch, "students": students}
        found[name]["columns"] = list(students[baseline]["columns"])
    return {"seeds": config.seeds, "sequences": config.sequences, "groups": found}


def _perplexities(config: AblationConfig, group: str) -> dict[str, Any]:
    """Student -> {about, columns: {NFE: {values by seed, mean, low, high, matched}}}: ratios to the baseline, and the baseline's own figures."""
    from eval.report import build as build_report

    of = config.groups[group]
    reports = [build_report(_report_config(config, group, seed)) for seed in config.seeds]
    found: dict[str, Any] = {}
    for name, variant in of.students.items():
        columns = {}
        for nfe in map(str, of.nfe):
            at = [report["systems"][name]["nfe"][nfe]["matched"] for report in reports]
            base = [report["systems"][of.baseline]["nfe"][nfe]["matched"] for report in reports]
            own = [one["perplexity"]["value"] for one in at]
            values = own if name == of.baseline else [ours / theirs["perplexity"]["value"] for ours, theirs in zip(own, base, strict=True)]
            inside = all(one["position"] == "inside" for one in (*at, *base))
            columns[f"NFE {nfe}"] = {**_spread(values), "matched": inside}
        found[name] = {"about": variant.about or name, "columns": columns}
    return found


def _report_config(config: AblationConfig, group: str, seed: int) -> ReportConfig:
    of = config.groups[group]
    systems = {
        name: System(str(config.student(group, name, seed)), variant.temperatures, variant.noise_temperatures, output=variant.output)
        for name, variant in of.students.items()
    }
    return ReportConfig(
        output=str(config.folder / f"seed-{seed}"), systems=systems, baseline=of.baseline, heldout=config.heldout, judge=config.judge, nfe=of.nfe,
        refine=config.refine, sequences=config.sequences, reconstruction_rows=0, timing_rows=0, shown=0, replicates=200, seed=seed,
        device=config.device,
    )  # fmt: skip


def _accepted(config: AblationConfig, group: str) -> dict[str, Any]:
    """Student -> {about, columns: {rule: tokens a call of the teacher, token k: how often the k-th drafted one stands where those before it did}}.

    A column is None where the rule does not suit the student.
    """
    from eval.accept import REJECTION, SHARED
    from eval.accept import build as build_accept

    of, found = config.groups[group], {}
    reports = [build_accept(accepting) for accepting in _accept_configs(config, group)]
    for name, variant in of.students.items():
        by_rule = [{s["rule"]: s for s in report["systems"] if s["name"] == config.student(group, name, 0).name} for report in reports]
        columns = {
            f"tokens a call, {rule}": _spread([at[rule]["tokens_per_call"]["value"] for at in by_rule]) if rule in by_rule[0] else None
            for rule in (SHARED, REJECTION)
        }
        for k in range(of.block):
            heads = [at[SHARED]["heads"][k : k + 1] for at in by_rule]
            columns[f"token {k + 1} stands, {SHARED}"] = _spread([head["conditional"]["value"] for (head,) in heads]) if all(heads) else None
        found[name] = {"about": variant.about or name, "columns": columns}
    return found


def _accept_configs(config: AblationConfig, group: str) -> list[AcceptConfig]:
    """One a seed. Raises ValueError for a draft of no tokens, DatasetError for held-out rows that are none."""
    of, bos = config.groups[group], int(full_rows(NoiseDataset(config.heldout), 1)[0, 0])
    return [
        AcceptConfig(
            [str(config.student(group, name, seed)) for name in of.students], of.teacher, str(config.folder / f"seed-{seed}" / f"accept-{group}"),
            bos=bos, block=of.block, sequences=config.sequences, batch=_ACCEPT_BATCH, seed=seed, device=config.device,
        )
        for seed in config.seeds
    ]  # fmt: skip


def _spread(values: list[float]) -> dict[str, Any]:
    """Geometric mean over seeds, and the seeds' extremes."""
    mean = math.exp(fmean(map(math.log, values))) if min(values) > 0 else 0.0
    return {"values": values, "mean": mean, "low": min(values), "high": max(values), "matched": True}


def markdown(config: AblationConfig, built: Report) -> str:
    """The tables, and how to read them."""
    seeds = ", ".join(map(str, built["seeds"]))
    lines = [
        f"# {config.title}",
        "",
        f"Made by `python -m eval ablation`; every value is in `{config.folder / 'ablation.json'}`. Seeds {seeds}: geometric mean, and extremes in",
        "brackets. Students of a table differ in what the first column names and in nothing else.",
    ]
    for name, of in config.groups.items():
        group = built["groups"][name]
        lines += ["", f"## {name}", "", _reading(config, of, group), ""]
        lines.append(markdown_table(["student", *group["columns"]], rows(group, of.students, group["columns"])))
    return "\n".join(lines) + "\n"


def rows(group: Report, students: Iterable[str], columns: list[str]) -> list[list[str]]:
    """What each of these students is, and its figures; empty in a column that its group does not have."""
    chosen = [group["students"][name] for name in students]
    return [[one["about"], *(cell(one["columns"][column]) if column in one["columns"] else "" for column in columns)] for one in chosen]


def _reading(config: AblationConfig, of: Group, group: Report) -> str:
    trained = f"{group['steps']:,} steps of {group['rows']} rows, {of.recipe}."
    if of.measure == "accept":
        return (
            f"Tokens that a call of {of.teacher} writes where the student drafts at most {of.block} from fresh noise, {config.sequences} "
            "sequences: more is better, 1 is plain sampling. Rejection is the rule of speculative sampling, for students that know nothing of the "
            f"noise. Token k: how often it stands where those before it did. {trained}"
        )
    return (
        f"Perplexity under the judge at the entropy of held-out text, {config.sequences} sequences. The baseline's row is perplexity; the others are "
        f"over the baseline's of the same seed: below 1 is better. † where a frontier does not reach that entropy: its nearest end. {trained}"
    )


def cell(found: dict[str, Any] | None) -> str:
    """The geometric mean and the seeds' extremes; a dash where the figure does not suit the student."""
    if found is None:
        return "—"
    digits = 1 if found["mean"] >= 10 else 3
    text = f"{found['mean']:.{digits}f}"
    if len(found["values"]) > 1:
        text += f" ({found['low']:.{digits}f} to {found['high']:.{digits}f})"
    return text + ("" if found["matched"] else " †")
