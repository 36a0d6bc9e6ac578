"""What a student reads in a call: lookahead by enumeration and against rows that are really cut, recompute against no cache."""

from __future__ import annotations

import itertools

import pytest
import torch

from eval.decoding import Decoding
from eval.sampler import blank_rows, resolve_output, sample_counted
from eval.stream import NOISE_DRAW, OUTPUT_DRAW
from noise import philox
from tests.eval.known import ROWS, Plan, State, TableLM, TableStudent, fits, law
from trainer.config import NoiseConfig, StudentConfig
from trainer.students import build
from trainer.students.mdlm import MDLM

VOCAB, LENGTH, WRITTEN = 11, 12, 64
NOISES = {
    "none": NoiseConfig(),
    "readout": NoiseConfig("gumbel", "replace", readout=True, drafts=[1]),
    "input": NoiseConfig("gumbel", "add"),
    "known": NoiseConfig("gumbel", "replace", readout=True, known=True),
}


def mdlm(noise: str = "none", layers: int = 2, **more: object) -> MDLM:
    """An untrained student with strong opinions, also about what stands far away."""
    torch.manual_seed(3)
    student = build(StudentConfig(kind="mdlm", layers=layers, hidden=16, heads=2, noise=NOISES[noise], **more), VOCAB, LENGTH).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for name, weight in student.named_parameters():
            if "norm" not in name:
                weight.add_(0.4 * torch.randn_like(weight))
    assert isinstance(student, MDLM)
    return student


class Bigram:
    """A small causal LM that looks at one token; it refuses what is no token."""

    vocab_size = VOCAB

    def __init__(self) -> None:
        self.table = 2 * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1))

    def logits_of(self, ids_BL: torch.Tensor, where_N: torch.Tensor) -> torch.Tensor:
        assert int(ids_BL.max()) < VOCAB
        return self.table[ids_BL.flatten()[where_N - 1]]


def blanks(student: MDLM, rows: int) -> torch.Tensor:
    """Every second row with given tokens before, between and behind what is to be written."""
    ids_BL = blank_rows(student, rows, LENGTH, bos=0)
    ids_BL[1::2, 1:3], ids_BL[1::2, 6], ids_BL[3::4, -2:] = 5, 7, 2
    return ids_BL


def write(student: MDLM, ids_BL: torch.Tensor, first: int = 0, length_B: torch.Tensor | None = None, **settings: object) -> tuple[torch.Tensor, ...]:
    decoding = Decoding(sampler="adaptive", output=resolve_output("auto", student), **settings)  # type: ignore[arg-type]
    sequence_id_B = torch.arange(first, first + len(ids_BL))
    return sample_counted(student, ids_BL, sequence_id_B, 9, decoding, length_B=length_B, auxiliary=Bigram())


def equal(ours: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...]) -> bool:
    return all(map(torch.equal, ours, theirs))


def left_to_right(size: int, mask: int) -> Plan:
    """The plan (see known) of taking the next `size` masked positions in every call."""

    def plan(step: int, state: State) -> list[tuple[float, tuple[int, ...]]]:
        return [(1.0, tuple(itertools.islice((m for m, token in enumerate(state) if token == mask), size)))]

    return plan


