"""`verify --deep N`: the teacher itself on N random rows, and the error bound at every entry of its vocabulary, in every draw.

    not kept   0 <= g_decoded - g <= epsilon        kept   -step < g_decoded - g <= 0        token   equal
    argmax(log p + g_decoded) = token

g is Algorithm 1 on this machine's own log-probs, in float64. These rows stand in other micro-batches than when they were
made, perhaps on another machine, so floating point differs: TOLERANCE says by how much an error may lie outside. What is
reported is the worst, and the fit of teacher and corpus on these rows (as in `pilot`). Which rows is drawn anew each time,
so nobody can know beforehand; a seed repeats a choice. Shapes: B rows, L block length, N positions with noise, V vocabulary.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from noise import philox
from noise.dataset import Manifest, Plan
from noise.decode import decode
from noise.folder import Folder, Where
from noise.posterior import posterior_gumbel
from noise.shard import ROWS_PER_BATCH, Rows, ShardMetadata
from noise.sketch import Sketch, select
from noise.storage import DatasetError
from pipeline import replay
from pipeline.pilot import fit_in_words
from pipeline.plan import documents_apart
from pipeline.progress import Progress
from pipeline.teacher import Teacher

TOLERANCE = {"float64": 1e-3, "float32": 1e-3, "bfloat16": 0.5, "float16": 0.1}
"""Nats outside a bound that the teacher's arithmetic excuses; the noise of another text or teacher is wrong by several."""


@dataclass
class Report:
    """What a deep verification found. Errors are g_decoded - g, in nats; each range begins empty."""

    folder: str
    seed: int
    tolerance: float
    epsilon: float
    step: float
    rows: int = 0
    positions: int = 0
    entries: int = 0
    """That were compared: positions x V x draws."""
    unkept: tuple[float, float] = (math.inf, -math.inf)
    kept: tuple[float, float] = (math.inf, -math.inf)
    token: float = 0.0
    failures: int = 0
    first_failure: str = ""
    surprise: list[tuple[float, float, int]] = field(default_factory=list)
    """(sum of -log p, sum of the teacher's entropy, tokens) of each row."""

    @property
    def worst(self) -> float:
        """By how much the worst entry lies outside its bound, nats; 0 where all are within."""
        outside = (-self.unkept[0], self.unkept[1] - self.epsilon, -self.step - self.kept[0], self.kept[1], self.token)
        return max(0.0, *(excess for excess in outside if math.isfinite(excess)))

    def fit(self) -> tuple[float, float]:
        """(-log p(x) - H(p) in nats a token, its standard error with rows as independent)."""
        nll_B, entropy_B, tokens_B = np.array(self.surprise, np.float64).reshape(-1, 3).T
        tokens = max(1.0, float(tokens_B.sum()))
        difference = float((nll_B - entropy_B).sum() / tokens)
        return difference, math.sqrt(float(((nll_B - entropy_B - difference * tokens_B) ** 2).sum())) / tokens

    def in_words(self) -> str:
        if not self.positions:
            return f"{self.folder}: {self.rows:,} rows without a position that has noise: nothing to compare"
        unkept, kept = (f"{low:+.1e} to {high:+.1e}" if low <= high else "none" for low, high in (self.unkept, self.kept))
        return (
            f"{self.folder}: {self.rows:,} random rows (--deep_seed {self.seed}), {self.positions:,} positions, {self.entries:,} entries of noise: "
            f"not kept {unkept} (bound 0 to {self.epsilon}), kept {kept} (bound -{self.step} to 0), token {self.token:.1e}; "
            f"the worst lies {self.worst:.1e} nats outside its bound ({self.tolerance:g} excused), {self.failures:,} positions fail"
        )

    def fit_in_words(self) -> str:
        difference, error = self.fit()
        return f"{difference:+.3f} nats a token (standard error {error:.3f}): {fit_in_words(difference, error)}"

    def add(self, metadata: ShardMetadata, shard_row_B: list[int], rows: Rows, teacher: Teacher) -> None:
        """Compare a few rows of a shard; `shard_row_B` are their numbers in it."""
        has_BL = rows.has_noise("parallel")
        at_N = torch.from_numpy(np.flatnonzero(has_BL))
        L, ids_BL = metadata.block_length, torch.from_numpy(rows.input_ids.astype(np.int64))
        row_N = at_N // L
        sequence_N = torch.from_numpy(rows.sequence_id.view(np.int64).copy())[row_N]
        rows_N5, token_N = philox.rows(int(metadata.seed), sequence_N, at_N % L), ids_BL.flatten()[at_N]
        columns = ((rows.log_prob[has_BL], np.float32), (rows.kept[has_BL], np.int64), (rows.index, np.int64), (rows.code, np.int64))
        sketch = Sketch(*(torch.from_numpy(column.astype(kind)) for column, kind in columns))
        sums_2B = torch.zeros(2, len(rows), dtype=torch.float64)
        for part, log_probs_NV in teacher.log_probs(ids_BL, at_N - 1):
            log_probs_NV = log_probs_NV.cpu().double()
            surprise_N = -log_probs_NV.gather(1, token_N[part, None])[:, 0]
            sums_2B[0].index_add_(0, row_N[part], surprise_N)
            sums_2B[1].index_add_(0, row_N[part], -(log_probs_NV.exp() * log_probs_NV.clamp_min(-1e30)).sum(1))
            small = select(sketch, torch.arange(part.start, part.stop))
            for draw in range(metadata.draws):
                bad_N = self._compare(small, token_N[part], philox.with_draw(rows_N5[part], draw), log_probs_NV, metadata)
                for at in (part.start + bad_N.nonzero()[:, 0]).tolist():
                    self.failures += 1
                    where = f"shard {metadata.shard}, row {shard_row_B[int(row_N[at])]}, position {int(at_N[at] % L)}, draw {draw}"
                    self.first_failure = self.first_failure or where
        self.rows, self.positions = self.rows + len(rows), self.positions + len(at_N)
        tokens_B = has_BL.sum(1).tolist()
        self.surprise += [(float(nll), float(entropy), count) for nll, entropy, count in zip(*sums_2B, tokens_B, strict=True)]

    def _compare(self, sketch: Sketch, token_N: Tensor, rows_N5: Tensor, log_probs_NV: Tensor, metadata: ShardMetadata) -> Tensor:
        """bool [N]: whether a position breaks its bounds by more than is excused, or its token does not win."""
        decoded_NV = decode(sketch, token_N, rows_N5, metadata.codec).double()
        error_NV = decoded_NV - posterior_gumbel(log_probs_NV, token_N, rows_N5)
        token_N1 = token_N[:, None]
        kept_NV = torch.zeros_like(error_NV, dtype=torch.bool)
        kept_NV[torch.repeat_interleave(torch.arange(len(token_N)), sketch.kept_N), sketch.index_K] = True
        free_NV = (~kept_NV).scatter(1, token_N1, False)
        error_N = error_NV.gather(1, token_N1)[:, 0]
        self.entries += error_NV.numel()
        self.unkept, self.kept = _wider(self.unkept, error_NV[free_NV]), _wider(self.kept, error_NV[kept_NV])
        self.token = max(self.token, float(error_N.abs().max()))
        low_NV = torch.where(free_NV, -self.tolerance, -self.step - self.tolerance)
        high_NV = torch.where(free_NV, self.epsilon + self.tolerance, self.tolerance)
        outside_NV = ~((error_NV >= low_NV) & (error_NV <= high_NV))
        outside_N = outside_NV.scatter(1, token_N1, False).any(1) | ~(error_N.abs() <= self.tolerance)
        score_NV = log_probs_NV + decoded_NV
        return outside_N | ~(score_NV.amax(1) - score_NV.gather(1, token_N1)[:, 0] <= self.tolerance)


