"""The pieces of a report: which there are, which are there already, and how each is made.

Everything that can be refused is refused before the first forward. Models are loaded when a piece that needs them is
missing, so a rerun with every piece on disk loads no causal LM. Pieces live in samples/, scores/ and reconstruction/.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval import samples, tables
from eval.causal import CausalLM, folder_identity, load_tokenizer, model_identity
from eval.config import ReportConfig, System
from eval.judge import Judge
from eval.metrics import Array, Scored
from eval.progress import Progress
from eval.reconstruct import full_rows, reconstruct
from eval.sampler import Decoding, blank_rows, resolve_output, sample, sampling_noise
from eval.tables import Request
from noise.storage import DatasetError, sha256_file
from trainer.data import NoiseDataset
from trainer.students import load_student

_NOISE_CACHE_BYTES = 2**29


def device_of(name: str) -> str:
    """auto is a GPU where there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def load_masked(folder: str, device: str) -> Any:
    """An mdlm student. Raises DatasetError for a student of another kind."""
    student: Any = load_student(Path(folder), device=device)
    if student.config.kind != "mdlm":
        raise DatasetError(f"{folder} holds a student of kind {student.config.kind}; the sampler reveals masked positions and takes kind mdlm")
    return student


def sample_request(model: Any, decoding: dict[str, Any], seed: int, bos: int, length: int, sequences: int) -> Request:
    """What decides the tokens of a sample set; `model` is the identity of a student or teacher."""
    return {
        "format_version": samples.FORMAT_VERSION, "model": model, "decoding": decoding,
        "seed": str(seed), "bos": bos, "length": length, "sequences": sequences,
    }  # fmt: skip


def draw_rows(student: Any, decoding: Decoding, seed: int, bos: int, device: str, sequence_id_B: Tensor, noise: Any = None) -> Tensor:
    """Rows of these sequence ids; `noise` may hand over noise that was drawn before."""
    ids_BL = blank_rows(student, len(sequence_id_B), student.block_length, bos).to(device)
    sequence_id_B = sequence_id_B.to(device)
    g_MV = noise(sequence_id_B, ids_BL == student.mask_id) if noise is not None and student.noise.kind != "none" else None
    return sample(student, ids_BL, sequence_id_B, seed, decoding, g_MV)


@dataclass(frozen=True)
class Traced:
    """One point of one system's frontier."""

    system: str
    decoding: Decoding

    @property
    def name(self) -> str:
        swept = f"-t{self.decoding.temperature:g}" if self.decoding.output == "sample" else ""
        return f"{self.system}-nfe{self.decoding.nfe}{swept}-n{self.decoding.noise_temperature:g}"


def trace(system: System, student: Any, nfe: int) -> list[Decoding]:
    """The decodings that trace one system at one NFE. Raises ValueError for settings that this student would ignore."""
    output = resolve_output(system.output, student)
    if student.noise.kind == "none" and system.noise_temperatures != [1.0]:
        raise ValueError(
            f"{system.student} takes no noise (noise.kind: none) but has noise_temperatures {system.noise_temperatures}; trace it by temperatures"
        )
    return [Decoding(nfe, t, n, system.nucleus, output) for t in system.temperatures for n in system.noise_temperatures]


