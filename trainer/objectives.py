"""What a student's logits are held against at each position: the token, the teacher, or both, from the same shards.

    nelbo      -log q[x]                        the token; a student weighs it by 1/t or its like, and its sum is its own bound
    token_kd   sum over i of p_i (-log q_i)     the teacher's p(. | text before), which a student weighs in the same way

Of the teacher a dataset has the kept entries, a sample with known inclusion probabilities: `noise.estimate` turns them into
token_kd's value and gradient, without bias over the noise, in one pass over the logits and with no teacher in memory.
Which entries are kept follows from the noise at the position, so a student that sees that noise would be biased: refused.
Sequence-level distillation needs no code: text that the teacher wrote (`pipeline generate`), learnt with noise.kind none. Its weight
beside the others is its dataset's in data.mix.
Shapes: N positions, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from noise import estimate
from noise.sketch import select
from noise.storage import DatasetError
from trainer.batch import Batch
from trainer.config import NoiseConfig, ObjectiveConfig


def check(objective: ObjectiveConfig, noise: NoiseConfig) -> None:
    """Raises ValueError for weights that train nothing, and for token_kd where it would be biased."""
    for name in ("nelbo", "token_kd"):
        if not 0 <= getattr(objective, name) < float("inf"):
            raise ValueError(f"student.objective.{name} is {getattr(objective, name)}; it must be at least 0")
    if objective.nelbo + objective.token_kd == 0:
        raise ValueError("student.objective.nelbo and token_kd are both 0, so nothing would be learnt; set one of them")
    if objective.token_kd and noise.informed:
        raise ValueError(
            f"student.objective.token_kd is {objective.token_kd} and student.noise.kind {noise.kind}: that noise tells which entries were kept, "
            "so the teacher's cross-entropy would be biased; set token_kd to 0, or noise.kind to none or independent"
        )


def check_dataset(objective: ObjectiveConfig, extraction: str, name: str = "the dataset") -> None:
    """Raises DatasetError where token_kd is wanted and the dataset keeps nothing of its teacher."""
    if objective.token_kd and extraction not in ("parallel", "mixed"):
        beside = ", or mix it with extracted text and set nelbo above 0, by which its rows then teach" if extraction == "sequential" else ""
        raise DatasetError(
            f"student.objective.token_kd is {objective.token_kd}, but {name} keeps no entries of a teacher (extraction: {extraction}); "
            f"set token_kd to 0, or extract the text with `python -m pipeline extract`{beside}"
        )


def losses(objective: ObjectiveConfig, logits_NV: Tensor, token_N: Tensor, batch: Batch, where_N: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss [N], its parts [N] by name for the log, without gradient), nats, of logits that stand for tokens int64 [N].

    where_N: int64, the tokens' flat places b L + t in the batch. nelbo is always among the parts, token_kd where it has a weight;
    it is 0 on rows that the teacher wrote, of which nothing is kept.
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() and objective.nelbo > 0):
        nelbo_N = F.cross_entropy(logits_NV, token_N, reduction="none")
    if not objective.token_kd:
        return objective.nelbo * nelbo_N, {"nelbo": nelbo_N.detach()}
    check_dataset(objective, batch.extraction)
    teacher_N = estimate.cross_entropy(logits_NV, token_N, select(batch.sketch, where_N), batch.codec)
    if batch.extraction == "mixed":
        teacher_N = teacher_N * (batch.written_B[where_N // batch.input_ids_BL.shape[1]] == 0)
    return objective.nelbo * nelbo_N + objective.token_kd * teacher_N, {"nelbo": nelbo_N.detach(), "token_kd": teacher_N.detach()}
