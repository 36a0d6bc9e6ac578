"""The pieces of a report: which there are, which are there already, and how each is made.

Everything that can be refused is refused before the first forward. Models are loaded when a piece that needs them is
missing, so a rerun with every piece on disk loads no causal LM. Pieces live in samples/, scores/ and reconstruction/.
"""

from __future__ import annotations

import functools
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval import samples, tables
from eval.causal import CausalLM, folder_identity, load_tokenizer, model_identity
from eval.config import ReportConfig
from eval.decoding import Decoding
from eval.drafting import with_heads
from eval.features import Featuriser
from eval.judge import Judge
from eval.mauve import Histograms, compare
from eval.metrics import Array, Scored
from eval.progress import Progress
from eval.reconstruct import full_rows, returned
from eval.sampler import sampling_noise
from eval.speculative import Drafter
from eval.systems import CAUSAL, Draw, Traced, check_nfe, draw_causal, draw_drafted, draw_masked, is_free, load, resolved, trace
from eval.tables import Request
from eval.timing import REPEATS, machine, seconds
from noise.storage import DatasetError, sha256_file
from trainer.data import NoiseDataset
from trainer.students import load_student

_NOISE_CACHE_BYTES = 2**29


def device_of(name: str) -> str:
    """auto is a GPU where there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def load_masked(folder: str, device: str) -> Any:
    """A student that fills whole rows. Raises DatasetError for one of another kind."""
    student: Any = load_student(Path(folder), device=device)
    if student.config.kind not in ("mdlm", "mtp"):
        raise DatasetError(f"{folder} holds a student of kind {student.config.kind}; masked positions are revealed by kind mdlm or mtp")
    return student


def sample_request(model: Any, decoding: dict[str, Any], seed: int, bos: int, length: int, sequences: int) -> Request:
    """What decides the tokens of a sample set; `model` is the identity of a student or teacher."""
    return {
        "format_version": samples.FORMAT_VERSION, "model": model, "decoding": decoding,
        "seed": str(seed), "bos": bos, "length": length, "sequences": sequences,
    }  # fmt: skip


def draw_rows(student: Any, decoding: Decoding, seed: int, bos: int, device: str, sequence_id_B: Tensor, noise: Any = None) -> Tensor:
    """Rows of these sequence ids; `noise` may hand over noise that was drawn before."""
    return draw_masked(student, decoding, seed, bos, device, sequence_id_B, noise)[0]


class Study:
    """A report's inputs and pieces. Raises DatasetError or ValueError, before any work, for inputs that do not fit together."""

    def __init__(self, config: ReportConfig, show_progress: bool = True):
        self.heldout = NoiseDataset(config.heldout)
        self.vocab_size = self.heldout.codec.vocab_size
        self.config, self.left_out = resolved(config, (self.vocab_size, self.heldout.block_length))
        config = self.config
        self.folder, self.device = Path(config.output), device_of(config.device)
        self.real_SL = full_rows(self.heldout, config.sequences)
        self.bos = int(self.real_SL[0, 0])
        self.students = {name: self._student(name) for name in config.systems}
        self.identities = {name: folder_identity(Path(system.student)) for name, system in config.systems.items()}
        self.judge_identity = model_identity(config.judge)
        self.teacher_identity = model_identity(config.teacher) if config.teacher else None
        self.points = [point for name, system in config.systems.items() for point in trace(name, system, self.students[name], config.nfe)]
        self._noise: dict[int, Tensor] = {}
        self._lms: dict[str, CausalLM] = {}
        self._drafted: dict[str, tuple[CausalLM, Drafter]] = {}
        self.progress = Progress(self._work(), show_progress)

    def _student(self, name: str) -> Any:
        system = self.config.systems[name]
        student = load(name, system, self.device)
        mine, theirs = (student.vocab_size, student.block_length), (self.vocab_size, self.heldout.block_length)
        if mine != theirs:
            raise DatasetError(
                f"system {name}: its student has vocabulary {mine[0]} and block length {mine[1]}, the held-out dataset {self.heldout.folder} has "
                f"{theirs[0]} and {theirs[1]}; compare students and text of one kind"
            )
        check_nfe(name, system, student, self.config.nfe)
        return student

    def _work(self) -> int:
        config = self.config
        sampled = sum((point.nfe or 2) + self.judged for point in self.points) + self.judged
        traced = {(point.system, point.nfe) for point in self.points if config.systems[point.system].swept}
        refined = config.refine * sum((nfe or 2) + self.judged for _, nfe in traced)
        teacher = (2 + self.judged) * (1 + (config.refine > 0) + config.refine) if config.teacher else 0
        timed = config.timing_rows * (REPEATS + 1) * sum(point.nfe or 2 for point in self.timed())
        rebuilt = config.reconstruction_rows * sum(nfe for name in config.systems for nfe in self.rebuilt_at(name))
        return config.sequences * (sampled + refined + teacher) + timed + rebuilt

    @property
    def judged(self) -> int:
        """Units of work for a sequence that is there: its likelihood, and its features."""
        return 1 + bool(self.config.mauve.featuriser)

    def timed(self) -> list[Traced]:
        """The points whose wall time stands for their system and number of forwards: the first of each."""
        return list({(point.system, point.nfe): point for point in reversed(self.points)}.values())[::-1]

    def rebuilt_at(self, name: str) -> list[int]:
        """Numbers of forwards at which held-out rows are reconstructed: none where a system's number is its own, or the data have no noise."""
        system, student = self.config.systems[name], self.students[name]
        asked = system.nfe or self.config.nfe
        if is_free(system, student) or self.heldout.extraction == "none":
            return []
        return [n for n in asked if n < student.block_length or student.config.kind == "bd3lm"]  # steps of a schedule may be more than positions

    def lm(self, name: str) -> CausalLM:
        """A causal LM, loaded once."""
        if name not in self._lms:
            self._lms[name] = CausalLM(name, self.device)
        return self._lms[name]

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
        teacher = self.lm(self.config.teacher)
        if teacher.vocab_size != self.vocab_size:
            raise DatasetError(
                f"teacher {self.config.teacher} has logits {teacher.vocab_size} wide, the dataset {self.vocab_size}; "
                "give the teacher that made the noise"
            )
        return teacher

    def draw(self, point: Traced, cached_noise: bool = True) -> Draw:
        """What draws the rows of a point."""
        config, student, decoding, bos = self.config, self.students[point.system], point.decoding, self.bos
        system = config.systems[point.system]
        if student.config.kind == "ar":
            return lambda ids_B: draw_causal(self.lm(system.student), decoding, config.seed, bos, student.block_length, ids_B)
        if student.config.kind == "medusa":
            lm, heads = self._with_heads(point.system)
            return lambda ids_B: draw_drafted(lm, heads, decoding, config.seed, bos, student.block_length, ids_B.to(self.device))
        auxiliary = self.lm(system.auxiliary) if system.auxiliary else None
        noise = self._cached_noise if cached_noise else None
        return lambda ids_B: draw_masked(student, decoding, config.seed, bos, self.device, ids_B, noise, auxiliary)

    def _with_heads(self, name: str) -> tuple[CausalLM, Drafter]:
        """A medusa system's backbone and heads, once."""
        if name not in self._drafted:
            self._drafted[name] = with_heads(self.students[name], self.device)
        return self._drafted[name]

    def sampled(self, point: Traced) -> tuple[Array, Array]:
        """(tokens int32 [S, L], forwards int32 [S]) of a traced point."""
        config, student = self.config, self.students[point.system]
        request = self._request(point)
        path = tables.piece(self.folder / "samples", point.name, request)
        self.progress.begin(f"{point.system}, NFE {point.nfe or 'its own'}")

        def draw(sequence_id_B: Tensor) -> dict[str, Array]:
            drawn = zip(("input_ids", "nfe"), self.draw(point)(sequence_id_B), strict=True)
            return {name: column.cpu().numpy().astype(np.int32) for name, column in drawn}

        columns = samples.obtain_columns(path, request, config.sequences, config.batch, draw, self._counter(path, point.nfe or 2))
        # sets of an older version hold no counts; their samplers made what they were asked for
        made_S = columns.get("nfe", np.full(config.sequences, point.nfe, np.int32))
        assert columns["input_ids"].shape[1] == student.block_length
        return columns["input_ids"], made_S

    def _request(self, point: Traced) -> Request:
        config, length = self.config, self.heldout.block_length
        decoding = point.decoding.request()
        if self.students[point.system].config.kind in CAUSAL:
            decoding = {name: value for name, value in decoding.items() if name in ("temperature", "nucleus", "top_k", "output")}
        auxiliary = config.systems[point.system].auxiliary
        if auxiliary:
            decoding["auxiliary"] = model_identity(auxiliary)
        return sample_request(self.identities[point.system], decoding, config.seed, self.bos, length, config.sequences)

    def seconds(self, point: Traced) -> Array:
        """Wall time of a sequence in a batch, float64 [repetitions], measured on this machine and kept for it."""
        config = self.config
        request = {**self._request(point), "rows": config.timing_rows, "machine": self.machine}
        path = tables.piece(self.folder / "timing", point.name, request)
        count = functools.partial(self._counter(path, point.nfe or 2), config.timing_rows * (REPEATS + 1))
        if not path.exists():
            self.progress.begin(f"{point.system}, wall time")
            tables.write(path, {"seconds": seconds(self.draw(point, cached_noise=False), config.timing_rows, self.device)}, request)
        count()
        return tables.read(path)[0]["seconds"]

    @functools.cached_property
    def machine(self) -> dict[str, Any]:
        return machine(self.device)

    def mauve(self, name: str, ids_SL: Array) -> Histograms:
        """MAUVE of a set against the real rows; kept by the hashes of both."""
        settings = self.config.mauve
        request = {
            "real": tables.digest(self.real_SL), "ours": tables.digest(ids_SL), "tokenizer": self._tokenizer_identity,
            "settings": asdict(settings) | {"featuriser": self._featuriser_identity},
        }  # fmt: skip
        path = tables.piece(self.folder / "mauve", name, request)
        count = self._counter(path, 1)
        if path.exists():
            count(len(ids_SL))
        else:
            self.progress.begin(f"MAUVE of {name}")
            ours_SD = self._featuriser.features(ids_SL, np.full(len(ids_SL), ids_SL.shape[1]), count)
            found = compare(self._real_features, ours_SD, settings)
            tables.write(path, {"real": found.real_K, "ours": found.ours_K, "value": np.full(len(found.real_K), found.value)}, request)
        columns = tables.read(path)[0]
        return Histograms(columns["real"], columns["ours"], float(columns["value"][0]))

    @functools.cached_property
    def _featuriser_identity(self) -> dict[str, Any]:
        return model_identity(self.config.mauve.featuriser)

    @functools.cached_property
    def _featuriser(self) -> Featuriser:
        return Featuriser(self.config.mauve.featuriser, self.tokenizer, self.vocab_size, self.device, self.config.mauve.pooling)

    @functools.cached_property
    def _real_features(self) -> Array:
        return self._featuriser.features(self.real_SL, np.full(len(self.real_SL), self.real_SL.shape[1]))

    def teacher_samples(self, temperature: float) -> Array:
        """The teacher's own samples of the same noise, int32 [S, L]."""
        config, length = self.config, self.heldout.block_length
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
        """Which tokens come back, int8 [S, L] (see reconstruct.returned), of one system's student."""
        config = self.config
        order = "left_to_right" if self.students[name].ahead else config.reconstruction_order
        request = {
            "student": self.identities[name], "heldout": self.heldout.manifest.root_hash, "nfe": nfe, "columns": "returned",
            "rows": config.reconstruction_rows, "order": order, "seed": str(config.seed),
        }  # fmt: skip
        path = tables.piece(self.folder / "reconstruction", f"{name}-nfe{nfe}", request)
        count = self._counter(path, nfe)
        if path.exists():
            count(config.reconstruction_rows)
            return tables.read(path)[0]["returned"]
        self.progress.begin(f"{name}, noise to text, NFE {nfe}")
        same_SL = returned(self.students[name], self.heldout, config.reconstruction_rows, nfe, order, config.seed, self.device, count)
        tables.write(path, {"returned": same_SL}, request)
        return same_SL

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
