"""A GPU makes the same noise as a CPU: words and uniforms bit for bit, exponentials within 2 ulp, sketches equal but for words at the threshold.

`pytest -m gpu`. Most of it runs eagerly; what is compiled (Triton) runs in a process of its own, since conftest.py turns compilation off.
"""

from __future__ import annotations

import pytest
import torch

from noise import philox
from noise.decode import decode
from noise.posterior import posterior_gumbel
from noise.sketch import Codec, Sketch, encode, justified, quantise
from tests.noise import teachers
from tests.noise.test_compiled import run

GPU = torch.device("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

COMPILED = """
import json, torch
from noise import candidates, compiled, philox
from noise.sketch import Codec, encode

@compiled.compiled
def stream(rows_N5, vocab_size):
    word_NV = philox.words(rows_N5, vocab_size)
    return word_NV, philox.uniform(word_NV), philox.exponential(word_NV)

device = torch.device("cuda")
rows_N5 = philox.rows(2**63 + 5, torch.arange(64) << 30, torch.arange(64) * 99_991, 3)
result = {"words": True, "uniforms": True, "ulps": 0.0}
for vocab_size in (5, 50_257, 151_936):
    here, there = stream.eager(rows_N5, vocab_size), [value.cpu() for value in stream(rows_N5.to(device), vocab_size)]
    exact_NV = -torch.log1p(-here[1].double())
    ulp_NV = exact_NV.float().nextafter(torch.tensor(torch.inf)).double() - exact_NV.float().double()
    result["words"] &= torch.equal(there[0], here[0])
    result["uniforms"] &= torch.equal(there[1], here[1])
    result["ulps"] = max(result["ulps"], float(((there[2].double() - exact_NV).abs() / ulp_NV).max()))
gumbel_NV = -torch.log(-torch.log1p(-philox.uniform(philox.words(rows_N5, 50_257)).double()))
result["gumbel"] = float((philox.gumbel(rows_N5.to(device), 50_257).cpu().double() - gumbel_NV).abs().max())

logits_NV = 3 * torch.randn(64, 3001, generator=torch.Generator().manual_seed(0))
arguments = [value.to(device) for value in (logits_NV.bfloat16(), torch.arange(64), rows_N5)]
normaliser_N = arguments[0].float().logsumexp(1)
fast = encode(*arguments, Codec(3001, 0.125, 4), normaliser_N)
candidates.possible = candidates.possible.eager
slow = encode(*arguments, Codec(3001, 0.125, 4), normaliser_N)
result["sketches"] = all(torch.equal(one, other) for one, other in zip(fast.tensors(), slow.tensors(), strict=True))
print(json.dumps(result | {"compiled": not compiled._broken}))
"""


def places(draw: int = 127) -> torch.Tensor:
    return philox.rows(2**64 - 3, torch.arange(50) << 33, torch.arange(50) * 300_000, draw)


@pytest.mark.parametrize("vocab_size", [5, 50_257, 151_936])
def test_words_and_uniforms_equal_the_cpus(vocab_size: int) -> None:
    ours_NV, theirs_NV = philox.words(places(), vocab_size), philox.words(places().to(GPU), vocab_size)
    assert torch.equal(theirs_NV.cpu(), ours_NV)
    assert torch.equal(philox.uniform(theirs_NV).cpu(), philox.uniform(ours_NV))
    exact_NV = -torch.log1p(-philox.uniform(ours_NV).double())
    ulp_NV = exact_NV.float().nextafter(torch.tensor(torch.inf)).double() - exact_NV.float().double()
    assert float(((philox.exponential(theirs_NV).cpu().double() - exact_NV).abs() / ulp_NV).max()) <= 2


def test_uniforms_equal_the_cpus_at_every_edge_of_rounding() -> None:
    power_K = 2 ** torch.arange(33)
    word_K = torch.cat([power_K + off for off in range(-300, 300)]).clamp(0, 2**32 - 1).unique()
    assert torch.equal(philox.uniform(word_K.to(GPU)).cpu(), philox.uniform(word_K))


def test_rows_are_the_same_places() -> None:
    sequence_id_N, position_N = torch.arange(50) << 33, torch.arange(50) * 300_000
    assert torch.equal(philox.rows(2**64 - 3, sequence_id_N.to(GPU), position_N.to(GPU), 127).cpu(), places())
    entry_N = torch.arange(50) * 3_000_001
    assert torch.equal(philox.words_at(places().to(GPU), entry_N.to(GPU)).cpu(), philox.words_at(places(), entry_N))


@pytest.mark.parametrize("shape", teachers.SHAPES)
def test_posterior_noise_is_the_cpus(shape: str) -> None:
    log_probs_NV = teachers.log_probs(shape, 50, 2001, seed=2)
    token_N = teachers.sample(log_probs_NV, 2)
    theirs_NV = posterior_gumbel(log_probs_NV.to(GPU), token_N.to(GPU), places().to(GPU)).cpu()
    torch.testing.assert_close(theirs_NV, posterior_gumbel(log_probs_NV, token_N, places()), atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("shape", teachers.SHAPES)
@pytest.mark.parametrize("draws", [1, 4])
def test_a_gpu_keeps_what_a_cpu_keeps_but_for_words_at_the_threshold(shape: str, draws: int) -> None:
    codec, rows_N5 = Codec(3001, 0.05, draws), places(0)
    log_probs_NV = teachers.log_probs(shape, 50, 3001, seed=1)
    token_N = teachers.sample(log_probs_NV, 1)
    ours, theirs = encode(log_probs_NV, token_N, rows_N5, codec), encode(log_probs_NV.to(GPU), token_N.to(GPU), rows_N5.to(GPU), codec)
    assert torch.equal(theirs.log_prob_N.cpu(), ours.log_prob_N)
    kept_2NV = torch.zeros(2, 50, 3001, dtype=torch.bool)
    for mask_NV, sketch in zip(kept_2NV, (ours, theirs), strict=True):
        owner_K = torch.repeat_interleave(torch.arange(50), sketch.kept_N.cpu())
        mask_NV[owner_K, sketch.index_K.cpu()] = True
        assert torch.equal(sketch.code_K.cpu(), quantise(log_probs_NV[owner_K, sketch.index_K.cpu()], codec))
    for owner, index in (kept_2NV[0] ^ kept_2NV[1]).nonzero().tolist():
        nearest = torch.inf
        for draw in range(draws):
            row_15 = philox.with_draw(rows_N5[owner : owner + 1], draw)
            y = log_probs_NV[owner, index].double().exp() * philox.winner_exponential(row_15).double() / codec.c
            word = philox.words_at(row_15, torch.tensor([index]))
            nearest = min(nearest, abs(float(word / (-torch.expm1(-y) * 2.0**32 * (1 + 2.0**-20))) - 1))
        assert nearest < 2.0**-20, (owner, index)


@pytest.mark.parametrize("draws", [1, 4])
def test_what_a_gpu_encodes_a_cpu_decodes(draws: int) -> None:
    codec = Codec(3000, 0.125, draws)
    log_probs_NV = teachers.log_probs("zipf", 50, 3000, seed=1)
    token_N = teachers.sample(log_probs_NV, 1)
    made = encode(log_probs_NV.to(GPU), token_N.to(GPU), places(0).to(GPU), codec)
    here = Sketch(*(value.cpu() for value in made.tensors()))
    assert justified(here, places(0), codec).all() and justified(made, places(0).to(GPU), codec).all()
    for draw in range(draws):
        g_NV = decode(here, token_N, places(draw), codec)
        torch.testing.assert_close(decode(made, token_N.to(GPU), places(draw).to(GPU), codec).cpu(), g_NV, atol=1e-5, rtol=0)
        assert torch.equal((log_probs_NV.double() + g_NV.double()).argmax(1), token_N)


def test_compiled_for_a_gpu_the_words_are_the_cpus_and_the_sketch_is_the_eager_one() -> None:
    result = run(COMPILED)
    if not result["compiled"]:
        pytest.skip("torch.compile does not work for this device")
    assert result["words"] and result["uniforms"] and result["sketches"]
    assert float(str(result["ulps"])) <= 2
    assert float(str(result["gumbel"])) <= 4e-6  # g reaches 22.9, whose spacing is 2e-6
