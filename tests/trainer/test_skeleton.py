"""The shape of a frozen backbone: where it comes from, that it is the real one's, and what an estimate makes of it without a network."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.trainer.test_medusa import write_backbone
from tests.trainer.test_recipes import RECIPES, length_of, read
from trainer import heads_cost
from trainer.__main__ import main
from trainer.config import MedusaConfig
from trainer.estimate import Where, estimate
from trainer.frozen import Frozen
from trainer.skeleton import FAMILIES, skeleton
from trainer.students import parameters
from trainer.students.medusa import Medusa

GPT2 = ["--config", "recipes/medusa_gpt2.yaml"]
VICUNA = ["--config", "recipes/medusa_vicuna_7b.yaml"]


@pytest.fixture(autouse=True)
def _without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks for the network finds a failing test."""

    def refused(*_: Any) -> None:
        pytest.fail("an estimate asked the network")

    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)


def said(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["estimate", *options]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("family", "parameters"),
    [
        ("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200),
        ("vicuna-7b", 6_738_415_616), ("vicuna-13b-v1.5", 13_015_864_320),
    ],
)  # fmt: skip
def test_a_familys_shape_has_as_many_parameters_as_was_published(family: str, parameters: int) -> None:
    found = skeleton(MedusaConfig(f"somewhere/{family}", dtype="bfloat16"))
    assert found.parameters == parameters and found.bytes == 2
    assert found.vocab_size == FAMILIES[family]["vocab_size"] and found.source.startswith(f"{family} as published, by its name: somewhere/{family}")
    assert {parameter.device.type for parameter in found.model.parameters()} == {"meta"}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_folders_shape_is_its_models_and_so_is_its_config_elsewhere(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = write_backbone(tmp_path / "model", family)
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = tmp_path / "its.json"
    (folder / "config.json").rename(config)
    for named, backbone in ((str(config), "nowhere/at/all"), ("", str(folder)), (str(folder), "openai-community/gpt2")):
        if named != str(config):
            (folder / "config.json").write_bytes(config.read_bytes())
        found = skeleton(MedusaConfig(backbone), named)
        assert {name: weight.shape for name, weight in found.model.named_parameters()} == {
            name: weight.shape for name, weight in model.named_parameters()
        }
        assert found.source == (named if named == str(config) else str(folder / "config.json"))


def test_heads_are_trained_at_the_rate_of_autocast_and_the_backbone_read_at_that_of_its_dtype(capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, *GPT2, "--block_length", "1024", "--mfu", "0.5", "--gpus", "4")
    found = estimate(read(Path("recipes/medusa_gpt2.yaml")), 50_257, 1024, Where("h100", 4, 0.5))
    matrices, hidden = 12 * 12 * 768**2, 768
    assert found.frozen_flops == 64 * 1024 * (2 * matrices + 4 * 1024 * 12 * 768)
    assert found.seconds == pytest.approx((found.frozen_flops / 67e12 + (found.step_flops - found.frozen_flops) / 989e12) / (0.5 * 4))
    heads = 3 * (hidden**2 + hidden) + (2 + 3 + 4) * hidden**2 + 3 * (hidden + 1)
    drafts = 3 * (hidden**2 + 1 + hidden + 1)
    assert found.parameters == heads + drafts + hidden  # and the norm of the slots
    for text in (
        "openai-community/gpt2 is not here (--backbone_config)",
        "124.4 M in float32, frozen",
        "0.50 GB  frozen backbone",
        "of 67.0 for the",
    ):
        assert text in out, out


@pytest.mark.parametrize("noise", ["", "_input"])
def test_the_twin_without_noise_costs_less_by_all_that_noise_needs(noise: str) -> None:
    for family, length in (("gpt2", 1024), ("vicuna_7b", 512)):
        one, twin = (estimate(read(Path(f"recipes/medusa_{family}{end}.yaml")), *shape(family, length), Where()) for end in (noise, "_none"))
        assert one.of_noise == one.parameters - twin.parameters > 0 == twin.of_noise
        assert one.frozen_flops == twin.frozen_flops and one.step_flops > twin.step_flops and one.total_memory > twin.total_memory
        assert one.memory["frozen backbone"] == twin.memory["frozen backbone"] and one.fits


def shape(family: str, length: int) -> tuple[int, int]:
    return (50_257 if family == "gpt2" else 32_000), length


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_a_student_has_an_estimate_without_network(path: Path, tmp_path: Path) -> None:
    config, demo = read(path), path.stem.startswith("demo")
    backbone = None
    if config.student.kind == "medusa":  # the demo's own backbone is there after the demo
        backbone = skeleton(config.student.medusa, str(write_backbone(tmp_path / "teacher")) if demo else "")
    found = estimate(config, backbone.vocab_size if backbone else 50_257, 16 if backbone and demo else length_of(path), Where(), backbone)
    assert found.steps == config.optim.steps and found.fits
    assert all(size > 0 for size in found.memory.values()) and found.gpu_hours > 0
    assert found.parameters > found.of_noise >= 0 and bool(found.of_noise) == (config.student.noise.kind != "none")


def test_several_recipes_make_a_table_and_what_trains_nothing_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    files = ["recipes/paper/lm1b_mdlm.yaml", "recipes/paper/lm1b_report.yaml", "recipes/paper/lm1b_generate.yaml", "recipes/medusa_gpt2.yaml"]
    table = said(capsys, "--recipes", *files, "--vocab_size", "50257", "--block_length", "128", "--optim.steps", "500")
    assert [line.split("|")[1:3] for line in table.splitlines()[2:]] == [[" lm1b_mdlm ", " 500 "], [" medusa_gpt2 ", " 500 "]]


def test_a_table_goes_on_after_a_recipe_that_cannot_be_told(capsys: pytest.CaptureFixture[str]) -> None:
    recipes = ["recipes/medusa_vicuna_7b.yaml", "recipes/nowhere.yaml", "pyproject.toml", "recipes/medusa_gpt2.yaml"]
    assert main(["estimate", "--recipes", *recipes, "--vocab_size", "50257", "--block_length", "128"]) == 1
    out, err = capsys.readouterr()
    assert "recipes/nowhere.yaml: " in err and "pyproject.toml: " in err
    assert "| medusa_gpt2 |" in out and "vicuna" not in out
    assert "recipes/medusa_vicuna_7b.yaml: student.medusa.backbone models/vicuna-7b has logits of width 32000" in err


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ([*GPT2], "give --vocab_size and --block_length"),
        ([*GPT2, "--block_length", "2048"], "reads 1024 positions, the dataset's block_length is 2048"),
        ([*GPT2, "--block_length", "128", "--student.medusa.backbone", "no/such/place"], "give --backbone_config: a config.json, its folder, or"),
        ([*GPT2, "--block_length", "128", "--backbone_config", "nowhere"], "nowhere does not exist; give --backbone_config: a config.json"),
        ([*GPT2, "--block_length", "128", "--student.medusa.backbone", ""], "student.medusa.backbone is empty; set it to the folder or hub id"),
        ([*VICUNA, "--block_length", "128", "--vocab_size", "32001"], "has logits of width 32000, the dataset's vocab_size is 32001"),
        (["--config", "recipes/demo_ar.yaml", "--backbone_config", "gpt2"], "--backbone_config is gpt2, but student.kind is ar"),
    ],
)  # fmt: skip
def test_a_backbone_that_cannot_be_told_is_refused_with_the_way_out(options: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", *options]) == 1
    assert why in capsys.readouterr().err


def test_a_config_of_something_else_is_refused_by_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for settings in ({"model_type": "no such type"}, {"model_type": "vit"}, {}):
        (tmp_path / "config.json").write_text(json.dumps(settings))
        assert main(["estimate", *GPT2, "--block_length", "128", "--backbone_config", str(tmp_path)]) == 1
        assert f"{tmp_path / 'config.json'} is no config of a causal LM" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 99}))
    assert main(["estimate", *GPT2, "--block_length", "128", "--backbone_config", str(tmp_path)]) == 1
    assert "of a MambaForCausalLM, whose config has no num_attention_heads" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(Path("recipes").glob("medusa_*.yaml")), ids=lambda path: path.stem)
