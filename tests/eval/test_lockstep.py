"""A model whose cache cannot be had or taken back is refused before a refused draft stays in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from eval.lockstep import Lockstep
from noise.storage import DatasetError


class Stuck:
    """A cache that only grows: one without `crop`, or whose `crop` says that it is not for it."""

    def __init__(self, error: Exception | None):
        if error is not None:
            self.crop = lambda tokens: self.refuse(error)

    def refuse(self, error: Exception) -> None:
        raise error


def reader(cache: Any) -> Lockstep:
    return Lockstep(lambda ids_BW, before: ([torch.zeros(*ids_BW.shape, 3)], cache), "the model")


def read_two_drafts(steps: Lockstep) -> None:
    """The second call keeps none of the first one's draft."""
    ids_BL = torch.zeros(2, 8, dtype=torch.int64)
    for known in (3, 4):
        steps.read(ids_BL, torch.tensor([known, known]), torch.tensor([3, 3]))


@pytest.mark.parametrize("error", [None, NotImplementedError("not for me"), ValueError("not for me")])
def test_a_cache_that_cannot_be_taken_back_is_refused_at_the_first_refused_draft(error: Exception | None) -> None:
    with pytest.raises(DatasetError, match=r"the model has a KV cache that cannot be taken back \(.+\): a refused draft would stay in it"):
        read_two_drafts(reader(Stuck(error)))


def test_a_model_without_a_cache_is_refused_at_once() -> None:
    with pytest.raises(DatasetError, match="the model has no KV cache"):
        read_two_drafts(reader(None))


def test_what_a_cache_says_that_is_no_refusal_is_not_hidden() -> None:
    with pytest.raises(KeyError):
        read_two_drafts(reader(Stuck(KeyError("a bug"))))
