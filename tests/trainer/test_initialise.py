"""What students start from: known numbers end where they mean the same, and the report says what did not."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from noise.storage import DatasetError
from trainer.__main__ import parse
from trainer.config import NoiseConfig, StudentConfig
from trainer.initialise import start_from
from trainer.students import build, save_student, save_tensors

V, L, H, HEADS = 13, 8, 16, 2
INERT_CALLS = []


def student(**changes):
    torch.manual_seed(1)
    return build(StudentConfig(**{"layers": 2, "hidden": H, "heads": HEADS, **changes}), V, L)


def dit_weights(seed: int = 0, modulated: bool = True, entries: int = V + 1) -> dict[str, torch.Tensor]:
    """A network with the parameter names of the published checkpoints, in the order in which theirs are registered; rotary_emb is a buffer."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    weights = {"backbone.vocab_embed.embedding": random(entries, H)}
    if modulated:
        weights |= {"backbone.sigma_map.mlp.0.weight": random(12, 256) * 0.1, "backbone.sigma_map.mlp.0.bias": random(12)}
        weights |= {"backbone.sigma_map.mlp.2.weight": random(12, 12), "backbone.sigma_map.mlp.2.bias": random(12)}
    weights["backbone.rotary_emb.inv_freq"] = 10000 ** (-torch.arange(0, H // HEADS, 2) / (H // HEADS))
    for number in range(2):
        block = f"backbone.blocks.{number}."
        weights |= {f"{block}norm1.weight": 1 + random(H), f"{block}attn_qkv.weight": random(3 * H, H), f"{block}attn_out.weight": random(H, H)}
        weights |= {f"{block}norm2.weight": 1 + random(H), f"{block}mlp.0.weight": random(4 * H, H), f"{block}mlp.0.bias": random(4 * H)}
        weights |= {f"{block}mlp.2.weight": random(H, 4 * H), f"{block}mlp.2.bias": random(H)}
        if modulated:
            weights |= {f"{block}adaLN_modulation.weight": random(6 * H, 12), f"{block}adaLN_modulation.bias": random(6 * H)}
    output = "backbone.output_layer."
    weights |= {f"{output}norm_final.weight": 1 + random(H), f"{output}linear.weight": random(entries, H), f"{output}linear.bias": random(entries)}
    if modulated:
        weights |= {f"{output}adaLN_modulation.weight": random(2 * H, 12), f"{output}adaLN_modulation.bias": random(2 * H)}
    return weights


def reference_forward(weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """The published network at sigma 0, from its equations, in float64, with rotations as complex numbers. Logits [L, entries] of one row."""
    w = {name.removeprefix("backbone."): tensor.double() for name, tensor in weights.items()}
    modulated = "sigma_map.mlp.0.weight" in w
    x, length, width = w["vocab_embed.embedding"][ids], len(ids), H // HEADS
    if modulated:
        angles = 0.0 * torch.exp(-math.log(10000) * torch.arange(128) / 128)
        sinusoids = torch.cat((angles.cos(), angles.sin())).double()
        inner = F.silu(w["sigma_map.mlp.0.weight"] @ sinusoids + w["sigma_map.mlp.0.bias"])
        c = F.silu(w["sigma_map.mlp.2.weight"] @ inner + w["sigma_map.mlp.2.bias"])

    def modulation(prefix: str, parts: int) -> list[torch.Tensor]:
        if not modulated:
            return [torch.tensor(value) for value in (0.0, 0.0, 1.0) * 2][:parts]
        return list((w[f"{prefix}adaLN_modulation.weight"] @ c + w[f"{prefix}adaLN_modulation.bias"]).chunk(parts))

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * weight

    frequency = 10000.0 ** (-torch.arange(0, width, 2).double() / width)
    turn = torch.polar(torch.ones(length, width // 2).double(), torch.outer(torch.arange(length).double(), frequency))
    for number in range(2):
        block = f"blocks.{number}."
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(block, 6)
        qkv = (norm(x, w[f"{block}norm1.weight"]) * (1 + scale1) + shift1) @ w[f"{block}attn_qkv.weight"].T
        q, k, v = qkv.view(length, 3, HEADS, width).unbind(1)
        q, k = (torch.complex(part[..., : width // 2], part[..., width // 2 :]) * turn[:, None] for part in (q, k))
        scores = torch.einsum("qhd,khd->hqk", q, k.conj()).real / width**0.5
        x = x + gate1 * (torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(length, H) @ w[f"{block}attn_out.weight"].T)
        inner = (norm(x, w[f"{block}norm2.weight"]) * (1 + scale2) + shift2) @ w[f"{block}mlp.0.weight"].T + w[f"{block}mlp.0.bias"]
        x = x + gate2 * (F.gelu(inner, approximate="tanh") @ w[f"{block}mlp.2.weight"].T + w[f"{block}mlp.2.bias"])
    shift, scale = modulation("output_layer.", 2)
    x = norm(x, w["output_layer.norm_final.weight"]) * (1 + scale) + shift
    return x @ w["output_layer.linear.weight"].T + w["output_layer.linear.bias"]


def logits_of(own, ids: torch.Tensor) -> torch.Tensor:
    return own.eval().logits(ids[None])


IDS = torch.tensor([0, V, 3, V, V, 7, 1, V])


@pytest.mark.parametrize("modulated", [True, False], ids=["adaLN", "plain"])
def test_a_published_checkpoint_computes_in_a_dit_student_what_it_computed_at_home(tmp_path, modulated):
    weights = dit_weights(modulated=modulated)
    save_tensors(tmp_path / "model.safetensors", weights)
    own = student(backbone="dit", tied=False)
    said = start_from(own, tmp_path)
    expected = reference_forward(weights, IDS)[IDS == V, :V]
    torch.testing.assert_close(logits_of(own, IDS).double(), expected, rtol=1e-4, atol=1e-4)
    assert (expected.max() - expected.min()) > 1 and any("folded" in line for line in said) == modulated
    assert not any("kept its initial value" in line for line in said), said


def test_a_block_student_starts_from_a_published_checkpoint_too(tmp_path):
    save_tensors(tmp_path / "model.safetensors", dit_weights())
    own = student(kind="bd3lm", block_size=4, backbone="dit", tied=False)
    assert not any("kept" in line for line in start_from(own, tmp_path))


class Settings:
    """Somebody's class inside a checkpoint."""

    def __init__(self):
        self.steps = 3

    def __setstate__(self, state):
        INERT_CALLS.append(state)


def call_me(*_):
    INERT_CALLS.append("called")


class Calls:
    def __reduce__(self):
        return call_me, ("rm",)


def test_a_lightning_checkpoint_gives_its_averaged_weights_and_runs_nothing(tmp_path):
    weights, averaged = dit_weights(0), dit_weights(5)
    shadow = [tensor for name, tensor in averaged.items() if "rotary" not in name]
    content = {"state_dict": weights, "ema": {"decay": 0.9999, "num_updates": 7, "shadow_params": shadow}, "hyper_parameters": [Settings(), Calls()]}
    torch.save(content, tmp_path / "last.ckpt")
    own = student(backbone="dit", tied=False)
    said = start_from(own, tmp_path / "last.ckpt")
    torch.testing.assert_close(logits_of(own, IDS).double(), reference_forward(averaged, IDS)[IDS == V, :V], rtol=1e-4, atol=1e-4)
    assert any("averaged weights (EMA)" in line for line in said) and not INERT_CALLS
    content["ema"]["shadow_params"] = [*shadow[:-1], torch.zeros(3)]
    torch.save(content, tmp_path / "last.ckpt")
    said = start_from(own, tmp_path)
    assert any("do not fit its own state" in line for line in said)
    torch.testing.assert_close(logits_of(own, IDS).double(), reference_forward(weights, IDS)[IDS == V, :V], rtol=1e-4, atol=1e-4)


class Removes:
    def __reduce__(self):
        import os

        return os.system, ("touch should-not-exist",)


def test_a_pickle_that_wants_to_run_something_is_refused(tmp_path):
    torch.save({"state_dict": dit_weights(), "more": Removes()}, tmp_path / "bad.ckpt")
    with pytest.raises(DatasetError, match=r"bad\.ckpt cannot be read without running code"):
        start_from(student(), tmp_path / "bad.ckpt")
    (tmp_path / "bad.ckpt").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(DatasetError, match=r"bad\.ckpt"):
        start_from(student(), tmp_path / "bad.ckpt")


def test_a_llama_student_takes_attention_and_embedding_of_a_published_one_and_says_what_it_leaves(tmp_path):
    weights = dit_weights()
    save_tensors(tmp_path / "model.safetensors", weights)
    own = student()
    said = start_from(own, tmp_path)
    attention = own.model.layers[1].self_attn
    assert torch.equal(
        torch.cat([p.weight for p in (attention.q_proj, attention.k_proj, attention.v_proj)]), weights["backbone.blocks.1.attn_qkv.weight"]
    )
    assert torch.equal(own.model.embed_tokens.weight, weights["backbone.vocab_embed.embedding"])
    assert "  loaded: model.layers.*.self_attn.q_proj.weight x 2" in said
    assert "  kept its initial value: model.layers.*.mlp.gate_proj.weight (not in the checkpoint) x 2" in said
    assert "  kept its initial value: model.norm.weight (not in the checkpoint)" in said
    assert "  unused there: model.norm.weight (LayerNorm)" in said


def gpt2(folder):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=V, n_positions=L, n_embd=H, n_layer=2, n_head=HEADS, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model.eval()


def test_gpt2_gives_a_dit_all_but_positions_and_attention_biases(tmp_path):
    """Where a row is one position, neither positions nor what attention compares matter; without its biases GPT-2 computes the same."""
    model = gpt2(tmp_path)
    own = student(backbone="dit")
    said = start_from(own, tmp_path)
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()
        for block in model.transformer.h:
            block.attn.c_attn.bias.zero_()
            block.attn.c_proj.bias.zero_()
        hidden = own.model.embed_tokens(torch.tensor([[5]]))
        for layer in own.model.layers:
            hidden = layer(hidden, *own.model.rotary(1), False, None)
        torch.testing.assert_close(own.model.head(hidden, V), model(torch.tensor([[5]])).logits, rtol=1e-4, atol=1e-4)
    mean = model.transformer.wte.weight.mean(0)
    torch.testing.assert_close(own.model.embed_tokens.weight[V], mean)
    assert any(f"model.embed_tokens.weight ({V} of {V + 1} entries, the mask as their mean)" in line for line in said)
    assert {"  unused there: wpe.weight", "  unused there: h.*.attn.c_attn.bias x 2"} <= set(said) and any(
        "learned positions" in line for line in said
    )


def test_gpt2_gives_a_llama_student_its_attention_in_the_right_order(tmp_path):
    model = gpt2(tmp_path)
    own = student()
    start_from(own, tmp_path)
    q, k, v = model.transformer.h[1].attn.c_attn.weight.T.chunk(3)
    attention = own.model.layers[1].self_attn
    for part, expected in ((attention.q_proj, q), (attention.k_proj, k), (attention.v_proj, v)):
        assert torch.equal(part.weight, expected)
    assert torch.equal(own.model.norm.weight, torch.ones(H))


@pytest.mark.parametrize("sharded", [False, True])
def test_a_llama_loads_by_name_whole_or_in_shards_and_its_rotary_base_is_compared(tmp_path, sharded):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=V, hidden_size=H, intermediate_size=64, num_hidden_layers=1, num_attention_heads=HEADS, tie_word_embeddings=False,
                         rope_parameters={"rope_type": "default", "rope_theta": 500000.0})  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path, max_shard_size="5KB" if sharded else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    own = student()
    said = start_from(own, tmp_path)
    for layer in own.model.layers:  # the second takes the first again
        assert torch.equal(layer.mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)
    assert "  unused there: lm_head.weight" in said and any("rotary base is 500000" in line for line in said)


def modernbert(folder, **settings):
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    torch.manual_seed(3)
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)
    model = ModernBertForMaskedLM(
        ModernBertConfig(vocab_size=V, hidden_size=H, intermediate_size=32, num_hidden_layers=2, num_attention_heads=HEADS, **special, **settings)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 4, "content": "[MASK]"}]}))
    return model.eval()


def test_a_modernberts_layers_compute_in_a_llama_what_they_did(tmp_path):
    """With its rotary base and activation as ours, attention and MLP are the same functions; only its norms are not."""
    same_base = {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")}
    model = modernbert(tmp_path, hidden_activation="silu", rope_parameters=same_base)
    own = student(mlp=32)
    said = start_from(own, tmp_path)
    x_BLH, rotary = torch.randn(2, 6, H), own.model.rotary(6)
    for layer, theirs in zip(own.model.layers, model.model.layers, strict=True):
        cos_1LD, sin_1LD = (part[None] for part in rotary)
        assert torch.allclose(layer.self_attn(x_BLH, *rotary, False, None), theirs.attn(x_BLH, (cos_1LD, sin_1LD))[0], atol=1e-5)
        assert torch.allclose(layer.mlp(x_BLH), theirs.mlp(x_BLH), atol=1e-5) and float(theirs.mlp(x_BLH).abs().mean()) > 1e-3
        assert torch.equal(layer.input_layernorm.weight, torch.ones(H)), "a LayerNorm's weights mean nothing to an RMSNorm"
    embedding = model.get_input_embeddings().weight
    assert torch.equal(own.model.embed_tokens.weight, torch.cat((embedding, embedding[4:5])))
    assert any("the mask as their entry 4" in line for line in said) and not any("must adapt" in line for line in said)
    assert any("see 128 positions around their own alone" in line for line in said)
    unused = {line.split(": ")[1] for line in said if "unused there" in line}
    assert unused == {
        "head.dense.weight", "head.norm.weight", "embeddings.norm.weight", "decoder.bias", "model.norm.weight (LayerNorm)",
        "model.layers.*.norm1.weight x 1", "model.layers.*.norm2.weight x 2",
    }  # fmt: skip


@pytest.mark.parametrize("norm_bias", [False, True])
def test_a_modernberts_norms_and_attention_are_a_dits(tmp_path, norm_bias):
    model = modernbert(tmp_path, norm_bias=norm_bias)
    own = student(backbone="dit", layers=2)
    said = start_from(own, tmp_path)
    x_BLH = torch.randn(2, 6, H)
    assert torch.allclose(own.model.norm(x_BLH), model.model.final_norm(x_BLH), atol=1e-5)
    layer, theirs = own.model.layers[1], model.model.layers[1]
    assert torch.allclose(layer.norm1(x_BLH), theirs.attn_norm(x_BLH), atol=1e-5)
    assert torch.allclose(layer.norm2(x_BLH), theirs.mlp_norm(x_BLH), atol=1e-5)
    assert torch.equal(layer.attn_qkv.weight, theirs.attn.Wqkv.weight) and torch.equal(layer.attn_out.weight, theirs.attn.Wo.weight)
    assert any("rotary base of some of its layers is 160000," in line for line in said) and any("gated by gelu" in line for line in said)
    assert {"  unused there: model.layers.*.mlp.gate_proj.weight x 2", "  loaded: model.layers.*.norm2.weight x 2"} <= set(said)
    assert "  loaded: model.layers.*.norm1.weight x 1" in said, "its first layer has no norm before attention"
    unused = {line.split(": ")[1] for line in said if "unused there" in line}
    assert ("embeddings.norm.bias" in unused) == ("head.norm.bias" in unused) == norm_bias


@pytest.mark.parametrize(
    ("config", "bases"),
    [
        ({"global_rope_theta": 160000.0, "local_rope_theta": 10000.0}, ["160000"]),
        ({"global_rope_theta": 80000, "local_rope_theta": 20000}, ["20000", "80000"]),
        ({"rope_parameters": {"full_attention": None, "sliding_attention": {"rope_theta": 10000.0}}}, ["160000"]),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, []),
        ({}, ["160000"]),
    ],
)
@pytest.mark.parametrize("prefix", ["", "bert.", "model.model."])
def test_a_modernberts_rotary_bases_are_compared_however_its_config_names_them(tmp_path, config, bases, prefix):
    model = modernbert(tmp_path)
    save_tensors(tmp_path / "model.safetensors", {prefix + name: tensor for name, tensor in model.model.state_dict().items()})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "modernbert", **config}))
    said = start_from(student(mlp=32), tmp_path)
    assert [line.split(" is ")[1].split(",")[0] for line in said if "rotary base" in line] == bases


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_bert_gives_its_embedding_and_its_mask_token(tmp_path, family):
    from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

    config, kind = {"bert": (BertConfig, BertForMaskedLM), "roberta": (RobertaConfig, RobertaForMaskedLM)}[family]
    model = kind(config(vocab_size=V, hidden_size=H, num_hidden_layers=1, num_attention_heads=HEADS, intermediate_size=32, pad_token_id=1))
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 4, "content": "<mask>" if family == "roberta" else "[MASK]"}]}))
    own = student()
    said = start_from(own, tmp_path)
    embedding = model.get_input_embeddings().weight
    assert torch.equal(own.model.embed_tokens.weight, torch.cat((embedding, embedding[4:5])))
    assert any("the mask as their entry 4" in line for line in said) and any("unused there" in line and "attention" in line for line in said)


