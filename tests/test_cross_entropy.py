"""The benchmark of token-level distillation runs through its real functions; its exact figures are those of the encoder and of the proof."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import cross_entropy, teachers
from benchmarks.estimators import Student, Weights, columns, kept_weights, sampled_weights, top_k_weights
from noise import estimate
from noise.sketch import Codec

SMALL = ["--vocab_sizes", "[300]", "--positions", "24", "--draws", "[2]", "--top_k", "[8,500]", "--encodings", "64"]


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The JSON of one small run of the command."""
    output = tmp_path_factory.mktemp("cross_entropy") / "cross_entropy.json"
    assert cross_entropy.main([*SMALL, "--output", str(output)]) == 0
    return json.loads(output.read_text())


def position(vocab_size: int, seed: int) -> tuple[torch.Tensor, int, Student]:
    """A teacher's p, a token and a student, at one position."""
    source = teachers.simulated(vocab_size, 1, 1, seed)
    log_q_V = torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log_softmax(0)
    return source.log_probs_NV[0].double().exp(), int(source.token_N[0]), Student(log_q_V.exp(), -log_q_V)


def test_exact_errors_are_those_of_real_encodings(printed: dict) -> None:
    for found in printed["teachers"]["simulated, V = 300"]["students"].values():
        rows = [row for row in found["estimators"] if row["estimator"] == "kept"]
        assert [row["draws"] for row in rows] == [1, 2]
        for row in rows:
            assert row["measured_rmse"] == pytest.approx(row["rmse"]["1"], rel=0.2)
            assert row["kept"] == pytest.approx(row["expected_kept"], rel=0.1)
            assert abs(row["bias"]) < 0.01 * found["cross_entropy"] < row["std"]


def test_top_k_is_given_at_least_the_sketchs_bytes_and_is_biased(printed: dict) -> None:
    for found in printed["teachers"]["simulated, V = 300"]["students"].values():
        sketch, *_ = found["estimators"]
        top = [row for row in found["estimators"] if row["estimator"] == "top-k"]
        assert {row["tail"] for row in top} == {"truncated", "renormalised", "tail even"} and 500 not in {row["k"] for row in top}
        for row in top:
            assert row["k"] == 8 or 0 <= row["bytes"] - sketch["bytes"] < 4
            assert row["rmse"]["1000000"] == pytest.approx(abs(row["bias"]), rel=0.01)
            assert row["rmse"]["1000000"] > 5 * sketch["rmse"]["1000000"]


def test_the_variance_is_the_documented_one_at_one_draw() -> None:
    p_V, token, student = position(80, 3)
    codec = Codec(80)
    weights = kept_weights(p_V, token, columns([student]), codec)
    middle_V = torch.exp(-codec.step * ((-p_V.log() / codec.step).floor() + 0.5)).index_fill(0, torch.tensor([token]), 0.0)
    part_V = (middle_V + codec.c) * student.nll_V * (middle_V > 0)  # weight times what it weighs; the documented formula has p + c = p / pi
    pi_V, t_V = estimate.inclusion(p_V, codec), p_V / codec.c
    both_VV = 1 - 1 / (1 + t_V[:, None]) - 1 / (1 + t_V) + 1 / (1 + t_V[:, None] + t_V)  # both of two entries kept
    both_VV.diagonal().copy_(pi_V)
    expected = float(part_V @ (both_VV - torch.outer(pi_V, pi_V)) @ part_V)
    assert float(weights.covariance_CC[1, 1]) == pytest.approx(expected, rel=1e-9)


def test_samples_and_top_k_have_their_textbook_moments() -> None:
    p_V, _, student = position(50, 4)
    column_VC = columns([student])
    drawn = sampled_weights(p_V, column_VC, 5)
    mean = p_V @ student.nll_V
    assert float(drawn.covariance_CC[1, 1]) == pytest.approx(float(p_V @ (student.nll_V - mean) ** 2) / 5)
    assert float(drawn.covariance_CC[0, 0]) == pytest.approx(0.0, abs=1e-12)
    inside = float(p_V.topk(6).values.sum())
    for tail, total in (("truncated", inside), ("renormalised", 1.0), ("tail even", 1.0)):
        weights: Weights = top_k_weights(p_V, column_VC, 6, tail)
        assert float(weights.mean_V.sum()) == pytest.approx(total) and not weights.covariance_CC.any()


def test_a_teacher_and_a_dataset_come_together(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cross_entropy.main([*SMALL, "--teacher", str(tmp_path)]) == 1
    assert "give both or neither" in capsys.readouterr().err