@pytest.mark.parametrize("lookahead", [1, 2, 3])
def test_a_student_alone_takes_all_that_it_is_shown_and_its_law_is_that_of_groups_from_the_left(lookahead: int) -> None:
    student = TableStudent(unknown=4, vocab_size=2)
    decoding = Decoding(sampler="adaptive", student_weight=1.0, lookahead=lookahead)
    lm = TableLM(TableStudent(unknown=4, vocab_size=2, seed=1))
    ids_BL, nfe_B = sample_counted(student, blank_rows(student, ROWS, 5, 0), torch.arange(ROWS), 5, decoding, auxiliary=lm)
    calls = -(-4 // lookahead)
    assert bool((nfe_B == calls).all())
    assert fits(ids_BL[:, 1:], student, law(student, calls, left_to_right(lookahead, student.mask_id)))


@pytest.mark.parametrize("readout", [False, True])
@pytest.mark.parametrize("lookahead", [1, 2, 4])
def test_at_weight_0_an_exact_small_models_own_sample_comes_out_whatever_is_shown(lookahead: int, readout: bool) -> None:
    student = TableStudent(noise="gumbel" if readout else "none", readout=readout, vocab_size=3, unknown=4)
    rows, decoding = 2000, Decoding(sampler="adaptive", student_weight=0.0, lookahead=lookahead, output="argmax" if readout else "sample")
    ids_BL, nfe_B = sample_counted(student, blank_rows(student, rows, 5, 0), torch.arange(rows), 5, decoding, auxiliary=TableLM(student))
    written_BM = torch.full((rows, 4), student.mask_id)
    for m in range(4):
        place_B5 = philox.rows(5, torch.arange(rows), torch.full((rows,), m + 1), NOISE_DRAW if readout else OUTPUT_DRAW)
        written_BM[:, m] = (student.conditionals(written_BM)[:, m].log().float() + philox.gumbel(place_B5, 3)).argmax(-1)
    assert torch.equal(ids_BL[:, 1:], written_BM)
    assert int(nfe_B.min()) >= -(-4 // lookahead) and int(nfe_B.max()) <= 4


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("weight", [0.3, 0.9])
def test_a_lookahead_and_a_window_as_long_as_the_row_change_no_token_and_no_count(noise: str, weight: float) -> None:
    student = mdlm(noise)
    ids_BL, length_B = blanks(student, WRITTEN), torch.full((WRITTEN,), LENGTH)
    ids_BL[2::4, -4:], length_B[2::4] = 0, LENGTH - 4
    plain = write(student, ids_BL, length_B=length_B, student_weight=weight)
    for more in ({"lookahead": LENGTH}, {"recompute": LENGTH}, {"lookahead": LENGTH, "recompute": LENGTH}):
        assert equal(write(student, ids_BL, length_B=length_B, student_weight=weight, **more), plain)
    assert 1 < float(plain[1].float().mean()) < LENGTH - 2


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("lookahead", [1, 3, 5])
def test_in_a_batch_a_row_is_cut_as_it_is_alone_without_padding(noise: str, lookahead: int) -> None:
    student = mdlm(noise)
    ids_BL = blanks(student, WRITTEN)
    together = write(student, ids_BL, lookahead=lookahead)
    alone = [write(student, ids_BL[row : row + 1], row, lookahead=lookahead) for row in range(WRITTEN)]
    assert equal(together, tuple(torch.cat(part) for part in zip(*alone, strict=True)))
    assert not equal(together, write(student, ids_BL))
    assert bool((together[1] >= -(-(ids_BL == student.mask_id).sum(1) // lookahead)).all())


class Recorded(MDLM):
    """Remembers the rows that it was shown."""

    shown: list[list[int]]

    def logits(self, ids_BL: torch.Tensor, g_NV: torch.Tensor | None = None, length_B: torch.Tensor | None = None) -> torch.Tensor:
        self.shown += [ids_BL[0].tolist()]
        return super().logits(ids_BL, g_NV, length_B)


def test_the_student_is_shown_the_next_masks_and_what_stands_before_the_one_after_them() -> None:
    student, mask = mdlm(), VOCAB
    student.__class__, student.shown = Recorded, []  # type: ignore[assignment]
    ids_BL = torch.tensor([[0, 4, mask, mask, 6, mask, mask, mask, 3]])
    found = write(student, ids_BL, lookahead=2, student_weight=1.0)[0][0].tolist()
    assert student.shown == [[0, 4, mask, mask, 6], [*found[:5], mask, mask], [*found[:7], mask, 3]]


@pytest.mark.parametrize("lookahead", [0, 4])
@pytest.mark.parametrize(("noise", "more"), [("none", {}), ("readout", {"shift": True}), ("input", {"backbone": "dit"})])
def test_with_one_layer_a_cached_token_is_the_token_itself_and_with_more_it_is_not(noise: str, more: dict, lookahead: int) -> None:
    for layers in (1, 2):
        student = mdlm(noise, layers, **more)
        ids_BL = blanks(student, WRITTEN)
        cached = write(student, ids_BL, lookahead=lookahead, recompute=1)
        assert equal(cached, write(student, ids_BL, lookahead=lookahead)) == (layers == 1)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("settings", [{"recompute": 1}, {"recompute": 3}, {"recompute": 2, "lookahead": 4}])
def test_a_row_and_its_cache_go_at_their_own_pace_in_any_batch(noise: str, settings: dict) -> None:
    student = mdlm(noise)
    ids_BL = blanks(student, WRITTEN)
    whole = write(student, ids_BL, **settings)
    parts = [write(student, ids_BL[start:stop], start, **settings) for start, stop in itertools.pairwise([0, 1, 6, 30, WRITTEN])]
    assert equal(whole, tuple(torch.cat(part) for part in zip(*parts, strict=True)))
    assert len(set(whole[1].tolist())) > 2


class Spliced:
    """Keys and values of a whole row, the first ones those of an earlier call."""

    def __init__(self, earlier: list[tuple[torch.Tensor, ...]], places: int):
        self.earlier, self.places = earlier, places

    def join(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.cat((old[:, :, : self.places], new[:, :, self.places :]), 2) for old, new in zip(self.earlier[layer], (k, v), strict=True))


def test_a_token_before_the_window_is_not_computed_again_and_is_seen_as_it_was() -> None:
    student, mask = mdlm(layers=3), VOCAB
    read: list[int] = []
    student.model.embed_tokens.register_forward_hook(lambda module, given, out: read.append(given[0].shape[1]))
    ids_BL, cache = torch.tensor([[0, mask, mask, mask, mask, mask]]), student.row_cache()
    student.logits_from(torch.tensor([0]), ids_BL, None, cache)
    earlier = [tuple(part.clone() for part in kept) for kept in cache._layers if kept is not None]
    ids_BL[0, 1:4] = torch.tensor([4, 8, 2])
    found_NV = student.logits_from(torch.tensor([3]), ids_BL, None, cache)
    assert read == [6, 3]
    spliced_NV, _ = student.through(ids_BL, torch.tensor([4, 5]), None, student.model.rotary(6), None, Spliced(earlier, 3))  # type: ignore[arg-type]
    torch.testing.assert_close(found_NV, spliced_NV)
    assert not torch.allclose(found_NV, student.logits(ids_BL), atol=1e-2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nfe": 2, "lookahead": 4}, "lookahead is 4 and recompute 0, but sampler even does not write from left to right"),
        ({"nfe": 2, "recompute": 4}, "recompute 4, but sampler even"),
        ({"sampler": "adaptive", "lookahead": -1}, "lookahead is -1; it must be at least 1, or 0 for all masked positions"),
        ({"sampler": "adaptive", "recompute": -1}, "recompute is -1; it must be at least 1, or 0 for the whole row"),
    ],
)
def test_what_would_be_ignored_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Decoding(**settings)