def test_a_students_checkpoint_gives_its_averaged_weights_and_what_it_has_of_noise(tmp_path):
    noise = NoiseConfig(kind="gumbel", input="replace", readout=True)
    old, plain = student(noise=noise), student()
    save_tensors(tmp_path / "model.safetensors", old.own_state())
    averaged = {name: tensor + 1 for name, tensor in old.own_state().items()}
    save_tensors(tmp_path / "average.safetensors", averaged)
    (tmp_path / "state.json").write_text("{}")
    new = student(noise=noise)
    assert any("averaged weights of the checkpoint" in line for line in start_from(new, tmp_path))
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in new.own_state().items())
    assert "  unused there: input.projection.weight" in start_from(plain, tmp_path)


@pytest.mark.parametrize("what", ["nowhere", "no/where/at/all"])
def test_what_is_not_there_is_named(what):
    with pytest.raises(DatasetError, match=f"'{what}' is neither a folder nor a file"):
        start_from(student(), what)


def test_another_width_is_refused(tmp_path):
    narrow = student(hidden=8)
    save_student(tmp_path, narrow, narrow.own_state(), {}, {})
    with pytest.raises(DatasetError, match="no tensor fits"):
        start_from(student(), tmp_path)


def test_backbones_are_refused_where_they_would_be_ignored():
    with pytest.raises(ValueError, match=r"student\.tied is false"):
        student(tied=False)
    with pytest.raises(ValueError, match="reads neither"):
        student(kind="ar", backbone="dit")


def test_the_recipe_of_the_published_dit_small_has_its_shapes():
    config = parse(["--config", "recipes/paper/owt_mdlm.yaml"])
    with torch.device("meta"):
        small = build(config.student, 50257, 1024)
    layer = 3 * 768**2 + 768**2 + 2 * 768 * 3072 + 3072 + 768 + 4 * 768
    assert sum(parameter.numel() for parameter in small.parameters()) == 50258 * 768 + 12 * layer + 2 * 768


def test_a_dit_student_learns_with_all_its_weights():
    own = student(backbone="dit", tied=False)
    F.cross_entropy(own.logits(IDS[None]), torch.zeros(int((IDS == V).sum()), dtype=torch.int64)).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in own.parameters())
