"""What heads on a frozen causal LM cost: FLOPs are torch's own count, memory is what autograd keeps, and no moment of a step exceeds it."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from noise.decode import Noise
from tests.trainer.test_medusa import OPTIONS
from trainer import heads_cost
from trainer.chance import Chance
from trainer.config import MedusaConfig, NoiseConfig, StudentConfig
from trainer.frozen import Frozen
from trainer.skeleton import Skeleton, skeleton
from trainer.students import build, parameters
from trainer.students.medusa import Medusa

V, L, B, K = 503, 16, 3, 3
STREAMED = replace(OPTIONS["streamed"], projection="tied")
VARIANTS: dict[str, tuple[str, NoiseConfig, dict[str, Any]]] = {
    **{name: ("gpt2", noise, {}) for name, noise in OPTIONS.items() if noise.kind not in ("gaussian", "uniform")},
    "llama, none": ("llama", NoiseConfig(), {}),
    "llama, recipe": ("llama", STREAMED, {}),
    "own output layers, two blocks": ("gpt2", OPTIONS["everything"], {"lm_head": "own", "blocks": 2}),
    "own output layers, no noise": ("llama", NoiseConfig(), {"lm_head": "own", "blocks": 3}),
    "backbone in bfloat16": ("llama", OPTIONS["everything"], {"dtype": "bfloat16"}),
    "backbone in float16": ("gpt2", STREAMED, {"dtype": "float16"}),
}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """gpt2/ and llama/, the latter with fewer key heads than heads and an output layer of its own."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("backbones")
    GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=L, n_embd=64, n_layer=2, n_head=2)).save_pretrained(folder / "gpt2")
    shape = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=V, max_position_embeddings=L, head_dim=32, **shape)).save_pretrained(folder / "llama")
    return folder


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, backbones: Path) -> StudentConfig:
    family, noise, medusa = VARIANTS[request.param]
    return StudentConfig("medusa", medusa=MedusaConfig(str(backbones / family), heads_count=K, **medusa), noise=noise)


def real(config: StudentConfig) -> Any:
    """The student on its backbone."""
    return build(config, V, L)


def bare(config: StudentConfig) -> tuple[Medusa, Skeleton]:
    """The same on the meta device, and its backbone."""
    found = skeleton(config.medusa)
    with torch.device("meta"):
        return Medusa(config, V, L, Frozen.bare(config.medusa, found.model, V, L)), found


def rows(count: int) -> Any:
    """A batch of full rows and prior noise."""
    valid_BL = torch.ones(count, L, dtype=torch.bool)
    valid_BL[:, 0] = False
    return SimpleNamespace(
        input_ids_BL=torch.zeros(count, L, dtype=torch.int64), valid_BL=valid_BL, tokens=lambda: count * (L - 1), sequence_id_B=torch.arange(count),
        codec=SimpleNamespace(vocab_size=V), lazy_noise_at=lambda where_N: Noise.prior(torch.ones(len(where_N), 5, dtype=torch.int64), V),
    )  # fmt: skip


def loss_of(made: Any, count: int = B) -> torch.Tensor:
    loss: torch.Tensor = made(rows(count), Chance(1, 1, count))[0]
    return loss


def test_flops_of_a_step_are_torchs_count_of_its_forward_and_backward(variant: StudentConfig) -> None:
    made, (shape, backbone) = real(variant), bare(variant)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # others are not counted on a CPU
        loss_of(made).backward()
    assert counter.get_total_flops() == B * (heads_cost.of_backbone(backbone, L) + heads_cost.training(shape, L))


@pytest.mark.parametrize("bfloat16", [True, False], ids=["bfloat16", "float32"])
def test_memory_of_the_heads_is_what_autograd_keeps_and_nothing_of_the_backbone(variant: StudentConfig, bfloat16: bool) -> None:
    """Within a twentieth: indices and means are left out."""
    made, (shape, backbone), found = real(variant), bare(variant), {}
    weights = {parameter.untyped_storage().data_ptr() for module in (made, made.base.model) for parameter in module.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        loss_of(made)
    measured = sum(tensor.untyped_storage().nbytes() for at, tensor in found.items() if at not in weights)
    told = B * sum(heads_cost.kept(shape, L, bfloat16).values()) + heads_cost.copies(shape, backbone, parameters(made), bfloat16)
    assert measured == pytest.approx(told, rel=0.05)


class Peak(TorchDispatchMode):
    """Bytes of the tensors that are there at once, at most; of those made under it."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        made = function(*arguments, **(keywords or {}))
        tree_map_only(torch.Tensor, self._see, made)
        return made

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() and storage.data_ptr() not in self.sizes:
            self.sizes[storage.data_ptr()] = storage.nbytes()
            self.most = max(self.most, sum(self.sizes.values()))
            weakref.finalize(storage, self.sizes.pop, storage.data_ptr(), None)


@pytest.mark.parametrize("name", ["none", "readout", "drafts", "everything", "llama, recipe"])
@pytest.mark.parametrize("bfloat16", [True, False], ids=["bfloat16", "float32"])
def test_no_moment_of_a_step_needs_more_than_was_told_and_some_moment_nearly_as_much(backbones: Path, name: str, bfloat16: bool) -> None:
    family, noise, _ = VARIANTS[name]
    config = StudentConfig("medusa", medusa=MedusaConfig(str(backbones / family), heads_count=K), noise=noise)
    made, (shape, backbone), count = real(config), bare(config), 24
    for parameter in made.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with Peak() as peak:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = loss_of(made, count)
        loss.backward()
    told = heads_cost.passing(shape, count, L, bfloat16)
    told.pop("a chunk of noise", None)  # as large as a GPU's
    told |= {name: count * size for name, size in heads_cost.kept(shape, L, bfloat16).items()}
    told |= {"copies": heads_cost.copies(shape, backbone, parameters(made), bfloat16)}
    assert 0.7 * sum(told.values()) < peak.most <= sum(told.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_backbones_activations_pass_within_their_bound(backbones: Path, family: str, dtype: Any) -> None:
    config = StudentConfig("medusa", medusa=MedusaConfig(str(backbones / family), dtype=dtype))
    made, (_, backbone), count = real(config), bare(config), 64
    with Peak() as peak:
        made.base.read(torch.zeros(count, L, dtype=torch.int64))
    told = heads_cost.activations(backbone, count, L)
    assert 0.7 * told < peak.most <= told
