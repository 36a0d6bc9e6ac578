"""What a run will cost: FLOPs are torch's own count, memory is what autograd keeps, and the command needs nothing but a recipe."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from noise.decode import Noise
from trainer import flops, memory
from trainer.__main__ import main, parse
from trainer.config import NoiseConfig, ObjectiveConfig, StudentConfig
from trainer.estimate import Where, estimate, positions
from trainer.students import build, parameters

V, L, B = 1003, 24, 3
GUMBEL = NoiseConfig("gumbel", "replace")
DRAFTS = NoiseConfig("gumbel", "replace", "tied", readout=True, drafts=[1])
STUDENTS = {
    "ar": StudentConfig("ar"),
    "mdlm, llama": StudentConfig(dropout=0.1),
    "mdlm, dit": StudentConfig(backbone="dit", dropout=0.1),
    "input": StudentConfig(backbone="dit", noise=GUMBEL),
    "low rank": StudentConfig(noise=NoiseConfig("gumbel", "replace", "low_rank", 8)),
    "readout": StudentConfig(backbone="dit", noise=NoiseConfig("gumbel", readout=True)),
    "draft without noise": StudentConfig(backbone="dit", noise=NoiseConfig(drafts=[1])),
    "input, readout, draft": StudentConfig(noise=DRAFTS),
    "streamed": StudentConfig(noise=NoiseConfig("gumbel", "replace", "tied", readout=True, drafts=[1], stream=True)),
    "bd3lm": StudentConfig("bd3lm", backbone="dit", block_size=4, dropout=0.1, noise=GUMBEL),
    "mtp": StudentConfig("mtp", predict=8, noise=DRAFTS),
    "both objectives": StudentConfig(objective=ObjectiveConfig(1.0, 1.0)),
}


def small(config: StudentConfig) -> StudentConfig:
    config.layers, config.hidden, config.heads = 2, 64, 2
    return config


@pytest.fixture(params=STUDENTS)
def student(request: pytest.FixtureRequest) -> StudentConfig:
    return small(STUDENTS[request.param])


def loss_of(config: StudentConfig, made: Any) -> torch.Tensor:
    """Of B rows whose predicted positions, as many as there can be, are all masked."""
    slots, _, most = positions(config, L)
    ids_BM, token_N = torch.zeros(B, slots, dtype=torch.int64), torch.zeros(B * most, dtype=torch.int64)
    if config.kind == "ar":
        return torch.nn.functional.cross_entropy(made.logits(ids_BM).flatten(0, 1), token_N)
    where_N = torch.cat([row * slots + torch.arange(slots - most, slots) for row in range(B)])
    g_NV = Noise.prior(torch.ones(len(where_N), 5, dtype=torch.int64), V) if config.noise.kind != "none" else None
    mask = torch.ones(slots, slots, dtype=torch.bool) if config.kind == "bd3lm" else None
    logits_NV, drafts = made.through(ids_BM, where_N, g_NV, made.model.rotary(slots), mask)
    loss = sum(torch.nn.functional.cross_entropy(each_NV, token_N) for each_NV in (logits_NV, *drafts))
    return loss + (logits_NV.log_softmax(-1)[:, 0].mean() if config.objective.token_kd else 0)


def test_flops_of_a_step_are_torchs_count_of_its_forward_and_backward(student: StudentConfig) -> None:
    made = build(student, V, L)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # others are not counted on a CPU
        loss_of(student, made).backward()
    slots, _, most = positions(student, L)
    assert counter.get_total_flops() == B * flops.training(student, V, slots, most)


@pytest.mark.parametrize("bfloat16", [True, False], ids=["bfloat16", "float32"])
def test_memory_of_activations_is_what_autograd_keeps(student: StudentConfig, bfloat16: bool) -> None:
    """Within a twentieth: norms' statistics and indices are left out, and a dropout mask has 1 byte on a GPU and an activation's here."""
    made, found = build(student, V, L), {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in made.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        loss_of(student, made)
    measured = sum(tensor.untyped_storage().nbytes() for at, tensor in found.items() if at not in weights)
    slots, _, most = positions(student, L)
    told = B * sum(memory.kept(student, V, slots, most, bfloat16).values())
    if bfloat16:
        told += memory.copies(student, V, parameters(made))
    masks = (1 if bfloat16 else 3) * 2 * student.hidden * student.layers * slots * B if student.dropout else 0
    assert measured - masks == pytest.approx(told, rel=0.05)


def test_a_recipe_alone_tells_what_its_run_will_cost(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ["--config", "recipes/paper/lm1b_mdlm_gumbel.yaml", "--vocab_size", "50257", "--block_length", "128"]
    assert main(["estimate", *recipe, "--gpu", "a100", "--gpus", "4", "--mfu", "0.5"]) == 0
    said = capsys.readouterr().out
    config = parse(recipe[:2])
    found = estimate(config, 50257, 128, Where("a100", 4, 0.5))
    assert found.of_noise == 50257 * 768 and found.tokens == 1_000_000 * 512 * 127
    assert found.gpu_hours == pytest.approx(found.step_flops * 1_000_000 / (312e12 * 0.5) / 3600)
    for text in ("162.2 M, of which noise and drafts 38.6 M", f"GPU-hours    {found.gpu_hours:,.0f} on a100", "assumed, not measured: 50%", "fits"):
        assert text in said


def test_what_does_not_fit_is_said_before_it_starts(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--vocab_size", "50257", "--block_length", "1024", "--gpus", "1"]
    assert main(["estimate", "--config", "recipes/paper/owt_mdlm.yaml", *shape, "--optim.micro_batch", "512"]) == 0
    assert "h100 has 80 GB: does not fit: lower optim.micro_batch" in capsys.readouterr().out


def test_memory_grows_with_the_micro_batch_and_time_shrinks_with_the_gpus() -> None:
    def told(gpus: int, micro: int) -> Any:
        return estimate(parse(["--config", "recipes/paper/owt_mdlm.yaml", "--optim.micro_batch", str(micro)]), 50257, 1024, Where("h200", gpus))

    one, two = told(8, 16), told(8, 32)
    fixed = ("weights", "gradients", "AdamW", "average", "DDP's buckets", "bfloat16 copies")
    assert all(two.memory[name] == one.memory[name] * (1 if name in fixed else 2) for name in two.memory)
    assert told(16, 32).seconds == one.seconds / 2 and told(16, 32).gpu_hours == pytest.approx(one.gpu_hours)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ([], "give --vocab_size and --block_length"),
        (["--vocab_size", "50257", "--block_length", "128", "--gpu", "abacus"], "--gpu is 'abacus'; it is one of a100, h100, h200"),
        (["--vocab_size", "50257", "--block_length", "128", "--mfu", "1.5"], "--mfu 1.5"),
        (["--vocab_size", "50257", "--block_length", "128", "--gpus", "3"], "not a multiple of the 3 processes"),
    ],
)  # fmt: skip
def test_what_cannot_be_told_is_refused_with_the_way_out(options: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "--config", "recipes/paper/lm1b_mdlm.yaml", *options]) == 1
    assert why in capsys.readouterr().err
