"""The benchmarks of speed run through the project's own functions on small inputs. What they time is not looked at, what they compare is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import decode, encode, machine, packed
from trainer.chance import Chance

SMALL = ["--layers", "1", "--hidden", "16", "--heads", "2", "--micro_batch", "2", "--block_length", "12", "--rounds", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _quick_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "bandwidth", lambda device: 1e10)
    monkeypatch.setattr(machine, "products", lambda device: 1e10)


def test_encoding_is_measured_beside_the_forward_and_against_its_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert encode.main([*SMALL, "--vocab_sizes", "[300,70000]", "--output", str(tmp_path / "encode.json")]) == 0
    found = json.loads((tmp_path / "encode.json").read_text())
    assert [row["vocab_size"] for row in found["vocabularies"]] == [300, 70000]
    for row in found["vocabularies"]:
        assert set(row["tokens_a_second"]) == {"forward", "sketch", "published"} and row["positions"] == 22
        micro = row["microseconds_a_position"]
        assert row["over_limit"] == pytest.approx(micro["encode"] / max(micro["bandwidth"], micro["integer"]))
        assert micro["bandwidth"] == pytest.approx(row["vocab_size"] * 4 / 1e4) and micro["integer"] == pytest.approx(row["vocab_size"] * 5 / 1e4)
    assert "70,000" in capsys.readouterr().out


def test_the_published_extraction_is_noise_whose_argmax_is_the_token() -> None:
    logits_NV = torch.randn(50, 31, generator=torch.Generator().manual_seed(0))
    token_N = torch.arange(50) % 31
    torch.manual_seed(0)
    assert torch.equal((logits_NV.log_softmax(1) + encode.published(logits_NV, token_N)).argmax(1), token_N)


def test_steps_are_measured_against_the_product_and_the_teacher_in_the_loop(tmp_path: Path) -> None:
    assert decode.main([*SMALL, "--vocab_size", "300", "--output", str(tmp_path / "decode.json")]) == 0
    found = json.loads((tmp_path / "decode.json").read_text())
    assert set(found["steps"]) == {"no noise", "floor", "input", "input, made", "readout", "readout, streamed", "teacher in the loop"}
    assert found["steps"]["floor"]["over_floor"] == 1 and found["steps"]["teacher in the loop"]["over_loop"] == 1
    assert 0 < found["masked"] < 22 and found["positions"] == 24


def test_noise_that_is_made_and_noise_that_is_streamed_train_the_same_student() -> None:
    config = decode.Config(layers=1, hidden=16, heads=2, vocab_size=300, block_length=12)
    batch = decode.random_batch(config, torch.device("cpu"))
    losses = []
    for kind in (decode.MDLM, decode.Made):
        torch.manual_seed(0)
        student = kind(decode.StudentConfig(layers=1, hidden=16, heads=2, noise=decode.INPUT), 300, 12)
        losses.append(float(student(batch, Chance(1, 1, 2))[0].detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_packed_model_is_measured_beside_the_plain_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--layers", "1", "--hidden", "16", "--heads", "2", "--vocab_size", "300", "--rows", "1", "--length", "80", "--rounds", "3"]
    assert packed.main([*shape, "--tokens", "[1,3]", "--output", str(tmp_path / "packed.json")]) == 0
    found = json.loads((tmp_path / "packed.json").read_text())
    assert set(found["packed_over_plain"]) == {"1 tokens", "3 tokens", "whole rows"} and set(found["over_the_first"]["packed"]) == {
        "1 tokens",
        "3 tokens",
    }
    assert found["over_the_first"]["plain"]["1 tokens"] == 1 and min(found["seconds"].values()) > 0
    assert "whole rows" in capsys.readouterr().out


def test_peak_memory_is_what_a_call_needs_beyond_what_was_there() -> None:
    kept = torch.ones(2**22)
    if not machine.peak_memory(lambda: torch.ones(2**24), torch.device("cpu")):
        pytest.skip("this system does not tell its peak memory")
    assert 0.9 * 2**26 < machine.peak_memory(lambda: torch.ones(2**24), torch.device("cpu")) < 1.5 * 2**26
    assert len(kept) == 2**22
