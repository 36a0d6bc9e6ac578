"""Every setting of an evaluation. The docstring under a field is its help text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class System:
    """One student of a report, traced by several temperatures or several noise temperatures."""

    student: str
    """Folder of a trained mdlm student."""
    temperatures: list[float] = field(default_factory=lambda: [1.0])
    """Divide the logits before sampling; more than one traces the frontier."""
    noise_temperatures: list[float] = field(default_factory=lambda: [1.0])
    """Multiply the noise given to the student; more than one traces the frontier."""
    nucleus: float = 1.0
    """Sample from the smallest set of tokens with at least this probability."""
    output: Literal["auto", "sample", "argmax"] = "auto"
    """auto: argmax where noise.readout made it the sample, else sample."""

    def __post_init__(self) -> None:
        for name in ("temperatures", "noise_temperatures"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} of {self.student} is {values}; give at least one value, each once")
        if len(self.temperatures) > 1 and len(self.noise_temperatures) > 1:
            raise ValueError(f"{self.student} has several temperatures and several noise_temperatures; a frontier is traced by one of them")


@dataclass
class ReportConfig:
    """Students compared at matched entropy, with everything that the comparison needs."""

    output: str
    """Folder of report.md, report.json and report.png; finished pieces are kept in its samples/, scores/ and reconstruction/."""
    systems: dict[str, System]
    """Name in the report -> student and how it is traced."""
    baseline: str
    """The system that all others are compared with."""
    heldout: str
    """Dataset of held-out rows at the students' block length: real text, and the noise that is to be turned back into it."""
    judge: str
    """Causal LM that scores the samples, a folder or hub id; not the teacher that made the noise."""
    teacher: str = ""
    """Causal LM that made the noise: its own samples are a reference line. Empty: left out."""
    control: str = ""
    """The system with noise that knows nothing of the text; systems with noise are compared with it too. Empty: none."""
    tokenizer: str = ""
    """Folder of the students' tokenizer; empty: tokenizer/ in the held-out dataset."""
    nfe: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    """Function evaluations: forwards of the student for one sequence."""
    sequences: int = 1024
    """Sequences behind every figure."""
    reconstruction_rows: int = 512
    """Held-out rows that are reconstructed from their noise; 0: none."""
    reconstruction_order: Literal["random", "confidence"] = "random"
    """Which positions are revealed first in reconstruction."""
    shown: int = 3
    """Sequences shown side by side."""
    shown_nfe: int = 4
    """Their function evaluations; where it is not in nfe, the nearest that is."""
    replicates: int = 1000
    """Bootstrap replicates behind every interval."""
    seed: int = 1
    """Names the samples: noise, order and choices at the output, and the bootstrap."""
    batch: int = 256
    """Sequences sampled together; changes speed and memory, not the text."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""

    def __post_init__(self) -> None:
        for name in [self.baseline] + ([self.control] if self.control else []):
            if name not in self.systems:
                raise ValueError(f"baseline or control is {name!r}, which is not among the systems: {', '.join(self.systems)}")
        if self.control == self.baseline:
            raise ValueError(f"baseline and control are both {self.baseline!r}; the control is the system with independent noise")
        if not self.nfe or min(self.nfe) < 1 or len(set(self.nfe)) < len(self.nfe):
            raise ValueError(f"nfe is {self.nfe}; give numbers from 1 up, each once")
        for name, least in (("sequences", 2), ("replicates", 20), ("batch", 1), ("reconstruction_rows", 0), ("shown", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")


@dataclass
class SampleConfig:
    """Samples of one student."""

    student: str
    """Folder of a trained mdlm student."""
    output: str
    """Folder where the sample set is kept, and found again by the same command."""
    bos: int = -1
    """Token at position 0; -1: BOS of the tokenizer, or EOS where it has none."""
    tokenizer: str = ""
    """Folder of the student's tokenizer; empty: tokenizer/ in the dataset it was trained on."""
    nfe: int = 8
    """Function evaluations: forwards of the student for one sequence."""
    sequences: int = 1024
    """How many."""
    temperature: float = 1.0
    """Divides the logits before sampling."""
    noise_temperature: float = 1.0
    """Multiplies the noise given to the student."""
    nucleus: float = 1.0
    """Sample from the smallest set of tokens with at least this probability."""
    choose: Literal["auto", "sample", "argmax"] = "auto"
    """auto: argmax where noise.readout made it the sample, else sample."""
    order: Literal["random", "confidence"] = "random"
    """Which positions are revealed first."""
    seed: int = 1
    """Names the samples."""
    batch: int = 256
    """Sequences sampled together; changes speed and memory, not the text."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""
    shown: int = 4
    """Sequences printed."""

    def __post_init__(self) -> None:
        if self.sequences < 1 or self.batch < 1:
            raise ValueError(f"sequences is {self.sequences} and batch {self.batch}; both must be at least 1")


@dataclass
class PerplexityConfig(SampleConfig):
    """Generative perplexity, entropy and distinct-n of one student's samples."""

    judge: str = ""
    """Causal LM that scores the samples, a folder or hub id."""
    replicates: int = 1000
    """Bootstrap replicates behind every interval."""


@dataclass
class ReconstructConfig:
    """Token accuracy of one student when all tokens are masked and the posterior noise of held-out rows is given."""

    student: str
    """Folder of a trained mdlm student."""
    heldout: str
    """Dataset of held-out rows with noise."""
    nfe: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    """Function evaluations."""
    rows: int = 512
    """How many held-out rows."""
    order: Literal["random", "confidence"] = "random"
    """Which positions are revealed first."""
    seed: int = 1
    """Names the random order."""
    replicates: int = 1000
    """Bootstrap replicates behind every interval."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""
