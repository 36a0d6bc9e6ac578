"""Everything that can fill a row's blanks, behind one interface: a masked or block diffusion student, a causal LM alone or with medusa heads.

A writer is called with given tokens int64 [B, L] (BLANK where one is to be written), lengths and sequence ids, and
returns (tokens int64 [B, L], lengths int64 [B], NFE int64 [B]): a row may end early, and took so many forwards.
Shapes: B rows, L positions.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from eval import drafting
from eval.blocks import check_blocks, sample_blocks
from eval.causal import CausalLM, folder_identity, model_identity
from eval.config import SampleConfig
from eval.decoding import Decoding, restricted_log_probs
from eval.drafters import MedusaDrafter
from eval.given import GivenTeacher
from eval.prompts import BLANK, Prompts, prefix_lengths
from eval.referee import Held, SharedNoise, prior
from eval.sampler import resolve_output, sample_counted
from eval.speculative import Drafter, speculate
from eval.study import device_of, load_masked
from noise.storage import DatasetError, read_json
from trainer.students import load_student

DEFAULT_NFE = 8


class Writer(Protocol):
    vocab_size: int
    longest: int
    """positions of a row, at most"""
    identity: dict[str, Any]
    """the model, for a request"""
    tokenizer: str
    """folder or hub id; empty where it has none"""
    asked: int
    """forwards that were asked for; 0 where the writer takes what it takes"""
    label: str
    """how it writes, for people"""

    def settings(self) -> dict[str, Any]:
        """What decides the tokens besides the model, for a request."""

    def prepare(self, prompts: Prompts) -> None:
        """Told all prompts before the first row. Raises ValueError for those that it cannot fill."""

    def __call__(self, given_BL: Tensor, length_B: Tensor, sequence_id_B: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...


def writer(config: SampleConfig) -> Writer:
    """The student of a config, loaded. Raises DatasetError or ValueError for what cannot be loaded or would be ignored."""
    folder = Path(config.student)
    about = read_json(folder / "student.json") if (folder / "student.json").exists() else None
    if about is None and not (folder / "config.json").exists() and folder.is_dir():
        raise DatasetError(f"{folder} is neither a student (student.json) nor a causal LM (config.json); train one with `python -m trainer`")
    kind = about.get("kind") if about else "ar"
    if kind == "bd3lm" and not (config.drafter or config.packed):
        return BlockWriter(config)
    if config.eos >= 0 or config.keep_blocks:
        raise ValueError(f"eos is {config.eos} and keep_blocks {config.keep_blocks}, but {config.student} does not write in blocks; drop them")
    if kind == "ar":
        return DraftedWriter(config, about) if config.drafter else CausalWriter(config, about)
    if config.drafter or config.packed or config.block != SampleConfig.block:
        raise ValueError(
            f"drafter is {config.drafter!r}, packed {config.packed} and block {config.block}, but {config.student} is no causal LM alone; drop them"
        )
    return MedusaWriter(config) if kind == "medusa" else MaskedWriter(config)


class MaskedWriter:
    """A masked student with its sampler."""

    def __init__(self, config: SampleConfig):
        self.device, self.seed, self.padded = device_of(config.device), config.seed, False
        self.student = load_masked(config.student, self.device)
        nfe = config.nfe or (DEFAULT_NFE if config.sampler in ("even", "ancestral") else 0)
        self.decoding = _decoding(config, self.student, nfe)
        if bool(config.auxiliary) != (config.sampler == "adaptive"):
            raise ValueError(
                f"sampler is {config.sampler} and auxiliary {config.auxiliary!r}; adaptive needs a small causal LM, the others take none"
            )
        self.auxiliary = CausalLM(config.auxiliary, self.device) if config.auxiliary else None
        self.given_teacher = _given_teacher(config, self.student, self.device)
        self.vocab_size, self.longest, self.asked = self.student.vocab_size, self.student.block_length, nfe
        self.label = config.sampler + (f"-nfe{nfe}" if nfe else "")
        self.identity = folder_identity(Path(config.student))
        self.tokenizer = _trained_tokenizer(self.student.provenance)

    def settings(self) -> dict[str, Any]:
        others = {"auxiliary": self.auxiliary, "given_teacher": self.given_teacher}
        return {**self.decoding.request(), **{name: other.identity for name, other in others.items() if other}}

    def prepare(self, prompts: Prompts) -> None:
        self.padded = prompts.padded
        most = int((prompts.given_PL == BLANK).sum(1).max())
        if self.decoding.sampler == "even" and self.decoding.nfe > most:
            raise ValueError(f"nfe is {self.decoding.nfe} but no row has more than {most} unknown positions; lower nfe")

    def __call__(self, given_BL: Tensor, length_B: Tensor, sequence_id_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        given_BL, sequence_id_B = given_BL.to(self.device), sequence_id_B.to(self.device)
        given = self.given_teacher(given_BL, sequence_id_B, self.seed) if self.given_teacher else None
        ids_BL, nfe_B = sample_counted(
            self.student,
            given_BL.masked_fill(given_BL == BLANK, self.student.mask_id),
            sequence_id_B,
            self.seed,
            self.decoding,
            length_B=length_B.to(self.device) if self.padded else None,
            auxiliary=self.auxiliary,
            given=given,
        )
        return ids_BL, length_B, nfe_B


class BlockWriter:
    """A bd3lm student, block after block with a KV cache, to any length."""

    def __init__(self, config: SampleConfig):
        self.device, self.seed, self.padded = device_of(config.device), config.seed, False
        self.student = _load(config.student, self.device)
        if config.auxiliary:
            raise ValueError(f"auxiliary is {config.auxiliary!r}, but a bd3lm student is sampled within blocks, without a small model; drop it")
        self.given_teacher = _given_teacher(config, self.student, self.device)
        nfe = config.nfe or (self.student.block_size if config.sampler in ("even", "ancestral") else 0)
        self.decoding = _decoding(config, self.student, nfe)
        if config.eos >= self.student.vocab_size:
            raise ValueError(
                f"eos is {config.eos}, not a token of the student's vocabulary of {self.student.vocab_size}: no row would end; set --eos, or drop it"
            )
        self.eos, self.keep = config.eos if config.eos >= 0 else None, config.keep_blocks or None
        self.vocab_size, self.longest, self.asked = self.student.vocab_size, max(config.length, self.student.block_length), 0
        self.label = f"blocks-{config.sampler}" + (f"-nfe{nfe}" if nfe else "")
        self.identity = folder_identity(Path(config.student))
        self.tokenizer = _trained_tokenizer(self.student.provenance)

    def settings(self) -> dict[str, Any]:
        others = {"given_teacher": self.given_teacher.identity} if self.given_teacher else {}
        return {**self.decoding.request(), "block_size": self.student.block_size, "eos": self.eos, "keep_blocks": self.keep, **others}

    def prepare(self, prompts: Prompts) -> None:
        self.padded = prompts.padded
        self.asked = self.decoding.nfe * -(-prompts.given_PL.shape[1] // self.student.block_size)
        given_PL = prompts.given_PL.masked_fill(prompts.given_PL == BLANK, self.student.mask_id)
        check_blocks(self.student, given_PL, self.decoding, None, self.keep)

    def __call__(self, given_BL: Tensor, length_B: Tensor, sequence_id_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        given_BL, sequence_id_B = given_BL.to(self.device), sequence_id_B.to(self.device)
        written = sample_blocks(
            self.student,
            given_BL.masked_fill(given_BL == BLANK, self.student.mask_id),
            sequence_id_B,
            self.seed,
            self.decoding,
            length_B=length_B.to(self.device) if self.padded else None,
            eos=self.eos,
            keep=self.keep,
            given=self.given_teacher(given_BL, sequence_id_B, self.seed) if self.given_teacher else None,
        )
        return written.ids_BL, written.length_B, written.nfe_B


class CausalWriter:
    """An `ar` student or any Hugging Face causal LM, token by token with a KV cache."""

    def __init__(self, config: SampleConfig, about: dict[str, Any] | None):
        _refuse_masked_settings(config, "is a causal LM, which writes one token a forward")
        if config.block != SampleConfig.block:
            raise ValueError(f"block is {config.block}, but nobody drafts for {config.student}; drop it, or name a drafter")
        self.lm, self.seed = CausalLM(config.student, device_of(config.device), packed=config.packed), config.seed
        output: Any = "sample" if config.choose == "auto" else config.choose
        self.decoding = Decoding(1, config.temperature, nucleus=config.nucleus, output=output, top_k=config.top_k)
        self.vocab_size, self.identity, self.asked, self.label = self.lm.vocab_size, model_identity(config.student), 0, "token-by-token"
        self.longest = about["block_length"] if about else self.lm.max_length or 2**24
        self.tokenizer = _trained_tokenizer(about["provenance"]) if about else config.student

    def settings(self) -> dict[str, Any]:
        return {name: getattr(self.decoding, name) for name in ("temperature", "nucleus", "top_k", "output")}

    def prepare(self, prompts: Prompts) -> None:
        prefix_lengths(prompts)

    def __call__(self, given_BL: Tensor, length_B: Tensor, sequence_id_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        given_B = prefix_lengths(Prompts(given_BL, length_B))
        ids_BL = self.lm.write(given_BL.clamp_min(0), given_B, given_BL.shape[1], sequence_id_B, self.seed, self.decoding)
        past_BL = torch.arange(ids_BL.shape[1]) >= length_B[:, None]
        return ids_BL.masked_fill(past_BL, 0), length_B, length_B - given_B


class _Drafted:
    """A causal LM that writes what it would write alone from the same seed: a drafter guesses, and NFE counts the calls of the LM.

    Equal to CausalWriter token for token, but at near ties of float rounding (see speculative).
    """

    lm: CausalLM
    drafter: Drafter
    block: int
    seed: int
    decoding: Decoding
    vocab_size: int
    asked = 0

    def settings(self) -> dict[str, Any]:
        return {name: getattr(self.decoding, name) for name in ("temperature", "nucleus", "top_k", "output")}

    def prepare(self, prompts: Prompts) -> None:
        prefix_lengths(prompts)

    def __call__(self, given_BL: Tensor, length_B: Tensor, sequence_id_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        given_BL, length_B, sequence_id_B = (part.to(self.lm.device) for part in (given_BL, length_B, sequence_id_B))
        given_B = prefix_lengths(Prompts(given_BL, length_B))
        span = self.block + 1 + self.drafter.span
        noise = Held(prior(self.seed, sequence_id_B, self.vocab_size), len(given_B), span, self.vocab_size, self.lm.device)
        rule = SharedNoise(lambda logits_NV: restricted_log_probs(logits_NV, self.decoding), noise, self.decoding.temperature)
        written = speculate(self.lm, self.drafter, rule, given_BL.clamp_min(0), given_B, length_B, self.block)
        wide = given_BL.shape[1] - written.ids_BL.shape[1]
        return torch.nn.functional.pad(written.ids_BL, (0, wide)), length_B, written.calls_B


class MedusaWriter(_Drafted):
    """The backbone of a medusa student, for which its heads draft; read in the student's own dtype."""

    def __init__(self, config: SampleConfig):
        _refuse_masked_settings(config, "has heads on a causal LM, which fill no masks")
        self.student, self.seed = _load(config.student, device_of(config.device)), config.seed
        base = self.student.base
        _refuse_argmax(config, f"take the backbone itself, {base.folder}")
        self.lm = CausalLM(str(base.folder), device_of(config.device), model=base.model)
        self.drafter = MedusaDrafter(self.student, True)
        self.block, self.decoding = self.drafter.most, Decoding(1, config.temperature, nucleus=config.nucleus, top_k=config.top_k)
        self.vocab_size, self.longest, self.label = self.lm.vocab_size, self.student.block_length, "drafted-by-heads"
        self.identity = folder_identity(Path(config.student))
        self.tokenizer = _trained_tokenizer(self.student.provenance) or str(base.folder)


