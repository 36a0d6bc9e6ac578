"""`plan --pilot 1000`: the real teacher on so many rows, before a week is spent on all of them.

It says how fast the teacher is here, what a token costs, and how far the corpus is from what the teacher would write.
That last figure is the mean over tokens of -log p(x) - H(p), the teacher's surprise less its own entropy, with a standard
error that takes rows as independent. On the teacher's own samples it is 0 on average at every single position. Elsewhere
it is by how much the noise of the realised token, -log p(x) - log E_0, is higher on average than the same noise in what a
student draws when it samples: how much training and sampling differ. Shapes: B rows, N positions, V vocabulary.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from noise.shard import Rows, ShardMetadata, ShardWriter
from noise.storage import DatasetError
from pipeline import config, estimate
from pipeline.corpus import Document
from pipeline.divide import ShardInput
from pipeline.extract import Job, Scores, rows_with_noise
from pipeline.making import Making
from pipeline.packing import Blocks, Packer
from pipeline.plan import documents_apart

SHARDS = 16
"""That rows are taken from, at most."""


@dataclass(frozen=True)
class Report:
    """What a pilot found."""

    rows: int
    tokens: int
    failures: list[str]
    """Of micro-batches that could not be encoded."""
    device: str
    micro_batch: int
    tokens_a_second: float
    bytes_a_token: float
    kept_a_token: float
    kept_bound: float
    nll: float
    """Nats a token, as the teacher's entropy and their difference."""
    entropy: float
    difference: float
    standard_error: float
    whole: estimate.Estimate
    """The dataset, at the kept entries that were measured."""

    @property
    def hours(self) -> float:
        """Of one worker like this one, for the whole corpus."""
        return self.whole.tokens / self.tokens_a_second / 3600

    def in_words(self) -> str:
        lines = [
            f"pilot: {self.rows:,} rows, {self.tokens:,} tokens, micro-batches of {self.micro_batch} on {self.device}",
            f"  speed   {self.tokens_a_second:,.0f} tokens/s; such a worker takes {self.hours:,.2f} hours for all {self.whole.tokens:,} tokens",
            f"  bytes   {self.bytes_a_token:.1f} a token, {self.kept_a_token:.2f} kept entries (bound {self.kept_bound:.2f}); "
            f"{estimate.human(self.whole.tokens * self.bytes_a_token)} in all",
            f"  fit     NLL {self.nll:.3f}, the teacher's own entropy {self.entropy:.3f} nats a token: "
            f"{self.difference:+.3f} (standard error {self.standard_error:.3f})",
            f"          {self.fit()}",
        ]
        if self.failures:
            lines.append(f"  failed  {len(self.failures)} micro-batches, not counted above; first: {self.failures[0]}")
        return "\n".join(lines)

    def fit(self) -> str:
        """What the difference says."""
        return fit_in_words(self.difference, self.standard_error)


def fit_in_words(difference: float, standard_error: float) -> str:
    """What -log p(x) - H(p) says of teacher and corpus, nats a token."""
    if abs(difference) <= 2 * standard_error:
        return "within its error: to these rows the corpus looks like the teacher's own samples, as the method assumes"
    size = f"{abs(difference):.3f} nats a token"
    if difference > 0:
        return (
            f"the corpus surprises the teacher by {size} more than its own samples would, and the noise of its tokens is higher by as much "
            "than what a student draws when it samples; a teacher of such text, or text that it writes itself (generate), fits better"
        )
    return (
        f"the corpus is {size} easier for the teacher than its own samples (text it knows by heart, or sampled at a lower temperature), "
        "and the noise of its tokens is lower by as much than what a student draws; other text, or another teacher.temperature, fits better"
    )