class Study:
    """A report's inputs and pieces. Raises DatasetError or ValueError, before any work, for inputs that do not fit together."""

    def __init__(self, config: ReportConfig, show_progress: bool = True):
        self.config, self.folder, self.device = config, Path(config.output), device_of(config.device)
        self.heldout = NoiseDataset(config.heldout)
        self.vocab_size = self.heldout.codec.vocab_size
        self.real_SL = full_rows(self.heldout, config.sequences)
        self.bos = int(self.real_SL[0, 0])
        self.students = {name: self._student(name) for name in config.systems}
        self.identities = {name: folder_identity(Path(system.student)) for name, system in config.systems.items()}
        self.judge_identity = model_identity(config.judge)
        self.teacher_identity = model_identity(config.teacher) if config.teacher else None
        self.points = [
            Traced(name, d) for nfe in config.nfe for name, system in config.systems.items() for d in trace(system, self.students[name], nfe)
        ]
        self._noise: dict[int, Tensor] = {}
        self.progress = Progress(self._work(), show_progress)

    def _student(self, name: str) -> Any:
        student = load_masked(self.config.systems[name].student, self.device)
        mine, theirs = (student.vocab_size, student.block_length), (self.vocab_size, self.heldout.block_length)
        if mine != theirs:
            raise DatasetError(
                f"system {name}: its student has vocabulary {mine[0]} and block length {mine[1]}, the held-out dataset {self.heldout.folder} has "
                f"{theirs[0]} and {theirs[1]}; compare students and text of one kind"
            )
        if max(self.config.nfe) > student.block_length - 1:
            raise ValueError(
                f"nfe is {self.config.nfe}, but a block of {student.block_length} positions has {student.block_length - 1} unknown ones; lower nfe"
            )
        return student

    def _work(self) -> int:
        config = self.config
        sampled = sum(point.decoding.nfe for point in self.points) + (2 if config.teacher else 0)
        rebuilt = config.reconstruction_rows * len(config.systems) * sum(config.nfe) if self.heldout.extraction != "none" else 0
        return config.sequences * (sampled + len(self.points) + 2) + rebuilt

    @functools.cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.config.tokenizer or str(self.heldout.folder / "tokenizer"))

    @functools.cached_property
    def _tokenizer_identity(self) -> str:
        folder = Path(self.config.tokenizer or self.heldout.folder / "tokenizer")
        return sha256_file(folder / "tokenizer.json") if (folder / "tokenizer.json").exists() else str(folder)

    @functools.cached_property
    def judge(self) -> Judge:
        return Judge(self.config.judge, self.tokenizer, self.vocab_size, self.device)

    @functools.cached_property
    def teacher(self) -> CausalLM:
        teacher = CausalLM(self.config.teacher, self.device)
        if teacher.vocab_size != self.vocab_size:
            raise DatasetError(
                f"teacher {self.config.teacher} has logits {teacher.vocab_size} wide, the dataset {self.vocab_size}; "
                "give the teacher that made the noise"
            )
        return teacher

    @property
    def warnings(self) -> list[str]:
        """What a reader of the report must know."""
        found = []
        if self._judge_made_the_noise():
            found.append("The judge is the teacher that made the noise: it favours students of that noise. Use a causal LM of another seed or size.")
        if len(self.real_SL) < self.config.sequences:
            found.append(
                f"Only {len(self.real_SL)} full rows of held-out text for {self.config.sequences} samples: "
                "the entropy of real text is estimated from fewer tokens and a little too low."
            )
        return found

    def _judge_made_the_noise(self) -> bool:
        weights = list(self.judge_identity.get("weights", {}).values())
        if self.judge_identity == self.teacher_identity or (weights and weights == list((self.teacher_identity or {}).get("weights", {}).values())):
            return True
        teacher = self.heldout.manifest.identity.get("teacher")
        return isinstance(teacher, dict) and weights == [teacher.get("weights_sha256")]

    def sampled(self, point: Traced) -> Array:
        """Tokens int32 [S, L] of a traced point."""
        config, student, decoding = self.config, self.students[point.system], point.decoding
        request = sample_request(self.identities[point.system], asdict(decoding), config.seed, self.bos, student.block_length, config.sequences)
        path = tables.piece(self.folder / "samples", point.name, request)
        self.progress.begin(f"{point.system}, NFE {decoding.nfe}")

        def draw(sequence_id_B: Tensor) -> Tensor:
            return draw_rows(student, decoding, config.seed, self.bos, self.device, sequence_id_B, self._cached_noise)

        return samples.obtain(path, request, config.sequences, config.batch, draw, self._counter(path, decoding.nfe))

    def teacher_samples(self) -> Array:
        """The teacher's own samples of the same noise, int32 [S, L]."""
        config, length = self.config, self.heldout.block_length
        temperature = teacher_temperature(self.heldout)
        request = sample_request(self.teacher_identity, {"temperature": temperature}, config.seed, self.bos, length, config.sequences)
        path = tables.piece(self.folder / "samples", "teacher", request)
        self.progress.begin("the teacher's own samples")

        def draw(sequence_id_B: Tensor) -> Tensor:
            return self.teacher.sample(self.bos, length, sequence_id_B, config.seed, temperature)

        return samples.obtain(path, request, config.sequences, config.batch, draw, self._counter(path, 2))

    def scored(self, name: str, ids_SL: Array) -> Scored:
        """Rows with the judge's likelihoods; kept by the hash of the tokens."""
        request = {"tokens": tables.digest(ids_SL), "judge": self.judge_identity, "tokenizer": self._tokenizer_identity}
        path = tables.piece(self.folder / "scores", name, request)
        length_S = np.full(len(ids_SL), ids_SL.shape[1])
        count = self._counter(path, 1)
        if path.exists():
            columns, _ = tables.read(path)
            count(len(ids_SL))
        else:
            self.progress.begin(f"judging {name}")
            nll_S, tokens_S = self.judge.score(ids_SL, length_S, count)
            columns = {"nll": nll_S, "tokens": tokens_S}
            tables.write(path, columns, request)
        return Scored(ids_SL, length_S, columns["nll"], columns["tokens"])

    def reconstructed(self, name: str, nfe: int) -> Array:
        """Share of tokens that come back, float64 [S], of one system's student."""
        config = self.config
        request = {
            "student": self.identities[name], "heldout": self.heldout.manifest.root_hash, "nfe": nfe,
            "rows": config.reconstruction_rows, "order": config.reconstruction_order, "seed": str(config.seed),
        }  # fmt: skip
        path = tables.piece(self.folder / "reconstruction", f"{name}-nfe{nfe}", request)
        count = self._counter(path, nfe)
        if path.exists():
            count(config.reconstruction_rows)
            return tables.read(path)[0]["share"]
        self.progress.begin(f"{name}, noise to text, NFE {nfe}")
        share_S = reconstruct(
            self.students[name], self.heldout, config.reconstruction_rows, nfe, config.reconstruction_order, config.seed, self.device, count
        )
        tables.write(path, {"share": share_S}, request)
        return share_S

    def _counter(self, path: Path, units: int) -> Any:
        return functools.partial(self.progress.skip if path.exists() else self.progress.advance, each=units)

    def _cached_noise(self, sequence_id_B: Tensor, unknown_BL: Tensor) -> Tensor:
        """All systems, temperatures and NFE see the same noise; it is drawn once while it fits in memory."""
        first = int(sequence_id_B[0])
        held = self._noise.get(first)
        if held is not None and len(held) == int(unknown_BL.sum()):
            return held
        g_MV = sampling_noise(self.config.seed, sequence_id_B, unknown_BL, self.vocab_size)
        if self.config.sequences * self.heldout.block_length * self.vocab_size * 4 <= _NOISE_CACHE_BYTES:
            self._noise[first] = g_MV
        return g_MV


def teacher_temperature(dataset: NoiseDataset) -> float:
    """The temperature that the teacher's logits were divided by, from the dataset's identity; 1 where it names none."""
    teacher = dataset.manifest.identity.get("teacher")
    return float(teacher.get("temperature", 1.0)) if isinstance(teacher, dict) else 1.0