def _wider(range_: tuple[float, float], values: Tensor) -> tuple[float, float]:
    return (min(range_[0], float(values.min())), max(range_[1], float(values.max()))) if len(values) else range_


def again(where: Where, rows: int, model: str | None = None, seed: int | None = None) -> Report | replay.Report:
    """Run the teacher on random rows. Text that a teacher wrote is replayed instead, some rows of every shard.

    Raises DatasetError when the dataset has no teacher, or the teacher at `model` (None: where the plan saw it) is another one.
    """
    folder = Folder.of(where)
    plan, manifest = Plan.read(folder), Manifest.read(folder)
    identity = manifest.identity
    if identity["extraction"] == "sequential":
        return replay.replay(folder, model, None, rows)
    if identity["extraction"] == "none" or not identity.get("teacher"):
        raise DatasetError(f"{folder} has tokens alone (extraction: none): there is no teacher to run again; leave out --deep")
    settings = replay.teacher_of(plan, model, None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = Teacher(settings, identity["vocab_size"], device, documents_apart(identity))
    seed = secrets.randbits(32) if seed is None else seed
    codec = plan.metadata(0).codec
    report = Report(str(folder), seed, TOLERANCE[settings.dtype], codec.epsilon, codec.step)
    chosen = np.sort(np.random.default_rng(seed).choice(manifest.totals["rows"], min(rows, manifest.totals["rows"]), replace=False))
    size = settings.micro_batch if isinstance(settings.micro_batch, int) else 8
    with Progress("deep verification", "rows", len(chosen), len(chosen)) as progress:
        for metadata, shard_row_B, part in _parts(folder, manifest, chosen, size):
            report.add(metadata, shard_row_B, part, teacher)
            progress.advance(len(part), len(part))
    return report


def _parts(folder: Folder, manifest: Manifest, chosen: np.ndarray, size: int) -> Iterator[tuple[ShardMetadata, list[int], Rows]]:
    """(metadata, numbers in the shard, rows) of the chosen rows of the dataset, at most `size` of one shard at a time."""
    starts = np.cumsum([0] + [receipt.rows for receipt in manifest.receipts])
    shard_B = np.searchsorted(starts, chosen, side="right") - 1
    for shard in np.unique(shard_B).tolist():
        reader = manifest.open(folder, manifest.receipts[shard])
        numbers = (chosen[shard_B == shard] - starts[shard]).tolist()
        for start in range(0, len(numbers), size):
            picked = numbers[start : start + size]
            found = [reader.batch(number // ROWS_PER_BATCH)[number % ROWS_PER_BATCH : number % ROWS_PER_BATCH + 1] for number in picked]
            yield reader.metadata, picked, Rows.concatenate(found)
