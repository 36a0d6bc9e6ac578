"""What a judge is asked, and what its answer says: prompts from files, pairs in both orders, grades.

A prompt is a text file with {first} and {second}, or {text}, and {criteria}. The judge answers with one JSON object: for each criterion
"A", "B" or "tie", or a grade. An answer that is anything else says nothing (None), and is counted as that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eval.stream import ORDER_DRAW, stream_uniform
from noise import philox
from noise.storage import DatasetError, sha256_text

GRADES = (1, 10)
_OBJECT = re.compile(r"\{[^{}]*\}")


@dataclass(frozen=True)
class Prompt:
    """A prompt file."""

    name: str
    text: str
    criteria: tuple[str, ...]

    @classmethod
    def read(cls, name: str, places: Sequence[str], criteria: Sequence[str]) -> Prompt:
        """The file, or the checkout's where the path is relative and not found. Raises DatasetError where a place is missing."""
        path = Path(name) if Path(name).exists() else Path(__file__).parents[1] / name
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DatasetError(f"prompt {name} cannot be read: {error}") from None
        for place in (*places, "criteria"):
            if f"{{{place}}}" not in text:
                raise DatasetError(f"prompt {name} has no {{{place}}}; it must say where that goes")
        return cls(name, text, tuple(criteria))

    @property
    def sha256(self) -> str:
        return sha256_text(self.text)

    def filled(self, **texts: str) -> str:
        """The prompt with its places filled, all at once: what a text holds is never a place."""
        values = {**texts, "criteria": ", ".join(self.criteria)}
        return re.sub("|".join(rf"\{{{name}\}}" for name in values), lambda found: values[found[0][1:-1]], self.text)


@dataclass(frozen=True)
class Question:
    """One thing to ask: of a pair, `swapped` says that the baseline's text is shown second."""

    prompt: str
    kind: str
    system: str
    number: int
    swapped: bool = False

    def read(self, answer: str, criteria: Sequence[str]) -> dict[str, float] | None:
        """By criterion: the system's share of the win (1, 1/2, 0) against the baseline, or its grade; None for an answer that says neither."""
        found = _last_object(answer)
        if found is None or any(name not in found for name in criteria):
            return None
        values = [_verdict(found[name], self.swapped) if self.kind == "pairwise" else _grade(found[name]) for name in criteria]
        return None if None in values else dict(zip(criteria, values, strict=True))  # type: ignore[arg-type]


def pairs(prompt: Prompt, system: str, baseline_texts: Sequence[str], texts: Sequence[str], both_orders: bool, seed: int) -> list[Question]:
    """Text i of the system against text i of the baseline; which comes first is the seed's choice, the other order follows where both are asked."""
    questions = []
    for number, (theirs, ours) in enumerate(zip(baseline_texts, texts, strict=True)):
        swapped = _coin(seed, number)
        for order in (swapped, not swapped) if both_orders else (swapped,):
            first, second = (ours, theirs) if order else (theirs, ours)
            questions.append(Question(prompt.filled(first=first, second=second), "pairwise", system, number, order))
    return questions


def grades(prompt: Prompt, system: str, texts: Sequence[str]) -> list[Question]:
    return [Question(prompt.filled(text=text), "graded", system, number) for number, text in enumerate(texts)]


def _coin(seed: int, number: int) -> bool:
    zero = torch.zeros(1, dtype=torch.int64)
    return bool(stream_uniform(philox.rows(seed, zero + number, zero, ORDER_DRAW))[0] < 0.5)


def _last_object(answer: str) -> dict[str, Any] | None:
    """The last flat JSON object in the answer: judges think aloud before it, or wrap it in a code block."""
    for found in reversed(_OBJECT.findall(answer)):
        try:
            value = json.loads(found)
        except ValueError:
            continue
        return {str(name).strip().lower(): entry for name, entry in value.items()}
    return None


def _verdict(value: Any, swapped: bool) -> float | None:
    """B is the system's text, unless they were swapped."""
    share = {"a": 0.0, "b": 1.0, "tie": 0.5}.get(str(value).strip().lower())
    return share if share is None or not swapped else 1 - share


def _grade(value: Any) -> float | None:
    try:
        grade = float(value)
    except (TypeError, ValueError):
        return None
    return grade if not isinstance(value, bool) and GRADES[0] <= grade <= GRADES[1] else None
