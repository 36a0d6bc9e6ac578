"""The noise of given tokens, for a student that reads the noise of known ones (`noise.known`): their posterior under the teacher of its dataset.

Of the tokens after BOS and before their row's first blank: of the others the teacher, which has not read what stands before them,
knows nothing. The teacher's temperature is the dataset's. The stream's rows are those of prior noise, so a seed names this noise too.
Shapes: B rows, L positions, V vocabulary, N given tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.adaptive import Auxiliary
from eval.causal import CausalLM
from eval.cautions import recorded_teacher, teacher_temperature
from eval.config import SampleConfig
from eval.prompts import BLANK
from eval.stream import NOISE_DRAW
from noise import philox
from noise.posterior import posterior_gumbel
from noise.storage import weights_hash
from trainer.conditioning import KnownNoise


def given_noise(teacher: Auxiliary, temperature: float, given_BL: Tensor, sequence_id_B: Tensor, seed: int) -> KnownNoise | None:
    """Noise under which the teacher chooses the given tokens, float32 [N, V]; None where no token is given."""
    before_BL = ((given_BL == BLANK).cumsum(1) == 0) & (torch.arange(given_BL.shape[1], device=given_BL.device) > 0)
    row_N, position_N = before_BL.nonzero(as_tuple=True)
    if not len(row_N):
        return None
    width = int(position_N.max()) + 1
    read_BP = given_BL[:, :width].clamp_min(0)
    logits_NV = teacher.logits_of(read_BP, row_N * width + position_N).float()
    rows_N5 = philox.rows(seed, sequence_id_B[row_N], position_N, NOISE_DRAW)
    g_NV = posterior_gumbel(torch.log_softmax(logits_NV / temperature, -1), given_BL[row_N, position_N], rows_N5)
    return KnownNoise(row_N * given_BL.shape[1] + position_N, g_NV)


def given_teacher(config: SampleConfig, student: Any, device: str, lm: CausalLM | None = None) -> GivenTeacher | None:
    """The one that a config names, if it does. Raises ValueError, as GivenTeacher does, and where nothing is given."""
    if config.given_teacher and not config.prompts:
        raise ValueError(f"given_teacher is {config.given_teacher!r}, but nothing is given: prompts is empty; give prompts, or drop it")
    return GivenTeacher(config.given_teacher, student, device, lm) if config.given_teacher else None


class GivenTeacher:
    """The teacher of a student's dataset; `lm` is it where it is loaded already. Raises ValueError where its noise would not be read, or where it
    is another model."""

    def __init__(self, name: str, student: Any, device: str, lm: CausalLM | None = None, setting: str = "given_teacher"):
        """`setting`: what named it, for errors."""
        about = f"{setting} is {name!r}, but"
        if not (student.noise.known and student.noise.informed):
            raise ValueError(f"{about} the student reads no posterior noise at known tokens (noise.known, and a noise.kind of the text); drop it")
        self._teacher = lm or CausalLM(name, device)
        if self._teacher.vocab_size != student.vocab_size:
            raise ValueError(
                f"{about} it has a vocabulary of {self._teacher.vocab_size}, the student of {student.vocab_size}; give the teacher of its dataset"
            )
        dataset = student.provenance.get("identity", {})
        expected, found = recorded_teacher(dataset).get("weights_sha256"), weights_hash(Path(name)) if Path(name).is_dir() else None
        if expected and found and found != expected:
            raise ValueError(f"{about} its weights have sha256 {found}, those of the teacher of the student's dataset {expected}; give that one")
        self._temperature = teacher_temperature(dataset)
        self.identity = {**self._teacher.identity, "temperature": self._temperature}

    def check(self, given_PL: Tensor) -> None:
        """Raises ValueError for prompts that the teacher cannot read."""
        most = int(((given_PL == BLANK).cumsum(1) == 0).sum(1).max())
        if self._teacher.max_length is not None and most > self._teacher.max_length:
            raise ValueError(
                f"the teacher {self._teacher.name} has a context of {self._teacher.max_length}, but {most} tokens of a prompt are given; "
                "shorten it, or give it no noise"
            )

    def __call__(self, given_BL: Tensor, sequence_id_B: Tensor, seed: int) -> KnownNoise | None:
        return given_noise(self._teacher, self._temperature, given_BL, sequence_id_B, seed)
