"""Students of several datasets in one command: a report of each dataset, with its own plot, of the students that fit its rows; and a page of all.

    python -m eval report --students STUDENTS --datasets '[HELDOUT, OTHER_HELDOUT]' --judge JUDGE --output FOLDER

A report lies in FOLDER under the name of its held-out set. Text of two datasets is never compared: each has its own real text, entropy and baseline.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from eval.cautions import recorded_teacher
from eval.config import ReportConfig
from eval.page import columns, introduction, matched_row
from eval.render import Block, Heading, Note, Paragraph, Picture, Table
from eval.systems import fits
from noise.storage import DatasetError, weights_hash
from trainer.data import NoiseDataset

Report = dict[str, Any]


def parts(config: ReportConfig) -> list[ReportConfig]:
    """A config for each dataset. Raises ValueError or DatasetError for what belongs to none of them."""
    datasets = {name: NoiseDataset(path) for name, path in zip(_names(config.datasets), config.datasets, strict=True)}
    shapes = {name: (dataset.codec.vocab_size, dataset.block_length) for name, dataset in datasets.items()}
    lost = [name for name, system in config.systems.items() if not any(fits(system.student, shape) for shape in shapes.values())]
    if lost:
        raise DatasetError(
            f"the student of system {lost[0]}, {config.systems[lost[0]].student}, fits the rows of none of {', '.join(config.datasets)}"
        )
    for role in ("baseline", "control"):
        named = getattr(config, role)
        if named and not any(_holds(config, named, shape) for shape in shapes.values()):
            raise ValueError(f"{role} is {named!r}, which is no student of the rows of {', '.join(config.datasets)}")
    found = []
    for (name, dataset), path in zip(datasets.items(), config.datasets, strict=True):
        systems = {system: about for system, about in config.systems.items() if fits(about.student, shapes[name])}
        found.append(
            replace(
                config, heldout=path, datasets=[], output=str(Path(config.output) / name), systems=systems,
                baseline=config.baseline if _holds(config, config.baseline, shapes[name]) else "",
                control=config.control if _holds(config, config.control, shapes[name]) else "",
                teacher=config.teacher if _made(config.teacher, dataset) else "",
                nfe=[nfe for nfe in config.nfe if nfe < dataset.block_length] or [1],
            )
        )  # fmt: skip
    if config.teacher and not any(part.teacher for part in found):
        raise DatasetError(f"teacher {config.teacher} made the noise of none of {', '.join(config.datasets)}; leave it out")
    return found


def page(built: dict[str, Report], folder: Path) -> list[Block]:
    """All datasets, each with its plot and table. built: folder of a report -> report."""
    blocks: list[Block] = [Heading("Quality against function evaluations, by dataset", 1)]
    for place, report in built.items():
        blocks += [
            Heading(Path(place).name),
            Paragraph(introduction(report)),
            *(Note(warning) for warning in report["warnings"]),
            Picture(f"{Path(place).name}: perplexity and MAUVE at matched entropy", Path(place) / "report.png"),
            Table(["system", *columns(report)], [matched_row(report, name) for name in report["systems"]]),
            Paragraph(f"All of it: `{(Path(place) / 'report.html').relative_to(folder)}`."),
        ]
    return blocks


def _names(paths: list[str]) -> list[str]:
    names = [Path(path).name for path in paths]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"datasets has {twice.count(twice[0])} of the name {twice[0]!r}, which names the folder of its report; rename one")
    return names


def _holds(config: ReportConfig, name: str, shape: tuple[int, int]) -> bool:
    """Whether a system, or a student of the folder, has this name and rows of this shape."""
    if name in config.systems:
        return fits(config.systems[name].student, shape)
    return bool(name and config.students) and fits(str(Path(config.students) / name), shape)


def _made(teacher: str, dataset: NoiseDataset) -> bool:
    """Whether a model made the noise of a dataset; taken on trust where either has no hash."""
    recorded = recorded_teacher(dataset.manifest.identity).get("weights_sha256")
    return bool(teacher) and (not recorded or not Path(teacher).is_dir() or weights_hash(Path(teacher)) == recorded)
