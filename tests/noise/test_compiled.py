"""Compilation, by numba or torch, changes the speed and nothing else; without either there is one warning and the same bits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from noise import candidates, compiled, philox
from noise.sketch import Codec, encode

ROOT = Path(__file__).parents[2]

BOTH_WAYS = """
import json, torch
from noise import candidates, compiled, philox
torch.set_num_threads(1)

@compiled.compiled
def everything(logits_NV, normaliser_N, rows_N5):
    word_NV = philox.words(rows_N5, logits_NV.shape[1])
    offset_N = 162 * candidates.BITS * torch.ones_like(normaliser_N)
    return word_NV, philox.uniform(word_NV), philox.exponential(word_NV), candidates.possible.eager(logits_NV, normaliser_N, rows_N5, offset_N)

rows_N5 = philox.rows(2**63 + 5, torch.arange(64) << 30, torch.arange(64) * 99_991, 3)
logits_NV = 3 * torch.randn(64, 1003, generator=torch.Generator().manual_seed(0))
arguments = logits_NV, logits_NV.logsumexp(1), rows_N5
fast, slow = everything(*arguments), everything.eager(*arguments)
exact = -torch.log1p(-fast[1].double())
ulp = exact.float().abs().nextafter(torch.tensor(torch.inf)).double() - exact.float().double()
try:
    everything(logits_NV, torch.zeros(63), rows_N5)
except Exception as caught:
    error = type(caught).__name__
print(json.dumps({
    "error of the function": error,
    "compiled": not compiled._broken,
    "words": torch.equal(fast[0], slow[0]),
    "uniforms": torch.equal(fast[1], slow[1]),
    "ulps": float(((fast[2].double() - exact).abs() / ulp).max()),
    "found": float(slow[3].sum(dtype=torch.int64) / 64),
    "found differ": int((fast[3] != slow[3]).sum()),
}))
"""

WITHOUT_COMPILER = """
import json, sys, torch, warnings
sys.modules["numba"] = None
from noise import philox
rows_N5 = philox.rows(3, torch.arange(4), torch.arange(4))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    g_NV = philox.gumbel(rows_N5, 11)
    philox.gumbel(rows_N5, 12)
ours = [str(w.message) for w in caught if str(w.message).startswith("torch.compile")]
print(json.dumps({"warnings": ours, "bits": g_NV.view(torch.int32).tolist()}))
"""


def run(program: str, **environment: str) -> dict[str, object]:
    inherited = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=inherited | {"OMP_NUM_THREADS": "1"} | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler on this machine")
def test_compiled_words_equal_eager_words() -> None:
    result = run(BOTH_WAYS)
    if not result["compiled"]:
        pytest.skip("torch.compile does not work on this machine")
    assert result["error of the function"] == "RuntimeError", "shapes that do not fit are the caller's error, not the compiler's"
    assert result["words"] and result["uniforms"]
    assert float(str(result["ulps"])) <= 2
    assert int(str(result["found differ"])) <= 1, "the search may differ at its edge; what is kept is decided after it"
    assert 1 < float(str(result["found"])) < 30


def test_without_numba_and_a_compiler_there_is_one_warning_and_the_same_noise(tmp_path: Path) -> None:
    result = run(WITHOUT_COMPILER, CXX=str(tmp_path / "absent"), PATH=str(tmp_path), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    expected_NV = philox.gumbel(philox.rows(3, torch.arange(4), torch.arange(4)), 11)
    assert result["bits"] == expected_NV.view(torch.int32).tolist()
    assert len(result["warnings"]) == 1 and "running eagerly" in result["warnings"][0]  # type: ignore[arg-type, index]


def test_an_error_of_the_function_itself_is_raised_and_breaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_broken", [])

    @compiled.compiled
    def refuses(x: torch.Tensor) -> torch.Tensor:
        raise ValueError(f"{len(x)} is not welcome")

    with warnings.catch_warnings(), pytest.raises(ValueError, match="3 is not welcome"):
        warnings.simplefilter("error")
        refuses(torch.zeros(3))
    assert not compiled._broken


ROWS_N5 = philox.rows(2**63 + 5, torch.arange(9) << 40, torch.arange(9) * 99_991, 3)


@pytest.mark.parametrize("vocab_size", [2, 3, 4, 1003, 4096, 4097, 9000])
def test_numbas_words_and_uniforms_are_the_streams(vocab_size: int) -> None:
    native = pytest.importorskip("noise.native")
    word_NV, v_NV = np.zeros((9, -(-vocab_size // 4) * 4), np.uint32), np.zeros((9, vocab_size), np.float32)
    for row_5, word_V in zip(ROWS_N5.numpy(), word_NV, strict=True):
        native.words(row_5, 0, len(word_V) // 4, word_V)
    native.uniform(ROWS_N5.numpy(), 0, v_NV)
    expected_NV = philox.words(ROWS_N5, vocab_size)
    assert np.array_equal(word_NV[:, :vocab_size], expected_NV.numpy())
    assert np.array_equal(v_NV, philox.uniform(expected_NV).numpy())


@pytest.mark.parametrize("vocab_size", [2, 3, 1003, 30_000])
def test_gumbels_are_the_same_with_and_without_numba(vocab_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    fast_NV = philox.gumbel(ROWS_N5, vocab_size)
    monkeypatch.setattr(philox, "native", lambda: None)
    torch.testing.assert_close(fast_NV, philox.gumbel(ROWS_N5, vocab_size), rtol=0, atol=1e-6)


@pytest.mark.parametrize("vocab_size", [2, 3, 70, 5000])
def test_shards_do_not_depend_on_numba(vocab_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Epsilon is small, so that the first guess at the number of candidates is too small as well."""
    pytest.importorskip("numba")
    logits_NV = 2 * torch.randn(9, vocab_size, generator=torch.Generator().manual_seed(vocab_size))
    arguments = logits_NV, torch.arange(9) % vocab_size, ROWS_N5, Codec(vocab_size, 0.004, 2), logits_NV.logsumexp(1)
    fast = encode(*arguments)
    monkeypatch.setattr(candidates, "native", lambda: None)
    slow = encode(*arguments)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(fast.tensors(), slow.tensors(), strict=True))
    assert vocab_size < 5000 or len(fast.index_K) > 9 * 64


@given(st.lists(st.floats(-90, 0), min_size=1, max_size=40), st.floats(1e-6, 130), st.integers(0, 2**40))
def test_the_search_finds_every_entry_that_is_kept(log_prob_V: list[float], ceiling: float, sequence_id: int) -> None:
    """`find` against the exact rule in float64, entry by entry, with probabilities from certain to impossible."""
    rows_N5 = philox.rows(11, torch.tensor([sequence_id]), torch.tensor([5]))
    log_probs_NV = torch.tensor([log_prob_V])
    y_V = log_probs_NV[0].double().exp() * float(torch.tensor(ceiling))
    word_V = philox.words(rows_N5, len(log_prob_V))[0]
    kept_V = word_V < (-torch.expm1(-y_V) * (2.0**32 * (1 + 2.0**-20)) - 0.5).ceil()
    found = candidates.find(log_probs_NV, torch.zeros(1), rows_N5, torch.tensor([ceiling]))
    assert torch.equal(found.word_K, word_V[found.index_K])
    assert set(kept_V.nonzero()[:, 0].tolist()) <= set(found.index_K.tolist())
    if compiled.native() is None:
        return
    useless_K = word_V[found.index_K] > y_V[found.index_K] * 2.0**32 * 1.064 + 1
    assert not bool(useless_K.any()), "a candidate has log2(word) at most 0.0861 + margin above the bound"
