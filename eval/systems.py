"""The systems of a report: which students a folder holds, how each is traced, and how one draws its rows.

A system is scheduled, and so makes the forwards that it is asked for, or free, and makes one a token (ar, first_hitting)
or what it takes (adaptive; medusa, whose heads draft for their backbone). Shapes: B rows, L positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.ahead import check_ahead, least_forwards, ordered
from eval.blocks import sample_blocks
from eval.causal import CausalLM
from eval.config import ReportConfig, System
from eval.decoding import Decoding
from eval.drafting import write_drafted
from eval.frontier import setting_at
from eval.sampler import blank_rows, check_noise, resolve_output, sample_counted
from eval.speculative import Drafter
from noise.storage import DatasetError, read_json
from trainer.students import load_student

KINDS = ("mdlm", "bd3lm", "mtp", "medusa", "ar")
CAUSAL = ("medusa", "ar")
"""Whose text is a causal LM's own."""
_FREE_SAMPLERS = ("first_hitting", "adaptive")
_TEMPERATURES, _NOISE_TEMPERATURES = [0.8, 0.95, 1.1], [1.0, 1.3, 1.6]

Draw = Callable[[Tensor], tuple[Tensor, Tensor]]
"""int64 sequence ids [B] -> (tokens int64 [B, L], forwards int64 [B])"""


@dataclass(frozen=True)
class Traced:
    """One point of one system's frontier."""

    system: str
    decoding: Decoding
    nfe: int
    """Forwards that were asked for; 0: those that it takes."""

    @property
    def name(self) -> str:
        d = self.decoding
        asked = f"nfe{self.nfe}" if self.nfe else "free"
        swept = f"-t{d.temperature:g}" if d.output == "sample" else ""
        nucleus = f"-p{d.nucleus:g}" if d.nucleus != 1 else ""
        return f"{self.system}-{asked}{swept}-n{d.noise_temperature:g}{nucleus}"


def resolved(config: ReportConfig, shape: tuple[int, int]) -> tuple[ReportConfig, list[str]]:
    """(the config with all systems and a baseline by name, what to say of students that were left out). shape: V and L of the held-out rows."""
    systems = dict(config.systems)
    notes: list[str] = []
    if config.students:
        found, notes = discover(Path(config.students), config.nfe, shape)
        taken = {Path(system.student).resolve() for system in systems.values()}
        systems |= {name: system for name, system in found.items() if Path(system.student).resolve() not in taken and name not in systems}
    if not systems:
        raise DatasetError(
            f"{config.students} holds no student of kind {', '.join(KINDS)} for rows like the held-out ones; train one with `python -m trainer`"
        )
    for name in (config.baseline, config.control):
        if name and name not in systems:
            raise ValueError(f"baseline or control is {name!r}, which is not among the systems: {', '.join(systems)}")
    plain = [name for name, system in systems.items() if _about(system.student)[0] == "mdlm" and _about(system.student)[1].get("kind") == "none"]
    return replace(config, systems=systems, students="", baseline=config.baseline or next(iter(plain), next(iter(systems)))), notes


def fits(student: str, shape: tuple[int, int]) -> bool:
    """Whether a folder holds a student of rows of this vocabulary and length."""
    path = Path(student) / "student.json"
    about = read_json(path) if path.exists() else {}
    return (about.get("vocab_size"), about.get("block_length")) == shape


def discover(folder: Path, nfe: list[int], shape: tuple[int, int]) -> tuple[dict[str, System], list[str]]:
    """(name -> system of each student of such rows, by name; what was left out, in words). Raises DatasetError for a folder that is not there."""
    if not folder.is_dir():
        raise DatasetError(f"students is {folder}, which is not a folder; give the folder that holds the students' folders")
    systems, notes = {}, []
    for path in sorted(folder.iterdir()):
        if not (path / "student.json").exists():
            continue
        kind, noise = _about(str(path))
        about = read_json(path / "student.json")
        own = (about.get("vocab_size"), about.get("block_length"))
        if kind == "mtp" and about["student"].get("context", "row") == "row":
            notes.append(
                f"{path} has learnt the last tokens of a row alone (student.context: row), and writes no whole rows: it is not in this report."
            )
        elif own != shape:
            notes.append(
                f"{path} has vocabulary {own[0]} and block length {own[1]}, the held-out rows {shape[0]} and {shape[1]}: it is not in this report."
            )
        elif kind not in CAUSAL and noise.get("readout") and noise.get("kind") not in ("none", "independent"):
            systems[path.name] = System(str(path), noise_temperatures=_NOISE_TEMPERATURES, nfe=_own_nfe(about, nfe))
        else:  # what does not use its noise, or samples at its output, is traced there
            output: Any = "auto" if kind in CAUSAL else "sample"
            systems[path.name] = System(str(path), temperatures=_TEMPERATURES, output=output, nfe=_own_nfe(about, nfe))
    return systems, notes


