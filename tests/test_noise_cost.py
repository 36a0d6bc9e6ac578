"""What noise costs is counted on the modules, and the formula for FLOPs is torch's own count of a student's forward."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.noise_cost import SIZES, Config, count, noise_flops, options, price, run
from trainer.config import NoiseConfig, StudentConfig
from trainer.flops import forward
from trainer.students import build, parameters

V, L = 101, 8


def small(noise: NoiseConfig) -> StudentConfig:
    return StudentConfig(layers=2, hidden=16, heads=2, mlp=24, noise=noise)


@pytest.mark.parametrize("name", ["none", *options(2, 3)])
def test_the_formula_is_torchs_count_of_a_forward(name: str) -> None:
    config = small(options(2, 3).get(name, NoiseConfig()))
    student = build(config, V, L)
    ids_BL = torch.full((1, L), V)
    ids_BL[0, [0, 5]] = 3  # two known tokens
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # others are not counted on a CPU
        student.logits(ids_BL, torch.randn(L - 2, V))  # type: ignore[call-arg]
    assert counter.get_total_flops() == forward(config, V, L, L - 2)
    assert count(config, V, L) == parameters(student)


def test_the_papers_input_adds_v_x_h_and_the_other_options_next_to_nothing() -> None:
    for name in ("GPT-2 small", "Qwen2.5 0.5B"):
        size, row = SIZES[name], price(Config(), name)
        added = {option["option"]: option["parameters"] for option in row["options"]}
        assert added["input, own (paper)"] == row["table"] == size.vocab_size * size.hidden
        assert added["input, tied"] == 0 and added["readout"] == size.hidden + 1
        assert added["input, rank 64"] == 64 * (size.vocab_size + size.hidden)
        assert added["draft"] == size.hidden**2 + size.hidden + 1
        assert added["input, tied + readout + draft"] == added["draft"] + added["readout"]


def test_v_x_h_of_qwen_7b_is_the_published_share_of_seven_billion() -> None:
    size = SIZES["Qwen 7B"]
    assert round(size.vocab_size * size.hidden / 7e9, 3) == 0.089


@pytest.mark.parametrize("name", SIZES)
def test_a_student_is_about_as_large_as_its_namesake(name: str) -> None:
    """But for keys and values that are not shared, and a head that is tied."""
    size = SIZES[name]
    untied = size.vocab_size * size.hidden if name in ("Llama 2 7B", "Qwen2.5 7B", "Qwen 7B") else 0
    assert count(size.student(NoiseConfig()), size.vocab_size, 1024) + untied == pytest.approx(size.namesake, rel=0.15)


def test_a_projection_of_the_noise_costs_what_the_output_head_costs() -> None:
    assert noise_flops(NoiseConfig("gumbel", "replace"), 16, V) == 2 * 16 * V
    assert noise_flops(NoiseConfig("gumbel", drafts=[1, 2]), 16, V) == 2 * (4 * 16 * V + 2 * 16**2 + 2 * 16)


def test_the_command_writes_what_it_found_and_names_what_it_does_not_know(tmp_path: Path) -> None:
    rows = run(Config(sizes=["GPT-2 small"], output=str(tmp_path / "cost.json")))
    assert json.loads((tmp_path / "cost.json").read_text())["sizes"] == rows
    with pytest.raises(ValueError, match="GPT-5"):
        Config(sizes=["GPT-5"])
