"""What a reader of a report must know, in words: a judge that is no judge, too little text, students that were left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eval.config import ReportConfig
from noise.storage import read_json, sha256_text
from trainer.data import NoiseDataset

_FEW_FOR_MAUVE = 500
_JUDGE_IS_TEACHER = "The judge is the teacher that made the noise: it favours students of that noise. Use a causal LM of another seed or size."

Identity = dict[str, Any]


def cautions(config: ReportConfig, heldout: NoiseDataset, real_rows: int, judge: Identity, teacher: Identity | None) -> list[str]:
    """`judge`, `teacher`: what is known of both models (see causal.model_identity)."""
    found = []
    if _made_the_noise(judge, teacher, heldout):
        found.append(_JUDGE_IS_TEACHER)
    if real_rows < config.sequences:
        found.append(
            f"Only {real_rows} full rows of held-out text for {config.sequences} samples: "
            "the entropy of real text is estimated from fewer tokens and a little too low."
        )
    fewest = min(real_rows, config.sequences)
    if config.mauve.featuriser and fewest < _FEW_FOR_MAUVE:
        found.append(f"MAUVE of {fewest} sequences: too few to say much; its authors take 5,000.")
    return found


def cautions_of_one(student: Path, judge: Identity) -> list[str]:
    """The same of one student's perplexity, by the dataset that its student.json names; nothing of a model without one."""
    about = read_json(student / "student.json") if (student / "student.json").exists() else {}
    trained_on = about.get("provenance", {}).get("identity", {})
    return [_JUDGE_IS_TEACHER] if _is_teacher_of(judge, trained_on) else []


def _made_the_noise(judge: Identity, teacher: Identity | None, heldout: NoiseDataset) -> bool:
    weights = list(judge.get("weights", {}).values())
    if judge == teacher or (weights and weights == list((teacher or {}).get("weights", {}).values())):
        return True
    return _is_teacher_of(judge, heldout.manifest.identity)


def _is_teacher_of(judge: Identity, dataset: Identity) -> bool:
    weights = judge.get("weights", {})
    # one hash for all files, as noise.storage.weights_hash has it
    sha256 = next(iter(weights.values())) if len(weights) == 1 else sha256_text("".join(f"{name} {each}\n" for name, each in weights.items()))
    return recorded_teacher(dataset).get("weights_sha256") == sha256


def recorded_teacher(dataset: Identity) -> dict[str, Any]:
    """What a dataset's identity says of its teacher; nothing where it names none."""
    teacher = dataset.get("teacher")
    return teacher if isinstance(teacher, dict) else {}


def teacher_temperature(dataset: Identity) -> float:
    """The temperature that the teacher's logits were divided by, from the dataset's identity; 1 where it names none."""
    return float(recorded_teacher(dataset).get("temperature", 1.0))