def test_paper_heads_fit_on_the_meta_device_and_cost_what_the_estimate_says(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The student at full size on its backbone at full size, forward over one row, without a byte of weights."""
    config, length = read(path).student, 512
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)  # which the meta device knows nothing of
    backbone = skeleton(config.medusa)
    vocab, drafted = backbone.vocab_size, {}
    with torch.device("meta"), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        made = Medusa(config, vocab, length, Frozen.bare(config.medusa, backbone.model, vocab, length))
        ids_BL, mask = torch.empty(1, length, dtype=torch.int64), torch.ones(1, 1, length, length, dtype=torch.bool)
        hidden_NH = made.base.model.base_model(input_ids=ids_BL, attention_mask=mask, use_cache=False).last_hidden_state[0, :-1].float()
        slot_PH = None if made.input is None else made.input(made.empty, torch.empty(length - 1, vocab), made.base.embedding_VH)
        for offset in range(1, made.places + 1):
            places = length - offset
            drafted = {place: embedded_NH[:places] for place, embedded_NH in drafted.items()}
            at_N = torch.empty(places, dtype=torch.int64)
            step = made._step(offset, hidden_NH[:places], at_N, drafted, slot_PH, lambda place_N: torch.empty(len(place_N), vocab))
            assert offset == 1 or step.logits_NV.shape == (places, vocab)
            assert offset not in config.noise.drafts or step.draft_NV.shape == (places, vocab)
    forward = sum(flops for flops, _ in heads_cost.products(made, length))
    assert counter.get_total_flops() == heads_cost.of_backbone(backbone, length) + forward
    assert parameters(made) == estimate(read(path), vocab, length, Where(), backbone).parameters


def test_a_config_in_the_hubs_cache_is_used_before_a_familys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    folder = tmp_path / "models--owner--gpt2"
    write_backbone(folder / "snapshots" / "c0ffee")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("c0ffee")
    find = huggingface_hub.try_to_load_from_cache
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *names, **options: find(*names, cache_dir=tmp_path, **options))
    cached, other = skeleton(MedusaConfig("owner/gpt2")), skeleton(MedusaConfig("another/gpt2"))
    assert (cached.hidden, cached.source) == (16, "owner/gpt2, in the hub's cache")
    assert other.hidden == 768
