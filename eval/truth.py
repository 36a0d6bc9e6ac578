"""Where factorised decoding fails, and how much of it noise repairs: students of languages of which everything is known.

Each language (see languages) has an exact teacher that writes a noise dataset. Students that differ in `noise` alone are
trained on it (see taught), for every language and every seed, and sampled at several numbers of function evaluations (NFE).
Whether a sample is a sentence and how the joint should look is known; so is what a student without noise could reach at best
(see factorised).

    python -m eval truth --config recipes/demo_truth.yaml

Beside the samples of every NFE two more measures of one call are taken: how much of a held-out row comes back from its
noise, and how many tokens of a draft the teacher accepts.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval import tables
from eval.causal import folder_identity
from eval.decoding import Decoding
from eval.exact import BOS
from eval.factorised import Places, accepted, factorised, valid_and_distance
from eval.languages import LANGUAGES, Language, language
from eval.metrics import Array
from eval.reconstruct import reconstruct
from eval.sampler import blank_rows, sampling_noise
from eval.study import device_of, load_masked
from eval.taught import KNOWS_NOTHING, Taught, TaughtConfig, make_all
from eval.truth_figures import Measured, Report, report
from trainer.data import NoiseDataset

_CONTROL_ROWS = 256  # draws of noise behind the accepted tokens of a student whose noise knows nothing


@dataclass(kw_only=True)
class TruthConfig(TaughtConfig):
    """Students of small languages of which everything is known."""

    languages: list[str] = field(default_factory=lambda: list(LANGUAGES))
    """Which languages: cities, arithmetic, brackets, maze."""
    nfe: list[int] = field(default_factory=lambda: [1, 2, 3, 4])
    """Numbers of function evaluations."""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    """Each names texts, initial weights, order, masks and samples of one run of everything."""
    pictures: str = ""
    """Folder of the pictures; empty: output."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("languages", "seeds"):
            if not getattr(self, name) or len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; give at least one, each once")
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
    """Make the datasets, the students and the samples that are missing, and compute every figure."""
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
    """What one trained student did; drawn once."""
    taught = config.taught(name, seed)
    samples = {nfe: taught.sampled(system, config.decoding(system, nfe)) for nfe in config.nfe}
    about = {"student": folder_identity(taught.student(system)), "seed": str(seed)}
    heldout = {**about, "rows": config.heldout_rows}
    returned_S = _kept(taught.folder / "reconstruction", system, heldout, lambda: _reconstructed(taught, system))
    drafts = {**about, "sequences": config.sequences}
    accepted_S = _kept(taught.folder / "acceptance", system, drafts, lambda: _accepted(taught, system))
    if config.systems[system].kind != "none":
        return Measured(samples, returned_S, accepted_S)
    asked = {**about, "nfe": config.nfe}
    computed_F2 = _kept(taught.folder / "computed", system, asked, lambda: _computed(taught, system, config.nfe))
    return Measured(samples, returned_S, accepted_S, dict(zip(config.nfe, computed_F2.tolist(), strict=True)))


def _kept(folder: Path, name: str, request: dict[str, Any], make: Any) -> Array:
    path = tables.piece(folder, name, request)
    if not path.exists():
        tables.write(path, {"value": make()}, request)
    return tables.read(path)[0]["value"]


def _reconstructed(taught: Taught, system: str) -> Array:
    """Share of each held-out row's tokens that one call gives back, float64 [S]."""
    device = device_of(taught.config.device)
    heldout = NoiseDataset(taught.folder / "heldout")
    return reconstruct(load_masked(str(taught.student(system)), device), heldout, taught.config.heldout_rows, 1, "random", taught.seed, device)


def _computed(taught: Taught, system: str, nfe: list[int]) -> Array:
    """Share of sentences and total variation of what a student without noise writes in so many calls, summed over all ways to write each: [F, 2]."""
    known, device = taught.teacher, device_of(taught.config.device)
    assert isinstance(known, Language)
    given = functools.cache(functools.partial(chances, load_masked(str(taught.student(system)), device), known, device))
    return np.array([valid_and_distance(known, factorised(known, calls, given)) for calls in nfe])


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


def _accepted(taught: Taught, system: str) -> Array:
    """Tokens of one call's draft that the teacher accepts, float64.

    With the teacher's noise, [S]: how many of the draft's most likely tokens are those that the teacher writes from the same noise.
    Without, the expected number under the rule of speculative sampling: one exact value, or one for each draw of the control's noise.
    """
    teacher = taught.teacher
    assert isinstance(teacher, Language)
    if taught.config.systems[system].kind not in KNOWS_NOTHING:
        draft_SL = torch.from_numpy(taught.sampled(system, Decoding(1, output="argmax")))
        own_SL = teacher.rollout(torch.arange(taught.config.sequences), taught.length + 1, taught.seed)
        prefix_S: Array = (draft_SL == own_SL)[:, 1:].int().cumprod(1).sum(1).double().numpy()
        return prefix_S
    device = device_of(taught.config.device)
    student = load_masked(str(taught.student(system)), device)
    rows = 1 if student.noise.kind == "none" else min(_CONTROL_ROWS, taught.config.sequences)
    ids_BL = blank_rows(student, rows, taught.length + 1, BOS).to(device)
    sequence_id_B = torch.arange(rows, device=device)
    g_NV = None if student.noise.kind == "none" else sampling_noise(taught.seed, sequence_id_B, ids_BL == student.mask_id, student.vocab_size)
    with torch.inference_mode():
        q_NV = student.logits(ids_BL, g_NV).double().softmax(1)
    return accepted(teacher, q_NV.view(rows, taught.length, -1).cpu().numpy())
