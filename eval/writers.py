"""Everything that can fill a row's blanks, behind one interface: a masked, block diffusion or mtp student, a causal LM alone or with medusa heads.

A writer is called with given tokens int64 [B, L] (BLANK where one is to be written), lengths and sequence ids, and
returns (tokens int64 [B, L], lengths int64 [B], NFE int64 [B]): a row may end early, and took so many forwards.
Shapes: B rows, L positions.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from eval.ahead import check_ahead, least_forwards, ordered
from eval.blocks import check_blocks, sample_blocks
from eval.causal import CausalLM, folder_identity
from eval.causal_writers import CausalWriter, DraftedWriter, MedusaWriter, loaded, trained_tokenizer
from eval.config import SampleConfig
from eval.decoding import Decoding
from eval.given import given_teacher
from eval.prompts import BLANK, Prompts
from eval.sampler import resolve_output, sample_counted
from eval.study import device_of, load_masked
from noise.storage import DatasetError, read_json

DEFAULT_NFE = 8


class Writer(Protocol):
    vocab_size: int
    longest: int
    """positions of a row, at most"""
    limit: str
    """the model that sets it"""
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
    if kind != "ar" and (config.drafter or config.packed or config.block != SampleConfig.block):
        raise ValueError(
            f"drafter is {config.drafter!r}, packed {config.packed} and block {config.block}, but {config.student} is no causal LM alone; drop them"
        )
    if kind == "bd3lm":
        return BlockWriter(config)
    if config.eos >= 0 or config.keep_blocks:
        raise ValueError(f"eos is {config.eos} and keep_blocks {config.keep_blocks}, but {config.student} does not write in blocks; drop them")
    if kind == "ar":
        return DraftedWriter(config, about) if config.drafter else CausalWriter(config, about)
    return MedusaWriter(config) if kind == "medusa" else MaskedWriter(config)


class MaskedWriter:
    """A masked student with its sampler, or an mtp student, from left to right."""

    def __init__(self, config: SampleConfig):
        self.device, self.seed, self.padded = device_of(config.device), config.seed, False
        self.student = load_masked(config.student, self.device)
        nfe = config.nfe or (DEFAULT_NFE if config.sampler in ("even", "ancestral") else 0)
        self._as_few_as_do = bool(self.student.ahead) and not config.nfe
        self.decoding = _decoding(config, self.student, nfe)
        if bool(config.auxiliary) != (config.sampler == "adaptive"):
            raise ValueError(
                f"sampler is {config.sampler} and auxiliary {config.auxiliary!r}; adaptive needs a small causal LM, the others take none"
            )
        self.auxiliary = CausalLM(config.auxiliary, self.device) if config.auxiliary else None
        self.given_teacher = given_teacher(config, self.student, self.device)
        self.vocab_size, self.longest, self.limit = self.student.vocab_size, self.student.block_length, config.student
        self._name()
        self.identity = folder_identity(Path(config.student))
        self.tokenizer = trained_tokenizer(self.student.provenance)

    def settings(self) -> dict[str, Any]:
        others = {"auxiliary": self.auxiliary, "given_teacher": self.given_teacher}
        return {**self.decoding.request(), **{name: other.identity for name, other in others.items() if other}}

    def prepare(self, prompts: Prompts) -> None:
        self.padded = prompts.padded
        if self.given_teacher:
            self.given_teacher.check(prompts.given_PL)
        most = int((prompts.given_PL == BLANK).sum(1).max())
        if self._as_few_as_do:
            self.decoding = replace(self.decoding, nfe=least_forwards(most, self.student.ahead))
            self._name()
        if self.decoding.sampler == "even" and self.decoding.nfe > most:
            raise ValueError(f"nfe is {self.decoding.nfe} but no row has more than {most} unknown positions; lower nfe")
        check_ahead(self.student, prompts.given_PL == BLANK, prompts.length_P, self.decoding)

    def _name(self) -> None:
        nfe = self.decoding.nfe
        self.asked, self.label = nfe, self.decoding.sampler + (f"-nfe{nfe}" if nfe else "")

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
        self.student = loaded(config.student, self.device)
        if config.auxiliary:
            raise ValueError(f"auxiliary is {config.auxiliary!r}, but a bd3lm student is sampled within blocks, without a small model; drop it")
        self.given_teacher = given_teacher(config, self.student, self.device)
        nfe = config.nfe or (self.student.block_size if config.sampler in ("even", "ancestral") else 0)
        self.decoding = _decoding(config, self.student, nfe)
        if config.eos >= self.student.vocab_size:
            raise ValueError(
                f"eos is {config.eos}, not a token of the student's vocabulary of {self.student.vocab_size}: no row would end; set --eos, or drop it"
            )
        self.eos, self.keep = config.eos if config.eos >= 0 else None, config.keep_blocks or None
        self.vocab_size, self.longest, self.asked = self.student.vocab_size, max(config.length, self.student.block_length), 0
        self.limit, self.label = config.student, f"blocks-{config.sampler}" + (f"-nfe{nfe}" if nfe else "")
        self.identity = folder_identity(Path(config.student))
        self.tokenizer = trained_tokenizer(self.student.provenance)

    def settings(self) -> dict[str, Any]:
        others = {"given_teacher": self.given_teacher.identity} if self.given_teacher else {}
        return {**self.decoding.request(), "block_size": self.student.block_size, "eos": self.eos, "keep_blocks": self.keep, **others}

    def prepare(self, prompts: Prompts) -> None:
        self.padded = prompts.padded
        if self.given_teacher:
            self.given_teacher.check(prompts.given_PL)
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


def _decoding(config: SampleConfig, student: Any, nfe: int) -> Decoding:
    order = ordered(student, config.sampler, config.order)
    return Decoding(
        nfe, config.temperature, config.noise_temperature, config.nucleus, resolve_output(config.choose, student), order,
        config.top_k, config.sampler, config.fresh_noise, config.student_weight, config.lookahead, config.recompute,
    )  # fmt: skip
