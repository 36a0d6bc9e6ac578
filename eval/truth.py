"""Where factorised decoding fails, and how much of it noise repairs: students of languages of which everything is known.

Each language (see languages) has an exact teacher that writes a noise dataset. Students that differ in `noise` alone are
trained on it (see taught), for every language and every seed. What each writes in several numbers of function evaluations (NFE)
is computed, not judged: summed where it reads no noise (factorised), integrated over noise where it does (integrated). So is what
a student without noise could reach at best.

    python -m eval truth --config recipes/demo_truth.yaml

Two more measures of one call are taken: how much of a held-out row comes back from its noise, and how many tokens of a draft
the teacher accepts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval import tables
from eval.causal import folder_identity
from eval.decoding import Decoding
from eval.exact import BOS
from eval.factorised import Places, accepted, factorised
from eval.integrated import GROUPS, integrated
from eval.languages import LANGUAGES, Language, language
from eval.metrics import Array
from eval.reconstruct import reconstruct
from eval.sampler import blank_rows, last_call
from eval.study import device_of, draw_rows, load_masked
from eval.taught import KNOWS_NOTHING, Taught, TaughtConfig, make_all
from eval.truth_figures import Measured, Report, report
from trainer.data import NoiseDataset

_DRAWS_AT_ONCE = 512


@dataclass(kw_only=True)
class TruthConfig(TaughtConfig):
    """Students of small languages of which everything is known."""

    languages: list[str] = field(default_factory=lambda: list(LANGUAGES))
    """Which languages: cities, arithmetic, brackets, maze."""
    nfe: list[int] = field(default_factory=lambda: [1, 2, 3, 4])
    """Numbers of function evaluations."""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    """Each names texts, initial weights, order, masks and samples of one run of everything."""
    sequences: int = 4096
    """Samples behind the pictures that show what a student writes."""
    integration: int = 65536
    """Draws of noise, order and all calls but the last behind the figures of a student that reads noise."""
    pictures: str = ""
    """Folder of the pictures; empty: output."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("languages", "seeds"):
            if not getattr(self, name) or len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; give at least one, each once")
        if self.integration < GROUPS:
            raise ValueError(f"integration is {self.integration}; it must be at least {GROUPS}")
        for name in self.languages:
            if max(self.nfe) > language(name).length:
                raise ValueError(f"nfe is {self.nfe}, but a sentence of {name} has {language(name).length} tokens; lower nfe or leave {name} out")

    def taught(self, name: str, seed: int) -> Taught:
        """The students of one language and one seed."""
        return Taught(self, self.folder / name / f"seed{seed}", language(name), language(name).length, seed)

    def decoding(self, system: str, nfe: int) -> Decoding:
        """argmax where a readout makes it the sample."""
        return Decoding(nfe, output="argmax" if self.systems[system].readout else "sample")


def build(config: TruthConfig) -> Report:
    """Make the datasets and the students that are missing, and compute every figure."""
    for name in config.languages:
        for seed in config.seeds:
            config.taught(name, seed).write_datasets()
    cells = [(name, seed, system) for seed in config.seeds for name in config.languages for system in config.systems]
    jobs = {f"truth: {name}, seed {seed}, {system}": functools.partial(_make, config, name, seed, system) for name, seed, system in cells}
    make_all(jobs, config.workers, config.device)
    return report(config, {cell: measured(config, *cell) for cell in cells})


def _make(config: TruthConfig, name: str, seed: int, system: str) -> None:
    config.taught(name, seed).make(system, [])
    measured(config, name, seed, system)


