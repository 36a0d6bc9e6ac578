"""What writes a row's tokens from left to right: a causal LM alone, with the heads of a medusa student, or with another student that drafts.

Writers as in writers, whose Writer they are. Shapes: B rows, L positions.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval import drafting
from eval.causal import CausalLM, folder_identity, model_identity
from eval.config import SampleConfig
from eval.decoding import Decoding
from eval.given import GivenTeacher, given_teacher
from eval.prompts import Prompts, prefix_lengths
from eval.speculative import Drafter
from eval.study import device_of
from trainer.students import load_student


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
        self.limit = config.student
        self.longest = about["block_length"] if about else self.lm.max_length or 2**24
        self.tokenizer = trained_tokenizer(about["provenance"]) if about else config.student

    def settings(self) -> dict[str, Any]:
        return _settings(self.decoding, self.lm)

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
    given_teacher: GivenTeacher | None = None
    asked = 0

    def settings(self) -> dict[str, Any]:
        return _settings(self.decoding, self.lm)

    def prepare(self, prompts: Prompts) -> None:
        prefix_lengths(prompts)
        if self.given_teacher:
            self.given_teacher.check(prompts.given_PL)

    def __call__(self, given_BL: Tensor, length_B: Tensor, sequence_id_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        given_BL, length_B, sequence_id_B = (part.to(self.lm.device) for part in (given_BL, length_B, sequence_id_B))
        given_B = prefix_lengths(Prompts(given_BL, length_B))
        given = self.given_teacher(given_BL, sequence_id_B, self.seed) if self.given_teacher else None
        written = drafting.write_drafted(
            self.lm, self.drafter, self.block, self.decoding, self.seed, given_BL.clamp_min(0), given_B, length_B, sequence_id_B, given
        )
        wide = given_BL.shape[1] - written.ids_BL.shape[1]
        return torch.nn.functional.pad(written.ids_BL, (0, wide)), length_B, written.calls_B


class MedusaWriter(_Drafted):
    """The backbone of a medusa student, for which its heads draft; read in the student's own dtype."""

    def __init__(self, config: SampleConfig):
        _refuse_masked_settings(config, "has heads on a causal LM, which fill no masks")
        self.student, self.seed = loaded(config.student, device_of(config.device)), config.seed
        _refuse_argmax(config, f"take the backbone itself, {self.student.base.folder}")
        self.lm, self.drafter = drafting.with_heads(self.student, device_of(config.device))
        self.block, self.decoding = self.drafter.most, Decoding(1, config.temperature, nucleus=config.nucleus, top_k=config.top_k)
        self.vocab_size, self.longest, self.label = self.lm.vocab_size, self.student.block_length, "drafted-by-heads"
        self.limit = config.student
        self.identity = folder_identity(Path(config.student))
        self.tokenizer = trained_tokenizer(self.student.provenance) or self.lm.name


class DraftedWriter(_Drafted):
    """A causal LM or an `ar` student, for which another student drafts."""

    def __init__(self, config: SampleConfig, about: dict[str, Any] | None):
        _refuse_masked_settings(replace(config, nfe=0, given_teacher=""), "is a causal LM, which fills no masks")
        _refuse_argmax(config, "drop drafter")
        self.lm, self.seed = CausalLM(config.student, device_of(config.device), packed=config.packed), config.seed
        student = drafting.load(config.drafter, self.lm)
        kind = "a causal LM" if isinstance(student, CausalLM) else student.config.kind
        if config.nfe and kind not in ("mdlm", "bd3lm"):
            raise ValueError(f"nfe is {config.nfe}, but the drafter {config.drafter} is {kind}, which takes what it takes; drop it")
        self.drafter = drafting.drafter_for(student, self.lm, config.nfe or 1, 0)
        self.block, self.decoding = config.block, Decoding(1, config.temperature, nucleus=config.nucleus, top_k=config.top_k)
        self.given_teacher = _given_by(self.lm, student, config)
        self._nfe, self._drafter = config.nfe or 1, drafting.identity_of(config.drafter)
        own = about["block_length"] if about else self.lm.max_length or 2**24
        reads = drafting.longest(student) or own
        self.vocab_size, self.longest, self.limit = self.lm.vocab_size, min(own, reads), config.drafter if reads < own else config.student
        self.identity, self.label = model_identity(config.student), f"drafted-by-{Path(config.drafter).name}"
        self.tokenizer = trained_tokenizer(about["provenance"]) if about else config.student

    def settings(self) -> dict[str, Any]:
        others = {"given_teacher": self.given_teacher.identity} if self.given_teacher else {}
        return {**super().settings(), "drafter": self._drafter, "block": self.block, "nfe": self._nfe, **others}


def _given_by(lm: CausalLM, drafter: Any, config: SampleConfig) -> GivenTeacher | None:
    """The LM itself, as the teacher of its drafter, where it is named. Raises ValueError where another is."""
    about = f"given_teacher is {config.given_teacher!r}, but"
    if config.given_teacher and Path(config.given_teacher) != Path(config.student):
        raise ValueError(f"{about} drafts are judged by {config.student}; give that one, or drop it")
    if config.given_teacher and isinstance(drafter, CausalLM):
        raise ValueError(f"{about} the drafter {config.drafter} is a causal LM, which reads no noise; drop it")
    return given_teacher(config, drafter, str(lm.device), lm)


def _settings(decoding: Decoding, lm: CausalLM) -> dict[str, Any]:
    chosen = {name: getattr(decoding, name) for name in ("temperature", "nucleus", "top_k", "output")}
    return {**chosen, **({"packed": True} if lm.packed else {})}


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


def trained_tokenizer(provenance: dict[str, Any]) -> str:
    dataset = provenance.get("dataset")
    return str(Path(dataset) / "tokenizer") if dataset and (Path(dataset) / "tokenizer").is_dir() else ""


def loaded(folder: str, device: str) -> Any:
    return load_student(Path(folder), device)
