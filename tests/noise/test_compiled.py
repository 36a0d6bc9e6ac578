"""Compilation changes the speed and nothing else; without a compiler there is one warning and the same bits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from noise import compiled, philox, sketch

ROOT = Path(__file__).parents[2]

BOTH_WAYS = """
import json, torch
from noise import compiled, philox, sketch
torch.set_num_threads(1)

@compiled.compiled
def everything(log_probs_NV, token_N, rows_N5):
    word_NV = philox.words(rows_N5, log_probs_NV.shape[1])
    return word_NV, philox.uniform(word_NV), philox.exponential(word_NV), sketch.moved.eager(log_probs_NV, token_N, rows_N5, 7.5)

rows_N5 = philox.rows(2**63 + 5, torch.arange(64) << 30, torch.arange(64) * 99_991, 3)
log_probs_NV = torch.log_softmax(3 * torch.randn(64, 1003, generator=torch.Generator().manual_seed(0)), -1)
arguments = log_probs_NV, torch.arange(64), rows_N5
fast, slow = everything(*arguments), everything.eager(*arguments)
exact = -torch.log1p(-fast[1].double())
ulp = exact.float().abs().nextafter(torch.tensor(torch.inf)).double() - exact.float().double()
try:
    everything(log_probs_NV, torch.arange(63), rows_N5)
except Exception as caught:
    error = type(caught).__name__
print(json.dumps({
    "error of the function": error,
    "compiled": not compiled._broken,
    "words": torch.equal(fast[0], slow[0]),
    "uniforms": torch.equal(fast[1], slow[1]),
    "ulps": float(((fast[2].double() - exact).abs() / ulp).max()),
    "kept differ": int((fast[3] != slow[3]).sum()),
}))
"""

THRESHOLDS = """
import json, torch
from noise import compiled, sketch
torch.set_num_threads(1)

threshold = compiled.compiled(sketch._threshold)
y_K = torch.cat([torch.logspace(-9, 1.2, 2**16, dtype=torch.float64).float(), torch.zeros(16)])
exact_K = (-torch.expm1(-y_K.double()) * 2**32).clamp_max(2.0**32)

def beside_exact(found_K):
    return [float(((found_K.clamp_max(2**32) + 0.5) / exact_K)[:-16].min()), float(((found_K - 0.5) / exact_K)[:-16].max()), int(found_K[-16:].max())]

print(json.dumps({"compiled": beside_exact(threshold(y_K)), "eager": beside_exact(sketch._threshold(y_K)), "works": not compiled._broken}))
"""

WITHOUT_COMPILER = """
import json, torch, warnings
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
    assert result["kept differ"] == 0


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler on this machine")
def test_thresholds_are_never_too_low_even_for_the_smallest_probabilities() -> None:
    """A threshold below 1 - e^-y drops an entry that must be kept; one far above keeps an entry that `verify` takes for damage."""
    result = run(THRESHOLDS)
    if not result["works"]:
        pytest.skip("torch.compile does not work on this machine")
    for way in ("compiled", "eager"):
        least, greatest, of_zero = result[way]  # type: ignore[misc]
        assert least >= 1 and greatest <= 1 + 2.0**-19 and of_zero == 0, way


def test_without_a_compiler_there_is_one_warning_and_the_same_noise(tmp_path: Path) -> None:
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


def test_the_eager_source_stays_reachable() -> None:
    rows_N5 = philox.rows(1, torch.arange(3), torch.arange(3))
    assert torch.equal(philox.gumbel.eager(rows_N5, 9), philox.gumbel(rows_N5, 9))  # type: ignore[attr-defined]
    assert callable(sketch.moved.eager)  # type: ignore[attr-defined]
