"""The wide teacher computes what the small one does, with as many parameters as were asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from benchmarks import wide_teacher


def test_a_wide_teacher_has_the_small_ones_logits_and_the_parameters_asked_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = LlamaForCausalLM(LlamaConfig(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2))
    small.save_pretrained(tmp_path / "small")
    options = ["--teacher", str(tmp_path / "small"), "--output", str(tmp_path / "wide"), "--parameters", "200_000"]
    assert wide_teacher.main(options) == 0 and wide_teacher.main(options) == 1, "nothing is overwritten"
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "wide")
    ids_BL = torch.randint(0, 31, (3, 9))
    assert torch.allclose(small.eval()(ids_BL).logits, wide.eval()(ids_BL).logits, atol=1e-5)
    assert 195_000 < sum(parameter.numel() for parameter in wide.parameters()) <= 200_000
    assert wide.model.layers[0].mlp.up_proj.weight[24:].abs().min() > 0, "units that cost as much as others"


def test_what_cannot_be_widened_is_said() -> None:
    with pytest.raises(ValueError, match="a gpt2 has no MLPs of gate_proj"):
        wide_teacher.widen(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9, bos_token_id=0, eos_token_id=0)), 10**6)
    small = LlamaForCausalLM(LlamaConfig(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2))
    with pytest.raises(ValueError, match=r"parameters is 10, but the model has [\d,]+ already"):
        wide_teacher.widen(small, 10)
