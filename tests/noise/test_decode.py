"""Noise made a chunk at a time is the noise that `decode` makes at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from noise import philox
from noise.decode import Noise, decode
from noise.sketch import Codec, encode
from tests.noise import teachers

POSITIONS = 13


def noise_of(vocab_size: int) -> tuple[Noise, torch.Tensor]:
    """(unmade, made at once), under a teacher that gives one token almost no chance."""
    log_probs_NV = teachers.log_probs("zipf", POSITIONS, vocab_size, seed=vocab_size)
    token_N = torch.arange(POSITIONS) * 977 % vocab_size
    log_probs_NV[3, token_N[3]] = -69.0
    codec, rows_N5 = Codec(vocab_size), philox.rows(5, torch.arange(POSITIONS) << 33, torch.arange(POSITIONS))
    sketch = encode(log_probs_NV, token_N, rows_N5, codec)
    return Noise.posterior(sketch, token_N, rows_N5, codec), decode(sketch, token_N, rows_N5, codec)


@given(st.sampled_from([2, 3, 258, 4099]), st.integers(1, 1100))
def test_chunks_of_any_size_are_the_dense_noise(vocab_size: int, blocks: int) -> None:
    unmade, g_NV = noise_of(vocab_size)
    parts, chunks = zip(*unmade.chunks(4 * blocks), strict=True)
    assert [(part.start, part.stop) for part in parts] == [(start, min(start + 4 * blocks, vocab_size)) for start in range(0, vocab_size, 4 * blocks)]
    torch.testing.assert_close(torch.cat(chunks, 1), g_NV, rtol=0, atol=1e-6)
    assert torch.equal(unmade.dense(), g_NV)


@pytest.mark.parametrize("numba", [True, False])
def test_rates_are_exponentials_of_the_noise_and_never_overflow(numba: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not numba:
        monkeypatch.setattr(philox, "native", lambda: None)
    unmade, g_NV = noise_of(258)
    ceiling_N = unmade.ceiling()
    assert ceiling_N[3] > 60 and (ceiling_N >= 0).all()
    rate_NV = torch.cat([chunk_NC for _, chunk_NC in unmade.rates(64, ceiling_N)], 1)
    assert torch.isfinite(rate_NV).all()
    exact_NV = (g_NV.double() - ceiling_N.double()[:, None]).exp()
    torch.testing.assert_close(rate_NV.double(), exact_NV, rtol=3e-6, atol=1e-38)


def test_prior_noise_replaces_nothing() -> None:
    rows_N5 = philox.rows(5, torch.arange(7), torch.arange(7))
    unmade = Noise.prior(rows_N5, 301)
    assert torch.equal(unmade.dense(), philox.gumbel(rows_N5, 301))
    assert torch.equal(unmade.ceiling(), torch.zeros(7))
