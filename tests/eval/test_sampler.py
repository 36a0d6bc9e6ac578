"""The sampler draws what it says, from the stream alone, and reveals every position once."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from eval.sampler import Decoding, blank_rows, choose, random_rank, resolve_output, sample, sampling_noise
from tests.eval.world import LENGTH, VOCAB, write_student
from trainer.config import NoiseConfig
from trainer.students import load_student

ROWS = 20_000


class TableStudent:
    """Knows a joint distribution over M tokens exactly: logits are the log conditionals given the tokens that are known.

    With noise it adds g to them, as a perfect readout would. It remembers what it was asked.
    """

    def __init__(self, vocab_size: int = 3, unknown: int = 3, noise: str = "none", readout: bool = False, seed: int = 0):
        self.vocab_size, self.mask_id, self.unknown = vocab_size, vocab_size, unknown
        self.noise = SimpleNamespace(kind=noise, readout=readout)
        self.words = torch.tensor(list(itertools.product(range(vocab_size), repeat=unknown)))
        weight = torch.rand(len(self.words), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3
        self.joint = weight / weight.sum()
        self.asked: list[torch.Tensor] = []
        self.given: list[torch.Tensor | None] = []

    def logits(self, ids_BL: torch.Tensor, g_NV: torch.Tensor | None) -> torch.Tensor:
        self.asked.append(ids_BL.clone())
        self.given.append(g_NV)
        known = ids_BL[:, None, 1:] == self.words[None]
        weight_BW = self.joint * (known | (ids_BL[:, None, 1:] == self.mask_id)).all(-1)
        one_hot = torch.nn.functional.one_hot(self.words, self.vocab_size).double()
        p_BLV = torch.einsum("bw,wlv->blv", weight_BW, one_hot)
        logits_NV = (p_BLV / p_BLV.sum(-1, keepdim=True)).log()[ids_BL[:, 1:] == self.mask_id].float()
        return logits_NV if g_NV is None or not self.noise.readout else logits_NV + g_NV

    def marginals(self) -> torch.Tensor:
        return torch.einsum("w,wlv->lv", self.joint, torch.nn.functional.one_hot(self.words, self.vocab_size).double())


def drawn(student: TableStudent, decoding: Decoding, rows: int = ROWS, seed: int = 5) -> torch.Tensor:
    ids = sample(student, blank_rows(student, rows, student.unknown + 1, bos=0), torch.arange(rows), seed, decoding)
    return ids[:, 1:]


def fits(ids_BM: torch.Tensor, student: TableStudent, p_W: torch.Tensor) -> bool:
    """A chi-square test of whole rows against probabilities of all words; seeds are fixed, so it never flickers."""
    code = (ids_BM * student.vocab_size ** torch.arange(student.unknown - 1, -1, -1)).sum(1)
    found = torch.bincount(code, minlength=len(p_W)).numpy()
    expected = (p_W / p_W.sum() * len(ids_BM)).numpy()
    keep = expected > 5
    if not keep.all():
        found, expected = [*found[keep], found[~keep].sum()], [*expected[keep], expected[~keep].sum()]
    return bool(stats.chisquare(found, expected).pvalue > 1e-3)


def product(p_LV: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    return torch.stack([p_LV[t][words[:, t]] for t in range(words.shape[1])]).prod(0)


def test_one_token_a_step_samples_the_exact_joint() -> None:
    student = TableStudent()
    assert fits(drawn(student, Decoding(nfe=3)), student, student.joint)


def test_one_step_samples_the_product_of_marginals_and_not_the_joint() -> None:
    student = TableStudent()
    ids = drawn(student, Decoding(nfe=1))
    assert fits(ids, student, product(student.marginals(), student.words))
    assert not fits(ids, student, student.joint)


def test_temperature_sharpens_each_marginal_by_its_power() -> None:
    student = TableStudent(unknown=2)
    sharp = student.marginals() ** (1 / 0.5)
    assert fits(drawn(student, Decoding(nfe=1, temperature=0.5)), student, product(sharp / sharp.sum(-1, keepdim=True), student.words))


def test_nucleus_keeps_the_smallest_sufficient_set_and_its_proportions() -> None:
    p = torch.tensor([0.5, 0.1, 0.25, 0.15])
    uniform = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    token = choose(p.log().expand(4000, 4), uniform, Decoding(nfe=1, nucleus=0.7))
    assert torch.bincount(token, minlength=4).tolist() == pytest.approx([4000 * 2 / 3, 0, 4000 / 3, 0], abs=1)


def test_inverse_of_the_distribution_function_is_exact_on_a_grid() -> None:
    p = torch.tensor([0.0, 0.5, 0.0, 0.25, 0.25, 0.0])
    uniform = (torch.arange(800, dtype=torch.float64) + 0.5) / 800
    assert torch.bincount(choose(p.log().expand(800, 6), uniform, Decoding(nfe=1)), minlength=6).tolist() == [0, 400, 0, 200, 200, 0]


def test_argmax_of_a_perfect_readout_is_a_sample() -> None:
    student = TableStudent(noise="gumbel", readout=True)
    assert fits(drawn(student, Decoding(nfe=3, output="argmax")), student, student.joint)


def test_same_noise_is_given_at_every_step_scaled_by_the_noise_temperature() -> None:
    student = TableStudent(noise="gumbel")
    ids_BL = blank_rows(student, 7, 4, bos=0)
    sample(student, ids_BL, torch.arange(7), 9, Decoding(nfe=3, noise_temperature=0.5))
    all_g = torch.zeros(7, 4, 3)
    all_g[ids_BL == student.mask_id] = 0.5 * sampling_noise(9, torch.arange(7), ids_BL == student.mask_id, 3)
    for asked, given_g in zip(student.asked, student.given, strict=True):
        assert given_g is not None and torch.equal(given_g, all_g[asked == student.mask_id])


@given(
    st.integers(1, 7), st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=4), st.sampled_from(["random", "confidence"])
)
def test_every_position_is_revealed_in_even_groups_and_given_tokens_stay(nfe: int, known: list[list[bool]], order: str) -> None:
    student = TableStudent(vocab_size=2, unknown=7)
    keep = torch.tensor(known)
    ids_BL = blank_rows(student, len(known), 8, bos=1)
    ids_BL[:, 1:][keep] = 1
    unknown_B = (ids_BL == student.mask_id).sum(1)
    if nfe > int(unknown_B.max()):
        with pytest.raises(ValueError, match="lower nfe"):
            sample(student, ids_BL, torch.arange(len(known)), 3, Decoding(nfe, order=order))  # type: ignore[arg-type]
        return
    out = sample(student, ids_BL, torch.arange(len(known)), 3, Decoding(nfe, order=order))  # type: ignore[arg-type]
    assert not (out == student.mask_id).any()
    assert torch.equal(out[ids_BL != student.mask_id], ids_BL[ids_BL != student.mask_id])
    assert len(student.asked) == nfe
    masked = torch.stack([(ids == student.mask_id).sum(1) for ids in [*student.asked, out]])
    group = masked[:-1] - masked[1:]
    assert bool(((group >= unknown_B // nfe) & (group <= -(-unknown_B // nfe))).all())


def test_confidence_reveals_the_surest_position_first() -> None:
    student = TableStudent(unknown=3)
    sure = student.marginals().amax(-1).argmax()
    sample(student, blank_rows(student, 4, 4, bos=0), torch.arange(4), 1, Decoding(nfe=3, order="confidence"))
    assert ((student.asked[1][:, 1:] != student.mask_id).nonzero()[:, 1] == sure).all()


def test_order_is_a_uniform_permutation_of_each_row() -> None:
    unknown = torch.ones(6000, 3, dtype=torch.bool)
    rank = random_rank(11, torch.arange(6000), unknown).view(6000, 3)
    assert torch.equal(rank.sort(1).values, torch.arange(3).expand(6000, 3))
    counts = torch.bincount((rank * torch.tensor([9, 3, 1])).sum(1)).numpy()
    assert stats.chisquare(counts[counts > 0]).pvalue > 1e-3 and (counts > 0).sum() == 6


@pytest.mark.parametrize("noise", [NoiseConfig(), NoiseConfig("gumbel", "add", readout=True, drafts=[1]), NoiseConfig("independent", "replace")])
def test_a_seed_names_a_sample_at_any_batch_size(tmp_path: Path, noise: NoiseConfig) -> None:
    write_student(tmp_path / "student", noise=noise)
    student = load_student(tmp_path / "student")
    decoding = Decoding(nfe=3, output=resolve_output("auto", student))

    def rows(ids: torch.Tensor, seed: int = 1) -> torch.Tensor:
        return sample(student, blank_rows(student, len(ids), LENGTH, bos=0), ids, seed, decoding)

    whole = rows(torch.arange(10))
    assert int(whole.max()) < VOCAB
    assert torch.equal(whole, torch.cat([rows(torch.arange(10)[part]) for part in (slice(0, 1), slice(1, 4), slice(4, 10))]))
    assert torch.equal(whole[[7, 2]], rows(torch.tensor([7, 2])))
    assert not torch.equal(whole, rows(torch.arange(10), seed=2))


def test_noise_decides_the_argmax_of_a_readout() -> None:
    assert resolve_output("auto", TableStudent(noise="gumbel", readout=True)) == "argmax"
    assert resolve_output("auto", TableStudent(noise="gumbel")) == "sample"
    assert resolve_output("sample", TableStudent(noise="gumbel", readout=True)) == "sample"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nfe": 0}, "nfe is 0"),
        ({"temperature": 0.0}, "argmax is temperature 0"),
        ({"noise_temperature": -1.0}, "noise_temperature is -1"),
        ({"nucleus": 0.0}, "nucleus is 0"),
        ({"output": "best"}, "output is 'best'"),
        ({"output": "argmax", "temperature": 0.9}, "do nothing to an argmax"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(Decoding(nfe=2), **change)


def test_noise_temperature_without_noise_is_refused() -> None:
    student = TableStudent()
    with pytest.raises(ValueError, match="takes no noise"):
        sample(student, blank_rows(student, 1, 4, 0), torch.arange(1), 1, Decoding(nfe=1, noise_temperature=0.9))
