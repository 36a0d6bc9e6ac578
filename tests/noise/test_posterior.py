"""Algorithm 1 is the exact posterior: with x ~ p the noise is i.i.d. Gumbel(0, 1), and these tests can tell a wrong one.

Exp(-a) of the true posterior is uniform on (0, 1), independent across entries and positions. Every p-value below comes
from one fixed seed, so a test passes always or never; a threshold of 1e-4 is far below chance and far above what the
known wrong shortcut scores.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats

from noise import philox
from noise.posterior import posterior_gumbel
from tests.noise import reference, teachers

POSITIONS = 60_000
SMALLEST = 1e-4

Extract = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def pinned_winner(log_probs_NV: torch.Tensor, token_N: torch.Tensor, rows_N5: torch.Tensor) -> torch.Tensor:
    """The wrong shortcut: losers drawn free, the winner drawn from what is left above them."""
    e_NV = philox.exponential(philox.words(rows_N5, log_probs_NV.shape[1])).double()
    p_NV, token_N1 = log_probs_NV.double().exp(), token_N[:, None]
    race_NV = (e_NV / p_NV).scatter(1, token_N1, torch.inf)
    ceiling_N1 = p_NV.gather(1, token_N1) * race_NV.min(1, keepdim=True).values
    u_N1 = philox.uniform(philox.words(rows_N5, 4 * log_probs_NV.shape[1] + 1)[:, -1:]).double()
    pinned_N1 = -torch.log1p(u_N1 * torch.expm1(-ceiling_N1))  # Exp(1) given that it is below the ceiling
    return -e_NV.scatter(1, token_N1, pinned_N1).log()


def p_values(g_NV: torch.Tensor) -> dict[str, float]:
    """The smallest p-value of each kind of test that the columns of g are i.i.d. Gumbel(0, 1), row after row."""
    u_NV = np.exp(-np.exp(-g_NV.double().numpy()))  # the Gumbel's distribution function
    pairs = list(itertools.combinations(range(u_NV.shape[1]), 2))
    return {
        "marginal": min(float(stats.kstest(u_N, "uniform").pvalue) for u_N in u_NV.T),
        "bins": min(float(stats.chisquare(np.histogram(u_N, 64, (0, 1))[0]).pvalue) for u_N in u_NV.T),
        "tail": min(float(stats.binomtest(int((u_N > 0.999).sum()), len(u_N), 0.001).pvalue) for u_N in u_NV.T),
        "entries": min(joint(u_NV[:, i], u_NV[:, j]) for i, j in pairs),
        "positions": min(joint(u_NV[:-1, i], u_NV[1:, j]) for i, j in [*pairs, (0, 0), (1, 1)]),
        "correlation": min(float(stats.pearsonr(u_NV[:, i], u_NV[:, j]).pvalue) for i, j in pairs),
    }


def joint(u_N: np.ndarray, v_N: np.ndarray) -> float:
    """Chi-square on an 8 x 8 table of two uniforms: flat exactly when they are uniform and independent."""
    return float(stats.chisquare(np.histogram2d(u_N, v_N, 8, ((0, 1), (0, 1)))[0].reshape(-1)).pvalue)


def extracted(shape: str, extract: Extract, vocab_size: int = 5, draw: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noise of tokens x ~ p for many positions of rows of 100: log-probs, tokens, g."""
    # one order of entries everywhere, so that entry 0 keeps its role: likely, so mostly the token
    logits_V = {"flat": torch.zeros(vocab_size), "peaked": -2.0 * torch.arange(vocab_size)}.get(shape)
    if logits_V is None:
        log_probs_NV = teachers.log_probs(shape, POSITIONS, vocab_size, seed=3)
    else:
        log_probs_NV = torch.log_softmax(logits_V, -1).expand(POSITIONS, vocab_size)
    token_N = teachers.sample(log_probs_NV, seed=4)
    place_N = torch.arange(POSITIONS)
    rows_N5 = philox.rows(11, place_N // 100, place_N % 100, draw)
    return log_probs_NV, token_N, extract(log_probs_NV, token_N, rows_N5)


@pytest.mark.parametrize(("shape", "draw"), [("flat", 0), ("peaked", 0), ("random", 0), ("random", 1), ("peaked", 127)])
def test_noise_of_sampled_tokens_is_independent_gumbel(shape: str, draw: int) -> None:
    _, _, g_NV = extracted(shape, posterior_gumbel, draw=draw)
    found = p_values(g_NV)
    assert min(found.values()) > SMALLEST, found


@pytest.mark.parametrize("shape", ["flat", "peaked", "random"])
def test_the_shortcut_that_pins_the_winner_fails_the_same_tests(shape: str) -> None:
    log_probs_NV, token_N, g_NV = extracted(shape, pinned_winner)
    assert torch.equal((log_probs_NV.double() + g_NV).argmax(1), token_N), "the shortcut does choose the token, which is why it tempts"
    found = p_values(g_NV)
    assert min(found.values()) < 1e-12, found


def test_the_perturbed_maximum_is_gumbel_and_knows_nothing_of_the_token() -> None:
    log_probs_NV, token_N, g_NV = extracted("random", posterior_gumbel)
    top_N = (log_probs_NV + g_NV).max(1).values.numpy()
    assert stats.kstest(top_N, "gumbel_r").pvalue > SMALLEST
    for token in range(5):
        assert stats.kstest(top_N[(token_N == token).numpy()], "gumbel_r").pvalue > SMALLEST


@pytest.mark.parametrize("shape", [shape for shape in teachers.SHAPES if shape != "on the grid"])
@pytest.mark.parametrize("vocab_size", [2, 7, 1000])
def test_the_token_is_the_argmax_even_when_it_was_not_sampled(shape: str, vocab_size: int) -> None:
    log_probs_NV = teachers.log_probs(shape, 300, vocab_size, seed=5)
    token_N = torch.multinomial((log_probs_NV > -100).float(), 1, generator=torch.Generator().manual_seed(6))[:, 0]
    g_NV = posterior_gumbel(log_probs_NV, token_N, philox.rows(1, torch.arange(300), torch.ones(300, dtype=torch.int64)))
    assert torch.isfinite(g_NV).all()
    assert torch.equal((log_probs_NV.double() + g_NV.double()).argmax(1), token_N)


def test_near_ties_cost_no_more_than_float32_has() -> None:
    """Some E_i are a millionth of p_i E_0 or less, so that an entry all but ties with the token."""
    log_probs_NV = teachers.log_probs("flat", 3000, 1000, seed=8)
    token_N = teachers.sample(log_probs_NV, 8)
    rows_N5 = philox.rows(3, torch.arange(3000), torch.arange(3000))
    score_NV = log_probs_NV.double() + posterior_gumbel(log_probs_NV, token_N, rows_N5).double()
    rival_N = score_NV.scatter(1, token_N[:, None], -torch.inf).max(1).values
    lead_N = score_NV.gather(1, token_N[:, None])[:, 0] - rival_N
    assert float(lead_N.min()) < 1e-3, "near ties are among them"
    assert float(lead_N.min()) > -1e-5


@pytest.mark.parametrize("p_x", [1e-3, 1e-10, 1e-30, 1e-37])
def test_a_token_of_tiny_probability_gets_exact_finite_noise(p_x: float) -> None:
    p_NV = torch.full((200, 64), (1 - p_x) / 63, dtype=torch.float64)
    p_NV[:, 17] = p_x
    log_probs_NV, token_N = p_NV.log().float(), torch.full((200,), 17)
    rows_N5 = philox.rows(2, torch.arange(200), torch.arange(200))
    g_NV = posterior_gumbel(log_probs_NV, token_N, rows_N5)
    expected_N = -np.log(p_x) - np.log(philox.winner_exponential(rows_N5).double().numpy())
    np.testing.assert_allclose(g_NV[:, 17].double().numpy(), expected_N, atol=1e-5)
    assert torch.equal((log_probs_NV + g_NV).argmax(1), token_N)


def test_equals_the_float64_reference() -> None:
    for shape in teachers.SHAPES:
        log_probs_NV = teachers.log_probs(shape, 4, 9, seed=7)
        token_N = log_probs_NV.argmax(1)
        rows_N5 = philox.rows(2**64 - 1, torch.full((4,), 12), torch.arange(4), 5)
        found_NV = posterior_gumbel(log_probs_NV, token_N, rows_N5).numpy()
        for position in range(4):
            expected_V = reference.posterior_gumbel(log_probs_NV[position].numpy(), int(token_N[position]), 2**64 - 1, 12, position, 5)
            np.testing.assert_allclose(found_NV[position], expected_V, atol=1e-5)
