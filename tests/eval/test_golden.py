"""A seed names a sample for ever: tokens of every sampler, order and kind of noise, compared with those that were written down once.

python -m tests.eval.test_golden

writes tests/vectors/samples.json again. Do it for a sampler that is new. Where an entry that is there already comes out different, samples that were
published with their seed cannot be made again, and that breaks a promise to everyone who has them: the code is wrong then, not the file.

Conditionals come from a table of whole numbers, no random number generator, and each entry is compared with the table moved by a few parts in
ten thousand as well: no token hangs on rounding.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eval import exact, markov, stream
from eval.blocks import sample_blocks
from eval.decoding import Decoding, restricted_log_probs
from eval.drafters import CausalDrafter
from eval.referee import Rejection, SharedNoise, prior
from eval.sampler import blank_rows, sample
from eval.speculative import speculate
from noise import philox
from tests.eval.known import BlockTable, TableLM, TableStudent

FILE = Path(__file__).parents[1] / "vectors" / "samples.json"
SEED, UNKNOWN, V = 2**40 + 5, 5, 3
SEQUENCE_ID_B = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 2**32 + 1, 2**40])
READOUT = {"noise": "gumbel", "readout": True}
Tokens = list[list[int]]


def known(student: Any, moved: float, name: int = 0) -> Any:
    """The student with a joint of whole numbers, another one for each name; `moved`: the largest relative change of a word's weight."""
    word_W = torch.arange(len(student.words))
    weight_W = (1 + ((word_W + 7 * name) ** 2 * 37 + 11 * word_W) % 101).double() ** 4 * (1 + moved * torch.cos(word_W.double()))
    student.joint = weight_W / weight_W.sum()
    return student


def table(moved: float, name: int = 0, **more: Any) -> Any:
    return known(TableStudent(V, UNKNOWN, **more), moved, name)


class TableTeacher:
    """The table as a causal LM, whose cache is what it has read."""

    name, max_length = "table", None

    def __init__(self, student: TableStudent):
        self.student = student

    class Cache:
        def __init__(self, ids_BL: torch.Tensor):
            self.ids_BL = ids_BL

        def crop(self, minus: int) -> None:
            self.ids_BL = self.ids_BL[:, :minus]

        def batch_select_indices(self, at_A: torch.Tensor) -> None:
            self.ids_BL = self.ids_BL[at_A]

    def forward_of(self, hidden: bool = False) -> Any:
        def forward(ids_BW: torch.Tensor, cache: Any) -> Any:
            ids_BL = ids_BW if cache is None else torch.cat([cache.ids_BL, ids_BW], 1)
            first = ids_BL.shape[1] - ids_BW.shape[1]
            p = [self.student.conditionals(ids_BL[:, 1 : last + 1])[:, last] for last in range(first, ids_BL.shape[1])]
            return [torch.stack(p, 1).log().float()], self.Cache(ids_BL)

        return forward


def masked(decoding: Decoding, **more: Any) -> Callable[[float], Tokens]:
    def tokens(moved: float) -> Tokens:
        student = table(moved, **more)
        auxiliary = TableLM(table(moved, 1)) if decoding.sampler == "adaptive" else None
        return rows(sample(student, blank(student), SEQUENCE_ID_B, SEED, decoding, auxiliary=auxiliary))

    return tokens


def blocks(decoding: Decoding, **more: Any) -> Callable[[float], Tokens]:
    def tokens(moved: float) -> Tokens:
        student = known(BlockTable(3, V, UNKNOWN, **more), moved)
        return rows(sample_blocks(student, blank(student), SEQUENCE_ID_B, SEED, decoding).ids_BL)

    return tokens


def drafted(rejection: bool) -> Callable[[float], Tokens]:
    def tokens(moved: float) -> Tokens:
        noise, block = prior(SEED, SEQUENCE_ID_B, V), 3
        rule: Any = SharedNoise(log_probs, noise) if not rejection else Rejection(log_probs, noise, SEED, SEQUENCE_ID_B, block + 1, V)
        drafter, given_B = CausalDrafter(TableTeacher(table(moved, 1))), torch.ones_like(SEQUENCE_ID_B)  # type: ignore[arg-type]
        teacher = TableTeacher(table(moved))
        return rows(speculate(teacher, drafter, rule, 0 * given_B[:, None], given_B, (1 + UNKNOWN) * given_B, block).ids_BL)

    return tokens


def log_probs(logits_NV: torch.Tensor) -> torch.Tensor:
    return restricted_log_probs(logits_NV, Decoding(1))


def blank(student: TableStudent) -> torch.Tensor:
    return blank_rows(student, len(SEQUENCE_ID_B), 1 + UNKNOWN, bos=0)


def rows(ids_BL: torch.Tensor) -> Tokens:
    found: Tokens = ids_BL[:, 1:].tolist()
    return found


WRITERS = {
    "even, random order": masked(Decoding(2)),
    "even, the surest first": masked(Decoding(2, order="confidence")),
    "even, left to right": masked(Decoding(2, order="left_to_right")),
    "ancestral": masked(Decoding(2, sampler="ancestral")),
    "first hitting": masked(Decoding(sampler="first_hitting")),
    "temperature, nucleus and top_k": masked(Decoding(2, temperature=0.8, nucleus=0.9, top_k=2)),
    "adaptive": masked(Decoding(sampler="adaptive")),
    "adaptive, noise in the logits": masked(Decoding(sampler="adaptive", output="argmax"), **READOUT),
    "noise": masked(Decoding(2, output="argmax"), **READOUT),
    "noise temperature": masked(Decoding(2, output="argmax", noise_temperature=0.5), **READOUT),
    "fresh noise": masked(Decoding(3, output="argmax", fresh_noise=True), **READOUT),
    "blocks": blocks(Decoding(2)),
    "blocks, first hitting": blocks(Decoding(sampler="first_hitting")),
    "blocks, noise": blocks(Decoding(2, output="argmax"), **READOUT),
    "blocks, fresh noise": blocks(Decoding(2, output="argmax", fresh_noise=True), **READOUT),
    "drafts, shared noise": drafted(rejection=False),
    "drafts, rejection": drafted(rejection=True),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_seeds_sample_is_what_it_was(name: str) -> None:
    written = json.loads(FILE.read_text())
    assert written.keys() == WRITERS.keys()
    for moved in (0.0, 3e-4, -3e-4):
        assert WRITERS[name](moved) == written[name], moved


def test_draws_of_the_stream_are_what_they_were_and_apart() -> None:
    draws = {"NOISE_DRAW": 128, "ORDER_DRAW": 129, "OUTPUT_DRAW": 130, "FRESH_DRAW": 133, "VERDICT_DRAW": 134, "RESIDUAL_DRAW": 135}
    draws["LIKELIHOOD_DRAW"] = 136
    assert {name: value for name, value in vars(stream).items() if name.endswith("_DRAW")} == draws
    assert philox.SAMPLING_DRAW == 128 and markov.CHAIN_DRAW == 131 and exact.TEXT_DRAW == 132
    assert len({*draws.values(), markov.CHAIN_DRAW, exact.TEXT_DRAW}) == len(draws) + 2


if __name__ == "__main__":
    FILE.write_text("{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(write(0.0))}" for name, write in WRITERS.items()) + "\n}\n")
