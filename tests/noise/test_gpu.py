"""A GPU makes the same noise as a CPU: words and uniforms bit for bit, exponentials within 2 ulp, sketches within the same bounds."""

from __future__ import annotations

import pytest
import torch

from noise import philox
from noise.sketch import Codec, Sketch, decode, encode, justified
from tests.noise import teachers

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def places() -> torch.Tensor:
    return philox.rows(2**64 - 3, torch.arange(50) << 33, torch.arange(50) * 300_000, 127)


def test_words_and_uniforms_equal_the_cpus() -> None:
    ours_NV, theirs_NV = philox.words(places(), 50_257), philox.words(places().cuda(), 50_257)
    assert torch.equal(theirs_NV.cpu(), ours_NV)
    assert torch.equal(philox.uniform(theirs_NV).cpu(), philox.uniform(ours_NV))
    exact_NV = -torch.log1p(-philox.uniform(ours_NV).double())
    ulp_NV = exact_NV.float().nextafter(torch.tensor(torch.inf)).double() - exact_NV.float().double()
    assert float(((philox.exponential(theirs_NV).cpu().double() - exact_NV).abs() / ulp_NV).max()) <= 2


def test_rows_are_the_same_places() -> None:
    sequence_id_N, position_N = torch.arange(50) << 33, torch.arange(50) * 300_000
    assert torch.equal(philox.rows(2**64 - 3, sequence_id_N.cuda(), position_N.cuda(), 127).cpu(), places())


@pytest.mark.parametrize("draws", [1, 4])
def test_what_a_gpu_encodes_a_cpu_decodes(draws: int) -> None:
    codec, rows_N5 = Codec(3000, 0.125, draws), philox.with_draw(places(), 0)
    log_probs_NV = teachers.log_probs("zipf", 50, 3000, seed=1)
    token_N = teachers.sample(log_probs_NV, 1)
    made = encode(log_probs_NV.cuda(), token_N.cuda(), rows_N5.cuda(), codec)
    here = Sketch(*(value.cpu() for value in vars(made).values()))
    assert justified(here, rows_N5, codec).all()
    g_NV = decode(here, token_N, rows_N5, codec)
    torch.testing.assert_close(decode(made, token_N.cuda(), rows_N5.cuda(), codec).cpu(), g_NV, atol=1e-5, rtol=0)
    assert torch.equal((log_probs_NV.double() + g_NV.double()).argmax(1), token_N)