def measured(config: TruthConfig, name: str, seed: int, system: str) -> Measured:
    """What one trained student does; computed once."""
    taught = config.taught(name, seed)
    about = {"student": folder_identity(taught.student(system)), "seed": str(seed)}
    drawn = about if config.systems[system].kind == "none" else {**about, "draws": config.integration, "groups": GROUPS}
    heldout = {**about, "rows": config.heldout_rows}
    student = functools.cache(lambda: load_masked(str(taught.student(system)), device_of(config.device)))
    returned_S = _kept(taught.folder / "reconstruction", system, heldout, lambda: _reconstructed(taught, student()))
    accepted_S = _kept(taught.folder / "acceptance", system, drawn, lambda: _accepted(config, language(name), student(), seed))
    written = {}
    for nfe in config.nfe:
        decoding = config.decoding(system, nfe)
        asked = {**drawn, "decoding": decoding.request()}
        make = functools.partial(_written, config, language(name), student, decoding, seed)
        written[nfe] = _kept(taught.folder / "written", f"{system}-nfe{nfe}", asked, make)
    return Measured(written, returned_S, accepted_S)


def _kept(folder: Path, name: str, request: dict[str, Any], make: Callable[[], Array]) -> Array:
    path = tables.piece(folder, name, request)
    if not path.exists():
        tables.write(path, {"value": make()}, request)
    return tables.read(path)[0]["value"]


def _reconstructed(taught: Taught, student: Any) -> Array:
    """Share of each held-out row's tokens that one call gives back, float64 [S]."""
    heldout = NoiseDataset(taught.folder / "heldout")
    return reconstruct(student, heldout, taught.config.heldout_rows, 1, "random", taught.seed, device_of(taught.config.device))


def _written(config: TruthConfig, known: Language, load: Callable[[], Any], decoding: Decoding, seed: int) -> Array:
    """Probability of every sentence, float64 [G, M]: one group, exact, of a student without noise, or the groups of the integral over noise."""
    student, device = load(), device_of(config.device)
    if student.noise.kind == "none":
        return factorised(known, decoding.nfe, functools.cache(functools.partial(chances, student, known, device)))[None]
    return integrated(student, known, decoding, config.integration, seed, device)


@torch.inference_mode()
def chances(student: Any, known: Language, device: str, places: Places) -> Array:
    """A student's probability of every sentence's own token at every place, given those at `places`: float64 [M, L], 1 at these."""
    ids_ML = torch.from_numpy(known.ids_ML)
    rows_MP = blank_rows(student, len(ids_ML), known.length + 1, BOS)
    rows_MP[:, [at + 1 for at in places]] = ids_ML[:, list(places)]
    rows_UP, which_M = rows_MP.unique(dim=0, return_inverse=True)
    open_O = [at for at in range(known.length) if at not in places]
    p_UOV = student.logits(rows_UP.to(device)).double().softmax(1).view(len(rows_UP), len(open_O), -1).cpu()
    chance_ML = torch.ones(ids_ML.shape, dtype=torch.float64)
    chance_ML[:, open_O] = p_UOV[which_M].gather(2, ids_ML[:, open_O, None])[..., 0]
    found: Array = chance_ML.numpy()
    return found


@torch.inference_mode()
def _accepted(config: TruthConfig, known: Language, student: Any, seed: int) -> Array:
    """Tokens of one call's draft that the teacher accepts, float64 by draw of noise; one exact value without noise.

    With the teacher's noise: how many of the draft's most likely tokens are those that the teacher writes from the same noise.
    With noise that says nothing, or none: the expected number under the rule of speculative sampling.
    """
    device, found = device_of(config.device), []
    for sequence_id_B in torch.arange(1 if student.noise.kind == "none" else config.integration).split(_DRAWS_AT_ONCE):
        if student.noise.kind in KNOWS_NOTHING:
            ids_BL = blank_rows(student, len(sequence_id_B), known.length + 1, BOS).to(device)
            q_NV = last_call(student, ids_BL, sequence_id_B.to(device), seed, Decoding(1))[1].double().softmax(1)
            found.append(accepted(known, q_NV.view(len(sequence_id_B), known.length, -1).cpu().numpy()))
        else:
            draft_BL = draw_rows(student, Decoding(1, output="argmax"), seed, BOS, device, sequence_id_B).cpu()
            own_BL = known.rollout(sequence_id_B, known.length + 1, seed)
            found.append((draft_BL == own_BL)[:, 1:].int().cumprod(1).sum(1).double().numpy())
    return np.concatenate(found)
