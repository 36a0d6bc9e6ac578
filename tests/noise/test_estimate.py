"""Kept entries are an unbiased teacher: by Monte Carlo over the stream, in float64, at every number of draws; the variance is the documented one.

Probabilities lie in the middle of their codes' bins except the token's, which a reader knows exactly, so that nothing but chance
separates an estimate's mean from the truth; what rounding adds is bounded on a teacher that is not so arranged.
"""

from __future__ import annotations

import math

import pytest
import torch

from noise import philox
from noise.estimate import cross_entropy, inclusion, weights
from noise.sketch import Codec, Sketch, encode
from tests.noise import teachers

POSITIONS = 40_000
STEP = 0.125


def arranged() -> torch.Tensor:
    """Log-probs float64 [V]: eleven entries in the middle of their bins, from e^-1.9 down to e^-12, and entry 4, what they leave of 1."""
    code_V = torch.tensor([15, 19, 23, 28, 0, 34, 40, 47, 55, 64, 80, 96])
    log_p_V = -STEP * (code_V.double() + 0.5)
    log_p_V[4] = -math.inf
    log_p_V[4] = torch.log1p(-log_p_V.exp().sum())
    return log_p_V


def sketched(log_p_V: torch.Tensor, token_N: torch.Tensor, codec: Codec) -> Sketch:
    place_N = torch.arange(len(token_N))
    rows_N5 = philox.rows(5, place_N // 1000, 1 + place_N % 1000)
    return encode(log_p_V.float().expand(len(token_N), -1), token_N, rows_N5, codec)


def dense(sketch: Sketch, token_N: torch.Tensor, codec: Codec) -> torch.Tensor:
    """The weights of every entry, float64 [N, V]."""
    weight_NV = torch.zeros(len(token_N), codec.vocab_size, dtype=torch.float64)
    owner_K = torch.repeat_interleave(torch.arange(len(token_N)), sketch.kept_N)
    token_weight_N, weight_NV[owner_K, sketch.index_K] = weights(sketch, codec)
    return weight_NV.scatter(1, token_N[:, None], token_weight_N[:, None])


def deviations(found_N: torch.Tensor, truth: float) -> float:
    """By how many standard errors a mean misses the truth."""
    return abs(float(found_N.mean()) - truth) / (float(found_N.std()) / len(found_N) ** 0.5)


def student(seed: int) -> torch.Tensor:
    """Logits float64 [V], not normalised: an offset must not matter."""
    return 7 + 1.5 * torch.randn(12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("draws", [1, 4, 16])
@pytest.mark.parametrize("epsilon", [0.125, 0.5])
def test_each_weight_has_the_teachers_probability_as_its_mean(draws: int, epsilon: float) -> None:
    log_p_V, codec, token_N = arranged(), Codec(12, epsilon, draws), torch.full((POSITIONS,), 4)
    weight_NV = dense(sketched(log_p_V, token_N, codec), token_N, codec)
    for entry, p in enumerate(log_p_V.exp().tolist()):
        if entry == 4:
            assert weight_NV[:, 4].allclose(torch.tensor(p, dtype=torch.float64), rtol=1e-6)
        else:
            chance = 1 - (1 + p / math.expm1(epsilon)) ** -draws
            standard_error = p * ((1 - chance) / chance / POSITIONS) ** 0.5  # of p / chance with that chance, else 0
            assert abs(float(weight_NV[:, entry].mean()) - p) < 4.5 * standard_error, entry


@pytest.mark.parametrize("draws", [1, 4, 16])
def test_the_cross_entropy_and_its_gradient_are_unbiased(draws: int) -> None:
    log_p_V, codec, token_N = arranged(), Codec(12, 0.125, draws), torch.full((POSITIONS,), 4)
    logits_NV = student(1).expand(POSITIONS, -1).clone().requires_grad_()
    found_N = cross_entropy(logits_NV, token_N, sketched(log_p_V, token_N, codec), codec)
    p_V, log_q_V = log_p_V.exp(), student(1).log_softmax(0)
    assert deviations(found_N.detach(), -float(p_V @ log_q_V)) < 4
    found_N.sum().backward()
    assert logits_NV.grad is not None
    for entry in range(12):
        assert deviations(logits_NV.grad[:, entry], float(log_q_V.exp()[entry] - p_V[entry])) < 4.5, entry


def test_the_gradient_is_the_students_share_of_the_weights_less_the_weights() -> None:
    codec, token_N = Codec(12), torch.arange(300) % 12
    sketch = sketched(arranged(), token_N, codec)
    logits_NV = student(1).expand(300, -1).clone().requires_grad_()
    cross_entropy(logits_NV, token_N, sketch, codec).sum().backward()
    weight_NV = dense(sketch, token_N, codec)
    torch.testing.assert_close(logits_NV.grad, weight_NV.sum(1, keepdim=True) * student(1).softmax(0) - weight_NV)


def test_the_mean_is_the_same_for_every_token() -> None:
    """Unbiased given x, also where the teacher would hardly have written it; entry 4's probability is rounded to its bin then."""
    log_p_V, codec = arranged(), Codec(12)
    log_q_V = student(2).log_softmax(0)
    truth = -float(log_p_V.exp() @ log_q_V)
    for token in (0, 4, 11):
        token_N = torch.full((POSITIONS,), token)
        found_N = cross_entropy(log_q_V.expand(POSITIONS, -1), token_N, sketched(log_p_V, token_N, codec), codec)
        rounded = abs(float(log_p_V[4].exp())) * math.expm1(STEP / 2) * 2 * float(log_q_V.abs().max()) if token != 4 else 0.0
        assert abs(float(found_N.mean()) - truth) < 4 * float(found_N.std()) / POSITIONS**0.5 + rounded


@pytest.mark.parametrize("b", [0.0, 2.0])
def test_the_variance_at_one_draw_is_the_documented_one(b: float) -> None:
    log_p_V, codec, token_N = arranged(), Codec(12), torch.full((POSITIONS,), 4)
    off_V = -student(3).log_softmax(0) - b
    found_N = dense(sketched(log_p_V, token_N, codec), token_N, codec) @ off_V
    p_V = log_p_V.exp().index_fill(0, torch.tensor([4]), 0.0)
    part_V = p_V * off_V
    shared_VV = torch.outer(part_V, part_V) / (1 + (p_V[:, None] + p_V[None, :]) / codec.c)
    documented = codec.c * float(part_V @ off_V) + float(shared_VV.sum() - shared_VV.diagonal().sum())
    assert deviations((found_N - found_N.mean()) ** 2, documented) < 4


def test_rounding_moves_the_mean_by_less_than_half_a_step() -> None:
    log_probs_NV, codec = teachers.log_probs("zipf", 1, 50, seed=16).expand(POSITIONS, 50), Codec(50)
    student_NV = teachers.log_probs("random", 1, 50, seed=17).expand(POSITIONS, 50)
    token_N, place_N = teachers.sample(log_probs_NV, 18), torch.arange(POSITIONS)
    sketch = encode(log_probs_NV, token_N, philox.rows(6, place_N // 1000, 1 + place_N % 1000), codec)
    found_N = cross_entropy(student_NV, token_N, sketch, codec)
    assert found_N.dtype == torch.float32
    truth = -float(log_probs_NV[0].double().exp() @ student_NV[0].double())
    assert abs(float(found_N.mean()) - truth) < 4 * float(found_N.std()) / POSITIONS**0.5 + math.expm1(STEP / 2) * truth


@pytest.mark.parametrize("draws", [1, 4, 128])
def test_inclusion_keeps_its_digits_for_the_smallest_probabilities(draws: int) -> None:
    codec = Codec(100, 0.125, draws)
    p_V = torch.tensor([1e-30, 1e-12, 1e-3, 1.0], dtype=torch.float64)
    expected = [-math.expm1(-draws * math.log1p(p / math.expm1(0.125))) for p in p_V.tolist()]
    torch.testing.assert_close(inclusion(p_V, codec), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    assert float(inclusion(p_V, codec)[0]) == pytest.approx(draws * 1e-30 / codec.c, rel=1e-12)


def test_no_positions_have_no_cross_entropy() -> None:
    codec, none = Codec(12), torch.zeros(0, dtype=torch.int64)
    sketch = encode(torch.zeros(0, 12), none, torch.zeros(0, 5, dtype=torch.int64), codec)
    assert cross_entropy(torch.zeros(0, 12), none, sketch, codec).shape == (0,)
