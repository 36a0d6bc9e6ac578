"""What `accept` writes: how rows begin and how long they become, the noise that decides them, and the distribution that is sampled.

Samples: BOS or prompts, with the noise of samples (stream). Rows of a dataset: its own noise, posterior or the one that wrote it, under which its own
teacher writes exactly its text: the same measure on held-out text.
Shapes: B rows, P longest prompt, L positions, N positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from eval.causal import CausalLM, load_tokenizer
from eval.cautions import teacher_temperature
from eval.config import AcceptConfig
from eval.decoding import Decoding, restricted_log_probs
from eval.prompts import Prompts, prefix_lengths
from eval.referee import LogProbs, NoiseAt, prior
from eval.tables import digest
from noise.storage import DatasetError
from pipeline.generate import Choice
from pipeline.tokenizer import Tokenizer
from trainer.data import NoiseDataset


@dataclass(frozen=True)
class Begun:
    """A batch of rows to be written."""

    given_BP: Tensor
    """int64; the row's first tokens"""
    given_B: Tensor
    """int64: how many of them are given, at least 1"""
    limit_B: Tensor
    """int64: tokens of the finished row"""
    sequence_id_B: Tensor
    noise: NoiseAt
    text_BL: Tensor | None
    """int64: what the teacher of the dataset writes from this noise"""


class Source(Protocol):
    length: int
    """positions of the longest row"""
    count: int
    """how many rows there are; 0: as many as are asked for"""
    temperature: float
    request: dict[str, Any]
    """what decides the rows, for a request"""

    def log_probs(self) -> LogProbs: ...

    def begin(self, number_B: Tensor) -> Begun:
        """Rows of these numbers, from 0 on."""


def source_of(config: AcceptConfig, teacher: CausalLM, longest: Mapping[str, int | None]) -> Source:
    """What a config asks for. `longest`: positions that each model reads at most. Raises DatasetError or ValueError for what does not fit."""
    limits = {name: limit for name, limit in longest.items() if limit}
    found = Heldout(config.rows, str(teacher.device)) if config.rows else None
    length = found.length if found else config.length or min(limits.values(), default=0)
    for name, limit in limits.items():
        if length > limit:
            raise ValueError(f"rows have {length} positions, and {name} reads {limit}; give shorter rows, or leave it out")
    if found is None:
        return _samples(config, teacher, length)
    if found.vocab_size != teacher.vocab_size:
        raise DatasetError(f"rows {config.rows}: vocab_size is {found.vocab_size} there, {teacher.vocab_size} of the teacher {teacher.name}")
    return found


def _samples(config: AcceptConfig, teacher: CausalLM, length: int) -> Samples:
    if length < 2:
        raise ValueError(f"length is {length}; it must be at least 2: BOS and a token")
    tokenizer: Any = load_tokenizer(config.tokenizer or config.teacher) if config.prompts or config.bos < 0 else None
    bos = config.bos if config.bos >= 0 else tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if bos is None or not 0 <= bos < teacher.vocab_size:
        raise ValueError(f"BOS is {bos}, not a token of the teacher's vocabulary of {teacher.vocab_size}; set --bos")
    prompts = Prompts.read(Path(config.prompts), tokenizer, bos, teacher.vocab_size, length) if config.prompts else Prompts.bare(bos, length)
    decoding = Decoding(1, config.temperature, nucleus=config.nucleus, top_k=config.top_k)
    return Samples(prompts, decoding, config.seed, teacher.vocab_size, str(teacher.device), bool(config.prompts))


class Samples:
    """Samples of the teacher, from BOS or from prompts."""

    def __init__(self, prompts: Prompts, decoding: Decoding, seed: int, vocab_size: int, device: str, from_file: bool):
        self._prompts, self._decoding, self._seed, self._vocab_size, self._device = prompts, decoding, seed, vocab_size, device
        self._prefix_P = prefix_lengths(prompts)
        self.length, self.count, self.temperature = prompts.given_PL.shape[1], len(prompts.given_PL) if from_file else 0, decoding.temperature
        self.request = {
            "seed": str(seed), "given": digest(prompts.given_PL.numpy()), "lengths": digest(prompts.length_P.numpy()), "decoding": decoding.request(),
        }  # fmt: skip

    def log_probs(self) -> LogProbs:
        return lambda logits_NV: restricted_log_probs(logits_NV, self._decoding)

    def begin(self, number_B: Tensor) -> Begun:
        given_BL, length_B = self._prompts.rows(number_B)
        prefix_B = self._prefix_P[number_B % len(self._prefix_P)]
        given_BP, prefix_B, length_B, number_B = (part.to(self._device) for part in (given_BL.clamp_min(0), prefix_B, length_B, number_B))
        return Begun(given_BP, prefix_B, length_B, number_B, prior(self._seed, number_B, self._vocab_size), None)


class Heldout:
    """Rows of a noise dataset, in order."""

    def __init__(self, path: str, device: str):
        """Raises DatasetError for a dataset without noise."""
        self._dataset, self._device = NoiseDataset(path), torch.device(device)
        if self._dataset.extraction == "none":
            raise DatasetError(
                f"{path} has tokens but no noise (extraction: none); give rows that were extracted with the teacher, or leave rows empty"
            )
        self.length, self.count, self.vocab_size = self._dataset.block_length, len(self._dataset), self._dataset.codec.vocab_size
        self.temperature = teacher_temperature(self._dataset.manifest.identity)
        self.request = {"rows": self._dataset.manifest.root_hash}

    def log_probs(self) -> LogProbs:
        """Of the dataset's teacher: its temperature, and for text that it wrote the tokens that it never chooses."""
        identity = self._dataset.manifest.identity
        if "generation" in identity:
            return Choice.of(identity, Tokenizer(Path(self._dataset.folder) / "tokenizer"), self._device).log_probs
        return lambda logits_NV: restricted_log_probs(logits_NV, Decoding(1, self.temperature))

    def begin(self, number_B: Tensor) -> Begun:
        batch = self._dataset.batch(number_B.numpy().astype(np.int64)).to(self._device)
        valid_BL = batch.valid_BL
        given_B = torch.where(valid_BL.any(1), valid_BL.int().argmax(1), batch.length_B)

        def noise(row_N: Tensor, position_N: Tensor) -> Tensor:
            """0 where the dataset has none, which no token depends on."""
            g_NV = torch.zeros(len(row_N), batch.codec.vocab_size, device=self._device)
            at_N = (position_N < self.length).nonzero()[:, 0]
            at_N = at_N[valid_BL[row_N[at_N], position_N[at_N]]]
            g_NV[at_N] = batch.noise_at(row_N[at_N] * self.length + position_N[at_N])
            return g_NV

        text_BL = batch.input_ids_BL.masked_fill(torch.arange(self.length, device=self._device) >= batch.length_B[:, None], 0)
        return Begun(batch.input_ids_BL, given_B, batch.length_B, batch.sequence_id_B, noise, text_BL)
