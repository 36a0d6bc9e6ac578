"""What is integrated over noise is what is known of it: sums for students without noise, laws that a noise gives exactly, and bounds that hold."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from eval.decoding import Decoding
from eval.factorised import factorised, valid_and_distance
from eval.integrated import GROUPS, distance, integrated, share_of_sentences
from eval.languages import language
from eval.metrics import Interval
from eval.sampler import blank_rows, last_call, sample
from tests.eval.known import TableStudent
from trainer.config import NoiseConfig

CITIES, MAZE = language("cities"), language("maze")


class Knows:
    """The language's own probabilities at every place, given what is known; with noise it adds g, so that its argmax is a sample."""

    def __init__(self, known, noise: bool = False):
        self.known, self.vocab_size, self.mask_id, self.ahead = known, known.vocab_size, known.vocab_size, 0
        self.noise = NoiseConfig(kind="gumbel", readout=True) if noise else NoiseConfig()
        self.block_length, self.config = known.length + 1, None

    def logits(self, ids_BL, g_NV=None):
        found = []
        for row in ids_BL[:, 1:].numpy():
            open_L = row == self.mask_id
            agrees_M = ((self.known.ids_ML == row) | open_L).all(1)
            weight_M = self.known.p_M * agrees_M if agrees_M.any() else self.known.p_M
            found += [np.bincount(self.known.ids_ML[:, at], weight_M, self.vocab_size) / weight_M.sum() for at in open_L.nonzero()[0]]
        log_p_NV = torch.from_numpy(np.stack(found)).log()
        return log_p_NV if g_NV is None else log_p_NV + g_NV


def argmax(nfe: int) -> Decoding:
    return Decoding(nfe, output="argmax")


def test_one_call_without_noise_is_the_sum_itself():
    q_GM = integrated(Knows(CITIES), CITIES, Decoding(1), GROUPS, 3, "cpu")
    assert q_GM.shape == (GROUPS, len(CITIES.p_M)) and np.allclose(q_GM, factorised(CITIES, 1), rtol=1e-12)
    valid, away = valid_and_distance(CITIES, factorised(CITIES, 1))
    assert share_of_sentences(q_GM) == Interval(*[pytest.approx(valid)] * 3) and distance(CITIES.p_M, q_GM) == Interval(*[pytest.approx(away)] * 3)


@pytest.mark.parametrize("nfe", [2, 3])
def test_the_bounds_hold_the_sum_over_all_orders(nfe):
    """Twenty integrals whose value is known: 95% intervals, so three in a thousand fail to hold sixteen of twenty."""
    valid, away = valid_and_distance(CITIES, factorised(CITIES, nfe))
    found = [integrated(Knows(CITIES), CITIES, Decoding(nfe), 320, seed, "cpu") for seed in range(20)]
    shares, distances = [share_of_sentences(q_GM) for q_GM in found], [distance(CITIES.p_M, q_GM) for q_GM in found]
    assert sum(at.low <= valid <= at.high for at in shares) >= 16
    assert sum(at.low <= away <= at.high for at in distances) >= 16
    assert sum(at.high < 1 and at.high - at.low < 0.4 for at in distances) == 20, "bounds that hold everything say nothing"
    above = [np.maximum(CITIES.p_M - q_GM.mean(0), 0).sum() for q_GM in found]
    assert np.mean(above) > away, "the plain estimate is too large"
    assert abs(np.mean([at.value for at in distances]) - away) < np.mean(above) - away


def test_noise_that_makes_independent_choices_writes_the_limit():
    """argmax of log p + g, place by place: the noise is integrated away to the product of the marginals."""
    exact_M, q_GM = factorised(MAZE, 1), integrated(Knows(MAZE, noise=True), MAZE, argmax(1), 8192, 1, "cpu")
    assert set(np.unique(q_GM * 64)) <= set(range(65)), "an argmax writes one sentence or none"
    valid, away = valid_and_distance(MAZE, exact_M)
    assert 0.02 < valid < 0.05 and abs(share_of_sentences(q_GM).value - valid) < 4 * (valid / 8192) ** 0.5
    found = distance(MAZE.p_M, q_GM)
    assert found.low <= away <= found.high and found.high - found.low < 0.03


