"""What a dataset can be used for: which students and objectives it feeds, which not, and why."""

from __future__ import annotations

from dataclasses import dataclass

from noise.identity import Identity


@dataclass(frozen=True)
class Use:
    """One thing that somebody could want."""

    name: str
    possible: bool
    why: str


def uses(identity: Identity) -> list[Use]:
    extraction, draws = identity["extraction"], identity["draws"]
    noise, kept, written = extraction != "none", extraction == "parallel", extraction == "sequential"
    fresh = f"{draws} independent draws of noise, one an epoch, then again" if draws > 1 else "one draw: later epochs see the same noise again"
    return [
        Use("text alone: student.kind ar, or student.noise.kind none or independent", True, "it has tokens"),
        Use(
            "noise students: student.noise.kind gumbel, gaussian, uniform",
            noise,
            ("the prior draw that the text was written from" if written else f"posterior noise within {identity['epsilon']} nats")
            if noise
            else "it has tokens and no noise (extraction: none); extract with a teacher",
        ),
        Use("another noise in every epoch", kept and draws > 1, fresh if noise else "there is no noise"),
        Use(
            "token-level distillation: student.objective.token_kd",
            kept,
            "the kept entries estimate the teacher's cross-entropy without bias"
            if kept
            else f"nothing of the teacher's distribution is kept (extraction: {extraction}); it needs parallel",
        ),
        Use(
            "sequence-level distillation: training on the teacher's own text",
            written,
            "the teacher wrote it" if written else "the text is the corpus's; `generate` lets the teacher write",
        ),
        Use(
            "checking the teacher against it",
            noise,
            "`replay`: every token comes back" if written else "`verify --deep N`: every entry within its bound" if kept else "there is no teacher",
        ),
    ]
