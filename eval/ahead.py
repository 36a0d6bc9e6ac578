"""What an mtp student writes: rows from left to right, at most `ahead` tokens a forward, the next masks of the row in its sight and nothing behind.

Its number of forwards and its groups are those of the sampler `even` (schedules). Shapes: B rows, L positions.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from eval.decoding import Decoding, OrderName, SamplerName


def least_forwards(unknown: int, ahead: int) -> int:
    """That write so many tokens."""
    return -(-unknown // ahead)


def ordered(student: Any, sampler: SamplerName, order: OrderName) -> OrderName:
    """The order that is asked for; an mtp student has one alone. Raises ValueError where another, or a sampler with its own, was named."""
    if not student.ahead:
        return order
    if order == "confidence" or sampler != "even":
        raise ValueError(f"sampler is {sampler} and order {order}, but an mtp student writes from left to right, in even groups; drop them")
    return "left_to_right"


def check_ahead(student: Any, unknown_BL: Tensor, length_B: Tensor | None, decoding: Decoding) -> None:
    """Raises ValueError for rows, and for numbers of forwards, that an mtp student cannot write. length_B: valid positions; None: all."""
    if not student.ahead:
        return
    if decoding.sampler != "even" or decoding.order != "left_to_right":
        raise ValueError(
            f"sampler is {decoding.sampler} and order {decoding.order}, but an mtp student writes from left to right, in even groups; take "
            "sampler even and order left_to_right"
        )
    unknown_B = unknown_BL.sum(1)
    most = int(unknown_B.max())
    end_B = unknown_BL.shape[1] if length_B is None else length_B
    if bool((unknown_BL.int().argmax(1) + unknown_B != end_B)[unknown_B > 0].any()):
        raise ValueError("a row has tokens after its first unknown one, which an mtp student would not see; give them to a masked student")
    if student.config.context == "row" and most > student.ahead:
        raise ValueError(
            f"a row has {most} unknown positions, but the student has learnt the last {student.ahead} of a row alone (student.context: row); give "
            "longer prompts, or train one with context drawn"
        )
    least = least_forwards(most, student.ahead)
    if decoding.nfe < least:
        raise ValueError(
            f"nfe is {decoding.nfe}, but the student writes at most {student.ahead} tokens a forward, and a row has {most} unknown ones; "
            f"give at least {least}"
        )