def test_noise_that_is_read_token_by_token_writes_the_language_itself():
    q_GM = integrated(Knows(CITIES, noise=True), CITIES, argmax(4), 3200, 2, "cpu")
    assert share_of_sentences(q_GM) == Interval(1.0, 1.0, 1.0)
    found = distance(CITIES.p_M, q_GM)
    assert found.low == 0 and found.high < 0.12
    seen_M = q_GM.mean(0) * 3200
    assert ((seen_M - 3200 * CITIES.p_M) ** 2 / (3200 * CITIES.p_M)).sum() < len(seen_M) + 5 * (2 * len(seen_M)) ** 0.5


def test_draws_are_those_that_sampling_makes():
    """Of an argmax nothing is left to sum: the share of each sentence is counted among the samples of the same sequence ids."""
    student = Knows(CITIES, noise=True)
    ids_SL = sample(student, blank_rows(student, 640, 5, 0), torch.arange(640), 5, argmax(2))[:, 1:].numpy()
    seen_M = np.bincount(CITIES.find(ids_SL) + 1, minlength=len(CITIES.p_M) + 1)[1:]
    assert np.allclose(integrated(student, CITIES, argmax(2), 640, 5, "cpu").mean(0) * 640, seen_M)


def test_the_last_call_is_where_sampling_ends():
    student = TableStudent(noise="gumbel", readout=True)
    blank_BL = blank_rows(student, 50, 4, 0)
    for nfe, fresh in product((1, 2, 3), (False, True)):
        decoding = Decoding(nfe, output="argmax", fresh_noise=fresh)
        before_BL, logits_NV = last_call(student, blank_BL, torch.arange(50), 7, decoding)
        masked_BL = before_BL == student.mask_id
        assert masked_BL.sum(1).tolist() == [3 - -(-3 * (nfe - 1) // nfe)] * 50
        before_BL = before_BL.masked_scatter(masked_BL, logits_NV.argmax(1))
        assert torch.equal(before_BL, sample(student, blank_BL, torch.arange(50), 7, decoding))


def test_temperature_nucleus_and_top_k_are_those_of_the_sampler():
    for decoding in (Decoding(1, temperature=0.5), Decoding(1, nucleus=0.6), Decoding(1, top_k=2)):
        q_M = integrated(Knows(MAZE), MAZE, decoding, GROUPS, 1, "cpu").mean(0)
        student, draws = Knows(MAZE), 4000
        ids_SL = sample(student, blank_rows(student, draws, 9, 0), torch.arange(draws), 2, decoding)[:, 1:].numpy()
        seen = (MAZE.find(ids_SL) >= 0).sum()
        assert abs(seen - draws * q_M.sum()) < 4 * (draws * q_M.sum()) ** 0.5
        assert abs(q_M.sum() - factorised(MAZE, 1).sum()) > 1e-3


@pytest.mark.parametrize("written", ["all as it should be", "half of the sentences half as often"])
def test_bounds_hold_where_estimates_stray_most(written):
    """Where q is p the plain estimate is all error. 400 integrals of 8,192 single sentences: 95% bounds miss 20 of them, or fewer."""
    p_M = MAZE.p_M
    q_M = p_M if written.startswith("all") else np.where(np.arange(len(p_M)) % 2, p_M / 2, p_M)
    away, generator, missed = (p_M - q_M).sum(), np.random.default_rng(5), 0
    for _ in range(400):
        counts_GM = generator.multinomial(64, [*q_M, 1 - q_M.sum()], GROUPS)[:, :-1]
        found = distance(p_M, counts_GM / 64)
        assert found.low <= found.value <= found.high
        missed += not found.low <= away <= found.high
    assert missed <= 33, "20 and three standard deviations"


def test_bounds_of_what_is_exact_are_the_figure():
    q_GM = 0.9 * CITIES.p_M[None]
    assert distance(CITIES.p_M, q_GM) == Interval(*[pytest.approx(0.1)] * 3) and share_of_sentences(q_GM) == Interval(*[pytest.approx(0.9)] * 3)


def test_what_cannot_be_integrated_is_refused():
    with pytest.raises(ValueError, match="draws is 127; give at least 128"):
        integrated(Knows(CITIES), CITIES, Decoding(1), 127, 1, "cpu")
    with pytest.raises(ValueError, match=r"sampler is ancestral.*set sampler to even"):
        integrated(Knows(CITIES), CITIES, Decoding(2, sampler="ancestral"), GROUPS, 1, "cpu")