class DraftedWriter(_Drafted):
    """A causal LM or an `ar` student, for which another student drafts."""

    def __init__(self, config: SampleConfig, about: dict[str, Any] | None):
        _refuse_masked_settings(replace(config, nfe=0), "is a causal LM, which fills no masks")
        _refuse_argmax(config, "drop drafter")
        if config.block < 1:
            raise ValueError(f"block is {config.block}; it must be at least 1")
        self.lm, self.seed = CausalLM(config.student, device_of(config.device), packed=config.packed), config.seed
        student = drafting.load(config.drafter, self.lm)
        kind = "a causal LM" if isinstance(student, CausalLM) else student.config.kind
        if config.nfe and kind not in ("mdlm", "bd3lm"):
            raise ValueError(f"nfe is {config.nfe}, but the drafter {config.drafter} is {kind}, which takes what it takes; drop it")
        self.drafter = drafting.drafter_for(student, self.lm, config.nfe or 1, 0)
        self.block, self.decoding = config.block, Decoding(1, config.temperature, nucleus=config.nucleus, top_k=config.top_k)
        self._nfe, self._drafter = config.nfe or 1, drafting.identity_of(config.drafter)
        own = about["block_length"] if about else self.lm.max_length or 2**24
        self.vocab_size, self.longest = self.lm.vocab_size, min(own, drafting.longest(student) or own)
        self.identity, self.label = model_identity(config.student), f"drafted-by-{Path(config.drafter).name}"
        self.tokenizer = _trained_tokenizer(about["provenance"]) if about else config.student

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "drafter": self._drafter, "block": self.block, "nfe": self._nfe}


