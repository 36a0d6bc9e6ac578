"""Students of a teacher that is known exactly: does noise make parallel sampling more consistent? Computed, not judged.

A Markov chain (see markov) writes a noise dataset; students that differ in `noise` alone are trained on it (see taught); each is
sampled at several numbers of function evaluations (NFE); and of every sample set it is known which transitions the teacher
allows, and how the joint of adjacent tokens should look.

    python -m eval chain --config recipes/demo_chain.yaml
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch

from eval.chain_figures import Report, report
from eval.decoding import Decoding
from eval.exact import BOS
from eval.markov import ExactMarginals, MarkovTeacher
from eval.metrics import Array
from eval.sampler import blank_rows, sample
from eval.taught import Taught, TaughtConfig, make_all


@dataclass(kw_only=True)
class ChainConfig(TaughtConfig):
    """Students of an exactly known teacher: a Markov chain."""

    chain: MarkovTeacher = field(default_factory=MarkovTeacher)
    """The teacher."""
    length: int = 16
    """Tokens of a row after BOS."""
    temperatures: list[float] = field(default_factory=lambda: [1.0])
    """Trace every student's sampled output."""
    noise_temperatures: list[float] = field(default_factory=lambda: [1.0])
    """Trace the argmax of students with a readout."""
    replicates: int = 1000
    """Bootstrap replicates behind every interval."""
    seed: int = 1
    """Names texts, initial weights, order, masks and samples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length < 2:
            raise ValueError(f"length is {self.length}; it must be at least 2")
        if self.replicates < 20:
            raise ValueError(f"replicates is {self.replicates}; it must be at least 20")
        if max(self.nfe) > self.length:
            raise ValueError(f"nfe is {self.nfe}; give numbers from 1 to length {self.length}, each once")
        for name in ("temperatures", "noise_temperatures"):
            if not getattr(self, name) or len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; give at least one value, each once")

    @property
    def taught(self) -> Taught:
        return Taught(self, self.folder, self.chain, self.length, self.seed)

    def decodings(self, output: str) -> list[Decoding]:
        """The points of one output: sampled ones are traced by temperature, argmax by noise temperature."""
        if output == "sample":
            return [Decoding(nfe, temperature=value) for nfe in self.nfe for value in self.temperatures]
        return [Decoding(nfe, noise_temperature=value, output="argmax") for nfe in self.nfe for value in self.noise_temperatures]

    def outputs(self, name: str) -> list[str]:
        """argmax where a readout makes it the sample; sampling there adds noise twice, and is shown for comparison."""
        return ["sample", "argmax"] if self.systems[name].readout else ["sample"]


def build(config: ChainConfig) -> Report:
    """Make the dataset, the students and the samples that are missing, and compute every figure."""
    config.taught.write_datasets()
    make_all({f"chain: {name}": functools.partial(_make, config, name) for name in config.systems}, config.workers, config.device)
    sets = {
        (name, output): {decoding: config.taught.sampled(name, decoding) for decoding in config.decodings(output)}
        for name in config.systems
        for output in config.outputs(name)
    }
    return report(config, sets, {nfe: limit_samples(config, nfe) for nfe in config.nfe})


def _make(config: ChainConfig, name: str) -> None:
    config.taught.make(name, [decoding for output in config.outputs(name) for decoding in config.decodings(output)])


def limit_samples(config: ChainConfig, nfe: int) -> Array:
    """Tokens int32 [S, L] of exact marginals."""
    limit = ExactMarginals(config.chain, config.length + 1)
    rows_BL = blank_rows(limit, config.sequences, limit.block_length, BOS)
    drawn: Array = sample(limit, rows_BL, torch.arange(config.sequences), config.seed, Decoding(nfe)).numpy()
    return drawn