def _about(student: str) -> tuple[str, dict[str, Any]]:
    """(kind, noise settings) of a student's folder; nothing of a folder that is none."""
    path = Path(student) / "student.json"
    about = read_json(path) if path.exists() else {}
    return str(about.get("kind", "")), dict(about.get("student", {}).get("noise", {}))


def _own_nfe(about: dict[str, Any], nfe: list[int]) -> list[int]:
    """A bd3lm student's numbers: the report's that its blocks divide, or else one, two, four ... forwards a block, and one a token where the
    report goes as far. An mtp student's: those that suffice, or else as few forwards as do."""
    if about["kind"] == "mtp":
        least = least_forwards(int(about["block_length"]) - 1, int(about["student"]["predict"]))
        return [n for n in nfe if n >= least] or [least]
    if about["kind"] != "bd3lm":
        return []
    size = int(about["student"]["block_size"])
    blocks = -(-int(about["block_length"]) // size)
    found = [n for n in nfe if n % blocks == 0 and n // blocks <= size] or [blocks * n for n in (1, 2, 4, 8, 16) if n <= size]
    return sorted({*found, blocks * size}) if max(nfe) >= int(about["block_length"]) - 1 else found


def load(name: str, system: System, device: str) -> Any:
    """The system's student. Raises DatasetError for a student that does not write rows, ValueError for settings that it would ignore."""
    student: Any = load_student(Path(system.student), device=device)
    kind = student.config.kind
    if kind not in KINDS:
        raise DatasetError(f"{system.student} holds a student of kind {kind}; rows are written by kind {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    if kind in CAUSAL:
        how = "an ar student writes one token a forward" if kind == "ar" else "a medusa student writes what its backbone does"
        ignored = {
            "noise_temperatures": [1.0], "output": "auto", "sampler": "even", "order": "random", "fresh_noise": False, "nfe": [],
        }  # fmt: skip
        for field, default in ignored.items():
            if getattr(system, field) != default:
                raise ValueError(f"system {name}: {field} is {getattr(system, field)}, but {how}; drop it")
    if system.nfe and is_free(system, student):
        raise ValueError(f"system {name}: nfe is {system.nfe}, but sampler {system.sampler} takes the forwards that it takes; drop nfe")
    return student


def is_free(system: System, student: Any) -> bool:
    """Whether the number of forwards is its own."""
    return student.config.kind in CAUSAL or system.sampler in _FREE_SAMPLERS


def trace(name: str, system: System, student: Any, nfe: list[int]) -> list[Traced]:
    """The points of one system. Raises ValueError for settings that this student would ignore."""
    if student.noise.kind == "none" and system.noise_temperatures != [1.0]:
        raise ValueError(
            f"{system.student} takes no noise (noise.kind: none) but has noise_temperatures {system.noise_temperatures}; trace it by temperatures"
        )
    output = resolve_output("sample" if student.config.kind in CAUSAL and system.output == "auto" else system.output, student)
    free = is_free(system, student)
    traced = [
        Traced(name, _decoding(system, student, asked, t, n, p, output), asked)
        for asked in ([0] if free else system.nfe or nfe)
        for t in system.temperatures for n in system.noise_temperatures for p in system.nuclei or [system.nucleus]
    ]  # fmt: skip
    for point in traced:
        check_noise(student, point.decoding)
        check_bare(f"system {name}", student, point.decoding)
    return traced


def further(system: System, points: list[Traced], entropies: list[float], wanted: float) -> Traced | None:
    """A point of the same frontier (one system and number of forwards) nearer to the wanted entropy, in nats, than those traced so far.

    None for a system that is one point, and where no setting says more than those that were tried.
    """
    if not system.swept:
        return None
    name = {"temperatures": "temperature", "noise_temperatures": "noise_temperature", "nuclei": "nucleus"}[system.swept[0]]
    tried, asked = [float(getattr(point.decoding, name)) for point in points], getattr(system, system.swept[0])
    found = setting_at(tried, entropies, wanted, min(asked) / 2, 1.0 if name == "nucleus" else 2 * max(asked))
    changed: dict[str, Any] = {name: found and float(f"{found:.4g}")}
    return None if changed[name] in (None, *tried) else replace(points[0], decoding=replace(points[0].decoding, **changed))


def check_bare(about: str, student: Any, decoding: Decoding) -> None:
    """Raises ValueError where an mtp student cannot write rows from BOS alone so."""
    try:
        check_ahead(student, torch.arange(student.block_length)[None] > 0, None, decoding)
    except ValueError as error:
        raise ValueError(f"{about}: {error}") from None


def _decoding(system: System, student: Any, nfe: int, temperature: float, noise_temperature: float, nucleus: float, output: Any) -> Decoding:
    causal = student.config.kind in CAUSAL
    order = system.order if causal else ordered(student, system.sampler, system.order)
    return Decoding(
        1 if causal else nfe, temperature, noise_temperature, nucleus, output, order, system.top_k, system.sampler,
        system.fresh_noise, system.student_weight, system.lookahead, system.recompute,
    )  # fmt: skip


def check_nfe(name: str, system: System, student: Any, nfe: list[int]) -> None:
    """Raises ValueError for numbers of forwards that this student cannot make."""
    if is_free(system, student):
        return
    wanted, most = system.nfe or nfe, student.block_length - 1
    if student.config.kind == "bd3lm":  # BOS has no forward of its own, and so the first block may make fewer than it is asked for
        most = student.blocks * student.block_size
    uneven = [n for n in wanted if student.config.kind == "bd3lm" and n % student.blocks]
    if uneven:
        raise ValueError(f"nfe holds {uneven}; {name} writes {student.blocks} blocks, each in as many forwards: give multiples of {student.blocks}")
    if max(wanted) > most and system.sampler == "even":
        raise ValueError(f"nfe is {wanted}, but a block of {student.block_length} positions has {student.block_length - 1} unknown ones; lower nfe")


def draw_masked(
    student: Any, decoding: Decoding, seed: int, bos: int, device: str, sequence_id_B: Tensor, noise: Any = None, auxiliary: CausalLM | None = None
) -> tuple[Tensor, Tensor]:
    """(rows int64 [B, L], forwards int64 [B]) of an mdlm, bd3lm or mtp student; `noise` may hand over noise that was drawn before."""
    ids_BL = blank_rows(student, len(sequence_id_B), student.block_length, bos).to(device)
    sequence_id_B = sequence_id_B.to(device)
    if student.config.kind == "bd3lm":
        written = sample_blocks(student, ids_BL, sequence_id_B, seed, replace(decoding, nfe=decoding.nfe // student.blocks))
        return written.ids_BL, written.nfe_B
    held = noise is not None and student.noise.kind != "none" and not decoding.fresh_noise
    g_MV = noise(sequence_id_B, ids_BL == student.mask_id) if held else None
    return sample_counted(student, ids_BL, sequence_id_B, seed, decoding, g_MV, auxiliary=auxiliary)


def draw_drafted(
    lm: CausalLM, drafter: Drafter, decoding: Decoding, seed: int, bos: int, length: int, sequence_id_B: Tensor
) -> tuple[Tensor, Tensor]:
    """The same of a medusa student: the rows of `draw_causal`, and the backbone's forwards."""
    given_B = torch.ones_like(sequence_id_B)
    written = write_drafted(lm, drafter, drafter.most, decoding, seed, given_B[:, None] * bos, given_B, given_B * length, sequence_id_B)
    return written.ids_BL, written.calls_B


def draw_causal(lm: CausalLM, decoding: Decoding, seed: int, bos: int, length: int, sequence_id_B: Tensor) -> tuple[Tensor, Tensor]:
    """The same of a causal LM, token by token."""
    given_B = torch.ones_like(sequence_id_B)
    return lm.write(given_B[:, None] * bos, given_B, length, sequence_id_B, seed, decoding), given_B * (length - 1)