def _refuse_argmax(config: SampleConfig, way_out: str) -> None:
    if config.choose == "argmax":
        raise ValueError(
            f"choose is argmax, but what is drafted for {config.student} are its samples, argmax(log p + g); drop it, set top_k to 1, or {way_out}"
        )


def _refuse_masked_settings(config: SampleConfig, why: str) -> None:
    """Raises ValueError for what only a masked student reads."""
    ignored = {
        "nfe": 0, "sampler": "even", "order": "random", "noise_temperature": 1.0, "fresh_noise": False, "auxiliary": "", "student_weight": 0.5,
        "lookahead": 0, "recompute": 0, "given_teacher": "",
    }  # fmt: skip
    for name, default in ignored.items():
        if getattr(config, name) != default:
            raise ValueError(f"{name} is {getattr(config, name)}, but {config.student} {why}; drop it")


def _decoding(config: SampleConfig, student: Any, nfe: int) -> Decoding:
    return Decoding(
        nfe, config.temperature, config.noise_temperature, config.nucleus, resolve_output(config.choose, student), config.order,
        config.top_k, config.sampler, config.fresh_noise, config.student_weight, config.lookahead, config.recompute,
    )  # fmt: skip


def _given_teacher(config: SampleConfig, student: Any, device: str) -> GivenTeacher | None:
    if config.given_teacher and not config.prompts:
        raise ValueError(f"given_teacher is {config.given_teacher!r}, but nothing is given: prompts is empty; give prompts, or drop it")
    return GivenTeacher(config.given_teacher, student, device) if config.given_teacher else None


def _trained_tokenizer(provenance: dict[str, Any]) -> str:
    dataset = provenance.get("dataset")
    return str(Path(dataset) / "tokenizer") if dataset and (Path(dataset) / "tokenizer").is_dir() else ""


def _load(folder: str, device: str) -> Any:
    return load_student(Path(folder), device)
