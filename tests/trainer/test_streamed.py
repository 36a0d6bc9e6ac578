"""Noise that passes by in chunks does to a student what the whole [N, V] does, forward and backward."""

from __future__ import annotations

import pytest
import torch

from noise import philox
from noise.decode import Noise
from trainer import streamed

POSITIONS, VOCAB, HIDDEN = 11, 1501, 6


@pytest.fixture(params=[256, 700, 4096])
def noise(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Noise:
    """With a few entries that are not the prior's, and chunks of several sizes."""
    monkeypatch.setitem(streamed.CHUNK_ENTRIES, "cpu", request.param * POSITIONS)
    owner_K = torch.tensor([0, 4, 4, 10])
    return Noise(
        philox.rows(3, torch.arange(POSITIONS), torch.arange(POSITIONS)),
        VOCAB,
        owner_K,
        torch.tensor([7, 8, 1500, 0]),
        torch.tensor([70.0, -2.0, 9.0, 1.0]),
    )


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize("prior", [False, True])
def test_a_streamed_projection_is_the_softmax_of_the_noise_through_the_weights(noise: Noise, prior: bool) -> None:
    log_prior_V = random(VOCAB).log_softmax(0) if prior else None
    weight_VH = random(VOCAB, HIDDEN).requires_grad_()
    exact_NH = ((noise.dense().double() + (log_prior_V if prior else 0)).softmax(-1)) @ weight_VH
    given_VH = weight_VH.detach().float().requires_grad_()
    out_NH = streamed.project(noise, given_VH, None if log_prior_V is None else log_prior_V.float())
    torch.testing.assert_close(out_NH.double(), exact_NH, rtol=1e-5, atol=1e-5)
    along_NH = random(POSITIONS, HIDDEN)
    (exact_VH,) = torch.autograd.grad((exact_NH * along_NH).sum(), weight_VH)
    (out_VH,) = torch.autograd.grad((out_NH * along_NH.float()).sum(), given_VH)
    torch.testing.assert_close(out_VH.double(), exact_VH, rtol=1e-4, atol=1e-6)


def test_streamed_noise_added_to_logits_is_the_noise_added_to_logits(noise: Noise) -> None:
    logits_NV, scale_N1 = random(POSITIONS, VOCAB).float().requires_grad_(), random(POSITIONS, 1).float().requires_grad_()
    along_NV = random(POSITIONS, VOCAB).float()
    results = []
    for out_NV in (streamed.add(logits_NV, scale_N1, noise), logits_NV + scale_N1 * noise.dense()):
        results.append((out_NV, *torch.autograd.grad((out_NV * along_NV).sum(), (logits_NV, scale_N1))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_step_of_no_masked_positions_is_a_step(noise: Noise) -> None:
    none = Noise.prior(noise.rows_N5[:0], VOCAB)
    weight_VH = random(VOCAB, HIDDEN).float().requires_grad_()
    streamed.project(none, weight_VH).sum().backward()
    assert streamed.project(none, weight_VH).shape == (0, HIDDEN) and not weight_VH.grad.any()  # type: ignore[union-attr]


def test_under_autocast_products_are_in_its_dtype_and_sums_are_not(noise: Noise) -> None:
    weight_VH = random(VOCAB, HIDDEN).float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out_NH = streamed.project(noise, weight_VH)
        out_NH.sum().backward()
    assert out_NH.dtype == torch.float32 and weight_VH.grad.dtype == torch.float32  # type: ignore[union-attr]
    torch.testing.assert_close(out_NH, noise.dense().softmax(-1) @ weight_VH, rtol=0.05, atol=0.05)
