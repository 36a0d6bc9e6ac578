"""What the answers of a judge add up to: win rates and grades with bootstrap intervals over texts, and what was not to be had.

A pair's score is the mean over its answered orders of 1 (the system wins), 1/2 (tie), 0; the win rate is the mean over pairs. So a judge that
always prefers what it sees first gives 1/2 where both orders are asked, and its preference is shown beside. Pairs and texts of which
no answer can be read are in no mean; how many answers could not be read, and how many were refused, stands beside it.
Shapes: S texts of a set, R bootstrap replicates + 1.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from eval.metrics import Array, Interval
from eval.questions import Question

Verdicts = Sequence[dict[str, float] | None]


def build(
    questions: Sequence[Question], verdicts: Verdicts, refused: Sequence[bool], names: Sequence[str], criteria: Sequence[str], weights_RS: Array
) -> dict[str, Any]:
    """{"pairwise": by system, "graded": by system}, as far as there are questions of that kind."""
    found: dict[str, Any] = {}
    for kind, summarise in (("pairwise", _pairwise), ("graded", _graded)):
        for name in names:
            at = [number for number, question in enumerate(questions) if question.kind == kind and question.system == name]
            if at:
                part = [questions[number] for number in at], [verdicts[number] for number in at]
                counts = {
                    "questions": len(at),
                    "unreadable": sum(verdicts[number] is None and not refused[number] for number in at),
                    "refused": sum(refused[number] for number in at),
                }
                found.setdefault(kind, {})[name] = {**counts, **{c: summarise(*part, c, weights_RS) for c in criteria}}
    if "graded" in found:
        _against_baseline(found["graded"], questions, verdicts, names, criteria, weights_RS)
    return found


def _pairwise(questions: Sequence[Question], verdicts: Verdicts, criterion: str, weights_RS: Array) -> dict[str, Any]:
    size = weights_RS.shape[1]
    score_S, answers_S, orders = np.zeros(size), np.zeros(size), dict[int, set[float]]()
    for question, verdict in zip(questions, verdicts, strict=True):
        if verdict is not None:
            score_S[question.number] += verdict[criterion]
            answers_S[question.number] += 1
            orders.setdefault(question.number, set()).add(verdict[criterion])
    values = [(verdict[criterion], question.swapped) for question, verdict in zip(questions, verdicts, strict=True) if verdict is not None]
    decided = [(value == 1) == swapped for value, swapped in values if value != 0.5]  # the system's text is first where they are swapped
    twice = [number for number in orders if answers_S[number] == 2]
    return {
        "win_rate": _mean(score_S / np.maximum(answers_S, 1), answers_S > 0, weights_RS),
        **{name: sum(value == share for value, _ in values) for name, share in (("wins", 1), ("ties", 0.5), ("losses", 0))},
        "first_preferred": sum(decided) / len(decided) if decided else None,
        "orders_agree": sum(len(orders[number]) == 1 for number in twice) / len(twice) if twice else None,
    }


def _graded(questions: Sequence[Question], verdicts: Verdicts, criterion: str, weights_RS: Array) -> dict[str, Any]:
    grade_S, known_S = _grades(questions, verdicts, criterion, weights_RS.shape[1])
    return {"grade": _mean(grade_S, known_S, weights_RS)}


def _grades(questions: Sequence[Question], verdicts: Verdicts, criterion: str, size: int) -> tuple[Array, Array]:
    grade_S, known_S = np.zeros(size), np.zeros(size, bool)
    for question, verdict in zip(questions, verdicts, strict=True):
        if verdict is not None:
            grade_S[question.number], known_S[question.number] = verdict[criterion], True
    return grade_S, known_S


def _against_baseline(
    graded: dict[str, Any], questions: Sequence[Question], verdicts: Verdicts, names: Sequence[str], criteria: Sequence[str], weights_RS: Array
) -> None:
    """Add each system's mean grade divided by the baseline's, over the texts of which both are graded."""

    def of(name: str, criterion: str) -> tuple[Array, Array]:
        part = [(q, v) for q, v in zip(questions, verdicts, strict=True) if q.kind == "graded" and q.system == name]
        return _grades([q for q, _ in part], [v for _, v in part], criterion, weights_RS.shape[1])

    for criterion in criteria:
        base_S, base_known_S = of(names[0], criterion)
        for name in names[1:]:
            grade_S, known_S = of(name, criterion)
            both_S = (known_S & base_known_S).astype(float)
            with np.errstate(invalid="ignore"):
                ratio_R = (weights_RS @ (grade_S * both_S)) / (weights_RS @ (base_S * both_S))
            graded[name][criterion]["of_baseline"] = _interval(ratio_R)


def _mean(value_S: Array, known_S: Array, weights_RS: Array) -> dict[str, float] | None:
    """Mean over the texts of which it is known, None where it is of none."""
    known = known_S.astype(float)
    with np.errstate(invalid="ignore"):
        return _interval((weights_RS @ (value_S * known)) / (weights_RS @ known))


def _interval(statistic_R: Array) -> dict[str, float] | None:
    if not np.isfinite(statistic_R[0]):
        return None
    return asdict(Interval.of(statistic_R[np.isfinite(statistic_R)]))


def lines(questions: Sequence[Question], verdicts: Verdicts, answers: Sequence[str | None]) -> str:
    """One JSON object a question: what was asked in which order, and what came back; `text` null where it was refused."""
    rows = [
        {"kind": q.kind, "system": q.system, "number": q.number, "swapped": q.swapped, "verdict": verdict, "text": answer}
        for q, verdict, answer in zip(questions, verdicts, answers, strict=True)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


def table(found: dict[str, Any]) -> dict[str, str]:
    """The figures as rows for people."""
    rows = {}
    for kind, figure in (("pairwise", "win_rate"), ("graded", "grade")):
        for name, system in found.get(kind, {}).items():
            for criterion, value in system.items():
                if isinstance(value, dict):
                    rows[f"{name}: {criterion}, {figure.replace('_', ' ')}"] = _shown(value, figure)
            rows[f"{name}: {kind} questions"] = f"{system['questions']} asked, {system['unreadable']} answers unreadable, {system['refused']} refused"
    return rows


def _shown(value: dict[str, Any], figure: str) -> str:
    if value[figure] is None:
        return "no answer could be read"
    text = "{value:.3f} [{low:.3f}, {high:.3f}]".format(**value[figure])
    if value.get("of_baseline"):
        text += "; of the baseline's {value:.3f} [{low:.3f}, {high:.3f}]".format(**value["of_baseline"])
    if figure == "win_rate":
        text += f"; {value['wins']} wins, {value['ties']} ties, {value['losses']} losses"
        for name, said in (("first_preferred", "first shown preferred"), ("orders_agree", "both orders agree")):
            text += f"; {said} {value[name]:.2f}" if value[name] is not None else ""
    return text