@dataclass
class Observed:
    """A teacher whose entropies are noted, the time for it taken apart."""

    teacher: Scores
    entropies: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0

    def scores(self, input_ids_BL: Tensor, at_N: Tensor) -> Iterator[tuple[slice, Tensor]]:
        for part, scores_NV in self.teacher.scores(input_ids_BL, at_N):
            _wait(scores_NV)
            began = time.monotonic()
            log_probs_NV = torch.log_softmax(scores_NV.float(), dim=-1)
            self.entropies.append(-(log_probs_NV.exp() * log_probs_NV.clamp_min(-1e30)).sum(1).double().cpu())
            self.seconds += time.monotonic() - began
            yield part, scores_NV

    def make(self, metadata: ShardMetadata, sequence_id_B: np.ndarray, input_ids_BL: Blocks, length_B: Blocks) -> Rows:
        """Rows, and the entropies of their positions or, where it fails, nothing."""
        before = len(self.entropies)
        try:
            return rows_with_noise(metadata, sequence_id_B, input_ids_BL, length_B, self)
        except BaseException:
            del self.entropies[before:]
            raise


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def run(recipe: config.Recipe, job: Job, rows: int) -> Report:
    """The teacher of a recipe on about that many rows of a job, in this process. Raises DatasetError where nothing can be measured."""
    from pipeline.teacher import Teacher

    identity = job.plan.identity
    if identity["teacher"] is None:
        raise DatasetError("noise.extraction is none: there is no teacher to try; drop --pilot, or set noise.extraction to parallel")
    torch.set_num_threads(recipe.teacher.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = Teacher(recipe.teacher, identity["vocab_size"], device, documents_apart(identity))
    job = replace(job, teacher=teacher)
    size = job.plan.environment["numerics"]["micro_batch"]
    if size == config.AUTO:
        size = job.largest_micro_batch()
    name = torch.cuda.get_device_name() if device == "cuda" else f"the CPU, {recipe.teacher.threads} threads"
    return _measure(job, Observed(teacher), rows, size, name)


def _measure(job: Job, teacher: Observed, rows: int, size: int, device: str) -> Report:
    timed: list[tuple[int, float]] = []  # (tokens, seconds) of each micro-batch
    surprise: list[np.ndarray] = []  # (sum of -log p, sum of H, tokens) of each row
    failures: list[str] = []
    made: list[Rows] = []
    fits = size
    for metadata, input_ids_BL, length_B in _sample(job, rows, size):
        for start in range(0, len(length_B), size):
            part = slice(start, start + size)
            teacher.entropies, teacher.seconds = [], 0.0
            making, began = Making(metadata.shard), time.monotonic()
            try:
                found = list(making.micro_batches(metadata, size, input_ids_BL[part], length_B[part], teacher.make))
            except DatasetError as error:
                failures.append(str(error))
                continue
            fits = min(fits, making.micro_batch or size)
            has_noise_BL = found[0].has_noise("parallel")
            timed.append((int(has_noise_BL.sum()), time.monotonic() - began - teacher.seconds))
            entropy_BL = np.zeros(has_noise_BL.shape)
            entropy_BL[has_noise_BL] = torch.cat(teacher.entropies).numpy()
            surprise.append(np.stack([-found[0].log_prob.sum(1, dtype=np.float64), entropy_BL.sum(1), has_noise_BL.sum(1)]))
            made += found
    if not surprise:
        raise DatasetError(f"the pilot could not encode any row; first: {failures[0] if failures else 'the corpus gave none'}")
    nll_B, entropy_B, tokens_B = np.concatenate(surprise, axis=1)
    tokens = int(tokens_B.sum())
    difference = float((nll_B - entropy_B).sum() / tokens)
    deviation = math.sqrt(float(((nll_B - entropy_B - difference * tokens_B) ** 2).sum())) / tokens
    counted = timed[1:] or timed  # the first one warms up
    kept = sum(len(found.entries[0]) for found in made) / tokens
    return Report(
        len(tokens_B), tokens, failures, device, fits, sum(n for n, _ in counted) / sum(seconds for _, seconds in counted),
        _file_bytes(job.plan.metadata(0), made) / tokens, kept, job.plan.metadata(0).codec.expected_kept_bound,
        float(nll_B.sum() / tokens), float(entropy_B.sum() / tokens), difference, deviation, estimate.of_job(job, kept),
    )  # fmt: skip


def _sample(job: Job, rows: int, size: int) -> Iterator[tuple[ShardMetadata, Blocks, Blocks]]:
    """(metadata, input_ids [B, L], length [B]) of the first rows of evenly spaced shards, whole micro-batches where the shards have them."""
    shards = [ShardInput.from_json(shard) for shard in job.plan.shards]
    chosen = estimate.spaced(shards, min(SHARDS, max(1, rows // size)))
    packer, left = Packer.of(job.plan.identity), rows
    for at, source in enumerate(chosen):
        wanted = min(left, -(-(left // (len(chosen) - at)) // size) * size)
        documents: list[Document] = []
        characters, enough = 0, 2 * wanted * packer.block_length
        for document in job.corpus.documents(source.start, source.stop):
            documents.append(document)
            characters += document.characters
            if characters > enough:
                if len(packer.pack(job.tokens(documents)).length_B) > wanted:
                    break
                enough *= 2
        packed = packer.pack(job.tokens(documents))
        taken = slice(0, wanted)
        left -= len(packed.length_B[taken])
        yield job.plan.metadata(shards.index(source)), packed.input_ids_BL[taken], packed.length_B[taken]


def _file_bytes(metadata: ShardMetadata, parts: list[Rows]) -> int:
    """Of one shard that holds all the rows."""
    file = io.BytesIO()
    writer = ShardWriter(file, metadata)
    for rows in parts:
        writer.add(rows)
    writer.close()
    return file.tell()
