"""A drafter for a causal LM, from a folder: a student of another kind, or a smaller causal LM, of the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from eval.causal import CausalLM, folder_identity, model_identity
from eval.decoding import Decoding, restricted_log_probs
from eval.drafters import CausalDrafter, MedusaDrafter, drafter_of
from eval.referee import Held, SharedNoise, prior
from eval.speculative import Drafter, Written, speculate
from noise.identity import differences
from noise.storage import DatasetError, read_json, weights_hash
from pipeline.config import Teacher as TeacherConfig
from pipeline.teacher import locate
from pipeline.tokenizer import tokenizer_hash
from trainer.conditioning import KnownNoise
from trainer.students import load_student


def about(name: str) -> dict[str, Any] | None:
    """What a student's folder says of it; None for a causal LM, an `ar` student among them."""
    path = Path(name) / "student.json"
    found = read_json(path) if path.exists() else None
    return found if found and found.get("kind") != "ar" else None


def identity_of(name: str) -> dict[str, Any]:
    """For a request."""
    return folder_identity(Path(name)) if about(name) else model_identity(name)


def load(name: str, teacher: CausalLM) -> Any:
    """A student, or a causal LM. Raises DatasetError, by field, where its vocabulary is not the teacher's."""
    said = about(name)
    student: Any = load_student(Path(name), str(teacher.device)) if said else CausalLM(name, str(teacher.device))
    ours: dict[str, Any] = {"vocab_size": student.vocab_size}
    theirs: dict[str, Any] = {"vocab_size": teacher.vocab_size}
    tokenizer = (((said or {}).get("provenance") or {}).get("identity") or {}).get("tokenizer")
    folder = _folder(teacher)
    if tokenizer and (folder / "tokenizer.json").exists():
        ours["tokenizer.sha256"], theirs["tokenizer.sha256"] = tokenizer["sha256"], tokenizer_hash(folder)
    if changed := differences(ours, theirs):
        raise DatasetError(
            f"{name} has another vocabulary than the teacher {teacher.name}: {'; '.join(changed)}; give a student of this teacher's tokens"
        )
    return student


def longest(student: Any) -> int | None:
    """Positions that a loaded drafter reads; None where it does not say."""
    return student.max_length if isinstance(student, CausalLM) else int(student.block_length)


def drafter_for(student: Any, teacher: CausalLM, nfe: int, sight: int) -> Drafter:
    """A loaded student as a drafter. Raises DatasetError for a kind that drafts nothing."""
    if isinstance(student, CausalLM):
        return CausalDrafter(student)
    return drafter_of(student, nfe, sight, weights_hash(_folder(teacher)) if student.config.kind == "medusa" else "")


def with_heads(student: Any, device: str) -> tuple[CausalLM, Drafter]:
    """The backbone of a loaded medusa student as a causal LM, read in the student's own dtype, and its heads as that one's drafter."""
    return CausalLM(str(student.base.folder), device, model=student.base.model), MedusaDrafter(student, True)


def write_drafted(
    lm: CausalLM,
    drafter: Drafter,
    block: int,
    decoding: Decoding,
    seed: int,
    given_BP: Tensor,
    given_B: Tensor,
    length_B: Tensor,
    sequence_id_B: Tensor,
    given: KnownNoise | None = None,
) -> Written:
    """What `lm` alone writes from the noise of this seed, after the first given_B tokens of given_BP, int64, up to length_B tokens.

    Of `decoding`, temperature, top_k and nucleus are used. given: as in speculate.
    """
    noise = Held(prior(seed, sequence_id_B, lm.vocab_size), len(given_B), block + 1 + drafter.span, lm.vocab_size, lm.device)
    rule = SharedNoise(lambda logits_NV: restricted_log_probs(logits_NV, decoding), noise, decoding.temperature)
    return speculate(lm, drafter, rule, given_BP, given_B, length_B, block, given)


def _folder(teacher: CausalLM) -> Path:
    return Path(teacher.name) if Path(teacher.name).is_dir() else locate(TeacherConfig(model=teacher.name))[0]
