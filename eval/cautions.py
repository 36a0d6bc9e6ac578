"""What a reader of a report must know, in words: a judge that is no judge, too little text, students that were left out."""

from __future__ import annotations

from typing import Any

from eval.config import ReportConfig
from trainer.data import NoiseDataset

_FEW_FOR_MAUVE = 500

Identity = dict[str, Any]


def cautions(config: ReportConfig, heldout: NoiseDataset, real_rows: int, judge: Identity, teacher: Identity | None) -> list[str]:
    """`judge`, `teacher`: what is known of both models (see causal.model_identity)."""
    found = []
    if _made_the_noise(judge, teacher, heldout):
        found.append("The judge is the teacher that made the noise: it favours students of that noise. Use a causal LM of another seed or size.")
    if real_rows < config.sequences:
        found.append(
            f"Only {real_rows} full rows of held-out text for {config.sequences} samples: "
            "the entropy of real text is estimated from fewer tokens and a little too low."
        )
    fewest = min(real_rows, config.sequences)
    if config.mauve.featuriser and fewest < _FEW_FOR_MAUVE:
        found.append(f"MAUVE of {fewest} sequences: too few to say much; its authors take 5,000.")
    return found


def _made_the_noise(judge: Identity, teacher: Identity | None, heldout: NoiseDataset) -> bool:
    weights = list(judge.get("weights", {}).values())
    if judge == teacher or (weights and weights == list((teacher or {}).get("weights", {}).values())):
        return True
    recorded = heldout.manifest.identity.get("teacher")
    return isinstance(recorded, dict) and weights == [recorded.get("weights_sha256")]


def teacher_temperature(heldout: NoiseDataset) -> float:
    """The temperature that the teacher's logits were divided by, from the dataset's identity; 1 where it names none."""
    teacher = heldout.manifest.identity.get("teacher")
    return float(teacher.get("temperature", 1.0)) if isinstance(teacher, dict) else 1.0
