"""Is the text of a sequential dataset what its teacher writes from its noise? One parallel forward over the rows answers.

Generation went token by token with a KV cache, replay sees whole rows: the same function in another order of additions. So

    float64             every token comes back
    float32             every token, except where the written one and the best differ by less than 1e-4 in log p + g (listed)
    bfloat16, float16   the rate of divergence is the report: rounding of the logits is as large as the gaps

of the coarser of the dtypes of writing and replaying. In the first two the recorded log-probs must agree as well.
Shapes: B rows, L block length, N positions with noise, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from noise import philox
from noise.dataset import Manifest, Plan
from noise.folder import Folder, Where
from noise.identity import differences
from noise.shard import Rows, ShardMetadata, ShardReader
from noise.storage import DatasetError
from pipeline import config
from pipeline.generate import Choice
from pipeline.progress import Progress
from pipeline.teacher import Teacher, describe
from pipeline.tokenizer import Tokenizer

NEAR_TIE = 1e-4
"""Nats between the written token's score and the best one's, below which float32 may decide either way."""
LOG_PROB_TOLERANCE = 1e-3
"""Nats between a recorded log-prob and the replayed one, in float32 and float64."""


@dataclass
class Report:
    """What a replay found."""

    folder: Folder
    dtype: str
    tolerance: float | None
    """Difference of scores that is excused; None where only the rate is reported."""
    rows: int = 0
    positions: int = 0
    differ: int = 0
    failures: int = 0
    first_failure: str = ""
    near_ties: list[str] = field(default_factory=list)
    log_prob_error: float = 0.0
    """Largest difference of a recorded log-prob, nats."""

    def in_words(self) -> str:
        rate = f"{self.differ / max(self.positions, 1):.2%}"
        ties = f", {len(self.near_ties):,} of them near ties" if self.tolerance else ""
        return (
            f"{self.folder}: {self.positions:,} positions of {self.rows:,} rows in {self.dtype}: {self.differ:,} differ ({rate}){ties}; "
            f"log_prob within {self.log_prob_error:.1e}"
        )

    def add(self, metadata: ShardMetadata, first_row: int, rows: Rows, teacher: Teacher, choice: Choice) -> None:
        """Replay a few rows of a shard."""
        self.rows += len(rows)
        L = metadata.block_length
        ids_BL = torch.from_numpy(rows.input_ids.astype(np.int64))
        at_N = torch.from_numpy(np.flatnonzero(rows.has_noise("sequential")))
        sequence_N = torch.from_numpy(rows.sequence_id.view(np.int64).copy())[at_N // L]
        rows_N5 = philox.rows(int(metadata.seed), sequence_N, at_N % L)
        token_N, log_prob_N = ids_BL.flatten()[at_N], torch.from_numpy(rows.log_prob.astype(np.float32).reshape(-1))[at_N]
        for part, logits_NV in teacher.logits(ids_BL, at_N - 1):
            scores_NV, log_probs_NV = choice.scores(logits_NV, rows_N5[part].to(logits_NV.device))
            written_N1 = token_N[part, None].to(logits_NV.device)
            best_N, chosen_N = scores_NV.max(-1)
            lost_N = best_N - scores_NV.gather(1, written_N1)[:, 0]
            error_N = (log_probs_NV.gather(1, written_N1)[:, 0].cpu() - log_prob_N[part]).abs().nan_to_num(torch.inf)
            self._count(metadata.shard, first_row + at_N[part] // L, at_N[part] % L, token_N[part], chosen_N.cpu(), lost_N.cpu(), error_N)

    def _count(self, shard: int, row_N: torch.Tensor, position_N: torch.Tensor, token_N: torch.Tensor, chosen_N: torch.Tensor,
               lost_N: torch.Tensor, error_N: torch.Tensor) -> None:  # fmt: skip
        self.positions += len(row_N)
        self.log_prob_error = max(self.log_prob_error, float(error_N.max()) if len(error_N) else 0.0)
        differs_N = token_N != chosen_N
        self.differ += int(differs_N.sum())
        if self.tolerance is None:
            return
        fails_N = (differs_N & ~(lost_N < self.tolerance)) | (error_N > LOG_PROB_TOLERANCE)
        self.failures += int(fails_N.sum())
        for at in (differs_N | fails_N).nonzero()[:, 0].tolist():
            line = f"shard {shard}, row {int(row_N[at])}, position {int(position_N[at])}: "
            line += f"token {int(token_N[at])} was written, {int(chosen_N[at])} is chosen, {float(lost_N[at]):.1e} apart"
            if not fails_N[at]:
                self.near_ties.append(line)
            elif not self.first_failure:
                self.first_failure = f"{line}, log_prob off by {float(error_N[at]):.1e}"


def replay(where: Where, model: str | None = None, dtype: str | None = None, rows: int | None = None) -> Report:
    """Replay about `rows` rows, some of every shard (None: all), with the teacher at `model` (None: where the plan saw it).

    Raises DatasetError when the dataset was not written by a teacher, or this teacher has other weights.
    """
    folder = Folder.of(where)
    plan, manifest = Plan.read(folder), Manifest.read(folder)
    identity = manifest.identity
    if identity["extraction"] != "sequential" or "generation" not in identity:
        raise DatasetError(f"{folder} has extraction {identity['extraction']}: there is no generation to replay; `verify` checks such a dataset")
    settings = teacher_of(plan, model, dtype)
    teacher = Teacher(settings, identity["vocab_size"], "cuda" if torch.cuda.is_available() else "cpu")
    choice = Choice.of(identity, Tokenizer(folder.fetched("tokenizer")), teacher.device)
    report = Report(folder, settings.dtype, tolerance(settings.dtype, identity["teacher"]["dtype"]))
    every = max(1, manifest.totals["rows"] // rows) if rows else 1
    with Progress("replay", "shards", len(manifest.receipts), manifest.totals["tokens"]) as progress:
        for receipt in manifest.receipts:
            reader = manifest.open(folder, receipt)
            before = report.positions
            for first, part in _chosen(reader, plan.environment["numerics"]["micro_batch"], every):
                report.add(reader.metadata, first, part, teacher, choice)
            progress.advance(work=receipt.tokens, tokens=report.positions - before)
    return report


def tolerance(*dtypes: str) -> float | None:
    """The difference of scores that these dtypes excuse; None where no difference fails."""
    if not set(dtypes) <= {"float32", "float64"}:
        return None
    return NEAR_TIE if "float32" in dtypes else 0.0


def teacher_of(plan: Plan, model: str | None, dtype: str | None) -> config.Teacher:
    """The dataset's teacher as it was, but where it lies now and the dtype. Raises DatasetError by field when it is another."""
    identity, numerics = plan.identity["teacher"], plan.environment["numerics"]
    model = model or plan.environment["teacher"]
    settings = config.Teacher(
        model=model,
        revision=None if Path(str(model)).is_dir() else identity["revision"],
        dtype=dtype or identity["dtype"],
        attention=numerics["attention"],
        micro_batch=numerics["micro_batch"],
        temperature=identity["temperature"],
    )
    found = describe(settings)[0]
    changed = [line for name in ("weights_sha256", "config_sha256") for line in differences(found[name], identity[name], f"teacher.{name}")]
    if changed:
        raise DatasetError(f"{model} is not the teacher that wrote this dataset: {'; '.join(changed)}; give its own with --teacher.model")
    return settings


def _chosen(reader: ShardReader, size: int, every: int) -> Iterator[tuple[int, Rows]]:
    """(number of the first row, at most `size` rows): every `every`-th such piece of a shard, the first among them."""
    seen = pieces = 0
    for rows in reader:
        for start in range(0, len(rows), size):
            if pieces % every == 0:
                yield seen + start, rows[start : min(start + size, len(rows))]
            pieces += 1
        seen += len(rows)
