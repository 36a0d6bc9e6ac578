"""Packed layers: the same numbers, in any model that runs on them, and refused where they would not be."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from noise.storage import DatasetError
from pipeline.packed import Packed, pack
from tests.pipeline.test_teacher import job
from tests.pipeline.world import World, save_teacher

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def model(family: str) -> torch.nn.Module:
    torch.manual_seed(1)
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)).eval()
    if family == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(vocab_size=50, tie_word_embeddings=True, initializer_range=0.3, **SHAPE)).eval()
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, tie_word_embeddings=False, initializer_range=0.3, **SHAPE)).eval()


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_a_packed_model_computes_what_it_computed(family: str) -> None:
    plain = model(family)
    packed = copy.deepcopy(plain)
    pack(packed, "packed", "drop it")
    layers = [layer for layer in packed.modules() if isinstance(layer, Packed)]
    assert len(layers) == {"gpt2": 2 * 4 + 1, "llama": 2 * 7 + 1, "qwen2": 2 * 7 + 1}[family]
    assert not [layer for layer in packed.modules() if isinstance(layer, torch.nn.Linear) or type(layer).__name__ == "Conv1D"]
    assert packed.get_output_embeddings().weight.shape == (50, 32)  # type: ignore[operator]
    for rows, length in ((1, 1), (1, 5), (3, 17), (8, 32)):
        ids_BL = torch.randint(50, (rows, length))
        with torch.inference_mode():
            torch.testing.assert_close(packed(input_ids=ids_BL).logits, plain(input_ids=ids_BL).logits, rtol=1e-4, atol=1e-4)
            cache = packed(input_ids=ids_BL[:, :-1], use_cache=True).past_key_values if length > 1 else None
            last_BV = packed(input_ids=ids_BL[:, -1:], past_key_values=cache).logits[:, -1]
            torch.testing.assert_close(last_BV, plain(input_ids=ids_BL).logits[:, -1], rtol=1e-4, atol=1e-4)


def test_what_cannot_be_packed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        DatasetError, match=r"teacher\.packed is true, but the model computes on cpu in float64, not on cpu in float32; set ray\.gpus to 0"
    ):
        pack(model("llama").double(), "teacher.packed", "set ray.gpus to 0")
    with pytest.raises(DatasetError, match="the model computes on meta in float32"):
        pack(model("llama").to("meta"), "packed", "drop it")
    for look in (lambda weight: weight.sum(), lambda weight: weight @ torch.ones(32)):
        curious = model("llama")
        curious.forward = lambda real=curious.forward, of=curious, look=look, **given: (look(of.model.layers[0].mlp.up_proj.weight), real(**given))[1]
        with pytest.raises(DatasetError, match="a LlamaForCausalLM does not run on packed layers"):
            pack(curious, "packed", "drop it")
    monkeypatch.setattr(Packed, "forward", lambda self, x: torch.zeros(*x.shape[:-1], len(self.bias if self.weight is None else self.weight)))
    with pytest.raises(DatasetError, match="the packed GPT2LMHeadModel computes something else"):
        pack(model("gpt2"), "packed", "drop it")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(DatasetError, match="this build of torch has no oneDNN"):
        pack(model("llama"), "packed", "drop it")


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    assert made.run("tokenizer") == 0
    save_teacher(made.root / "teacher")
    return made


def test_a_packed_teacher_is_part_of_the_plan_and_says_the_same(world: World, tmp_path: Path) -> None:
    packed, plain = job(world, "packed", teacher__packed="true"), job(world, "plain")
    assert packed.plan.environment["numerics"]["packed"] is True and "packed" not in plain.plan.environment["numerics"]
    assert packed.extract(0).nll_sum == pytest.approx(plain.extract(0).nll_sum, rel=1e-5)
    assert any(isinstance(layer, Packed) for layer in packed.teacher._model.modules())  # type: ignore[union-attr]
    with pytest.raises(DatasetError, match=r"teacher\.packed: None here, True there"):
        job(world, "packed")
    for name, value in (("dtype", "bfloat16"), ("device_map", "auto")):
        with pytest.raises(ValueError, match=r"teacher\.packed is true with .*, but packed weights are float32 on a CPU"):
            world.recipe(output=tmp_path, teacher__packed="true", **{f"teacher__{name}": value})
    with pytest.raises(ValueError, match=r"teacher\.packed and teacher\.compile are both true"):
        world.recipe(output=tmp_path, teacher__packed="true", teacher__compile="true")
