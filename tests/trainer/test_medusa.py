"""Heads on a frozen causal LM: where they start, what they see, what they learn, what they refuse."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from noise.storage import DatasetError
from tests.trainer.chain import transition, write_chain
from trainer import checkpoint
from trainer.__main__ import main
from trainer.chance import Chance
from trainer.config import MedusaConfig, NoiseConfig, ObjectiveConfig, StudentConfig
from trainer.data import NoiseDataset
from trainer.students import build, load_student, load_tensors, save_student

V, L, K = 13, 8, 3
EVERYTHING = NoiseConfig(kind="gumbel", input="add", prior="unigram", readout=True, drafts=[1, 2])
OPTIONS = {
    "none": NoiseConfig(),
    "blind drafts": NoiseConfig(drafts=[1, 2]),
    "replace": NoiseConfig(kind="gumbel", input="replace"),
    "tied": NoiseConfig(kind="gumbel", input="add", projection="tied"),
    "low_rank": NoiseConfig(kind="gumbel", input="replace", projection="low_rank", rank=4),
    "readout": NoiseConfig(kind="gumbel", readout=True),
    "drafts": NoiseConfig(kind="gumbel", drafts=[1, 3]),
    "gaussian": NoiseConfig(kind="gaussian", input="replace", readout=True),
    "uniform": NoiseConfig(kind="uniform", input="replace", drafts=[1]),
    "independent": NoiseConfig(kind="independent", input="replace", readout=True, drafts=[1]),
    "everything": EVERYTHING,
    "streamed": replace(EVERYTHING, stream=True),
}


def write_backbone(folder: Path, family: str = "llama", seed: int = 0, vocab_size: int = V) -> Path:
    """A tiny causal LM with random weights that are large enough to have opinions."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    if family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_positions=16, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3))
    else:
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, max_position_embeddings=16, initializer_range=0.3, **shape))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """gpt2/, llama/ and a ragged dataset of the exact chain."""
    folder = tmp_path_factory.mktemp("medusa")
    for family in ("gpt2", "llama"):
        write_backbone(folder / family, family)
    write_chain(folder / "dataset", ragged=True)
    return folder


@pytest.fixture(scope="module")
def batch(world):
    return NoiseDataset(world / "dataset").batch(np.arange(32))


def student(world: Path, noise: NoiseConfig | None = None, family: str = "llama", objective: ObjectiveConfig | None = None, **medusa):
    settings = MedusaConfig(backbone=str(world / family), **{"heads_count": K, **medusa})
    torch.manual_seed(0)
    return build(StudentConfig("medusa", medusa=settings, noise=noise or NoiseConfig(), objective=objective or ObjectiveConfig()), V, L)


def shaken(module):
    """Weights as after some training: no head is the backbone's own any more."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def noise_for(module, rows: int = 2) -> torch.Tensor | None:
    g = -torch.empty(rows, K + 1, V).exponential_(generator=torch.Generator().manual_seed(5)).log()
    return None if module.noise.kind == "none" else g


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("lm_head", ["shared", "own"])
def test_an_untrained_head_is_the_backbones_own_output_layer(world, family, lm_head):
    from transformers import AutoModelForCausalLM

    ids = torch.randint(0, V, (2, 5))
    theirs = AutoModelForCausalLM.from_pretrained(world / family)(ids).logits[:, -1]
    for name, extra in (("none", 0.0), ("replace", 0.0), ("drafts", 0.0), ("readout", 1.0)):
        module = student(world, OPTIONS[name], family, lm_head=lm_head, blocks=2)
        g = noise_for(module)
        logits, _ = module.propose(ids, g)
        assert logits.shape == (2, K + 1, V)
        assert torch.allclose(logits[:, 0], theirs, atol=1e-5)
        for head in range(1, K + 1):  # the readout's scale is softplus(0) = log 2 at first
            expected = theirs if not extra else theirs + np.log(2) * g[:, head]
            assert torch.allclose(logits[:, head], expected, atol=1e-5)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_head_sees_the_noise_of_its_own_and_the_preceding_places_alone(world, name):
    module = shaken(student(world, OPTIONS[name]))
    ids, g = torch.randint(0, V, (2, 5)), noise_for(module)
    quiet = module.propose(ids, g)[0]
    if g is None:
        return
    reads = {"readout": lambda head, place: place == head, "drafts": lambda head, place: place in (0, 2) and place < head}
    sees = reads.get(name, lambda head, place: head > 0 and place <= head)
    for place in range(K + 1):
        loud = g.clone()
        loud[0, place, 4] += 3.0
        changed = ~torch.isclose(quiet, module.propose(ids, loud)[0], atol=1e-6).all(-1)
        assert not changed[1].any()  # the other row
        assert changed[0].tolist() == [head > 0 and sees(head, place) for head in range(K + 1)]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_loss_is_the_equation_position_by_position(world, batch, family, name):
    """Every place t of every row alone, through `propose`, against the batch in one piece."""
    module, chance = shaken(student(world, OPTIONS[name], family, head_decay=0.7)), Chance(3, 5, 32)
    loss, figures = module(batch, chance)
    count, heads, hits = np.zeros(K + 1), np.zeros(K + 1), np.zeros(K + 1)
    for row in range(32):
        length = int(batch.length_B[row])
        for t in range(length - 1):
            g = None
            if module.noise.kind != "none":
                g = torch.zeros(1, K + 1, V)
                there = torch.arange(t + 1, min(t + K + 2, length))
                place = row * L + there
                if module.noise.kind == "independent":
                    from noise.decode import Noise

                    g[0, : len(there)] = Noise.prior(chance.fresh_rows(batch.sequence_id_B[row].expand(len(there)), there), V).dense()
                else:
                    g[0, : len(there)] = batch.noise_at(place)
            logits = module.propose(batch.input_ids_BL[row : row + 1, : t + 1], g)[0][0].detach()
            for head in range(1, min(K + 1, length - 1 - t)):
                token = int(batch.input_ids_BL[row, t + 1 + head])
                count[head] += 1
                heads[head] -= float(logits[head].log_softmax(-1)[token])
                hits[head] += float(int(logits[head].argmax()) == token)
    assert float(figures["heads"]) == pytest.approx(sum(0.7**head * heads[head] for head in range(1, K + 1)), rel=1e-4)
    drafts = sum(
        float(figures[f"draft_{place}"]) * max(1, count[place - 1] if place > 1 else batch.tokens()) / batch.tokens() for place in module.noise.drafts
    )
    assert float(loss.detach()) == pytest.approx(float(figures["heads"]) + 0.1 * drafts, rel=1e-4)
    for head in range(1, K + 1):
        assert float(figures[f"head_{head}"]) / batch.tokens() == pytest.approx(heads[head] / count[head], rel=1e-4)
        assert float(figures[f"head_{head}_top1"]) / batch.tokens() == pytest.approx(hits[head] / count[head], rel=1e-6)
    assert sorted(figures) == sorted(module.figure_names)


def test_a_draft_of_the_backbone_is_its_own_logits_with_the_noise(world, batch):
    module, chance = shaken(student(world, OPTIONS["drafts"])), Chance(3, 5, 32)
    where = batch.valid_BL.flatten().nonzero()[:, 0]
    hidden = module.base.read(batch.input_ids_BL)[0].flatten(0, 1)[where - 1]
    draft = module.drafts["1"]
    scale = torch.nn.functional.softplus(draft.readout.scale(hidden))
    logits = draft.log_sharpness.exp() * (module.base.logits(hidden) + scale * batch.noise_at(where))
    expected = torch.nn.functional.cross_entropy(logits, batch.input_ids_BL.flatten()[where], reduction="sum")
    assert float(module(batch, chance)[1]["draft_1"]) == pytest.approx(float(expected.detach()), rel=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_proposal_with_a_cache_is_the_one_without_and_rejected_tokens_are_taken_back(world, family):
    module = shaken(student(world, EVERYTHING, family))
    ids, g = torch.randint(0, V, (2, 7)), noise_for(module)
    _, cache = module.propose(ids[:, :3], g)
    rejected = (ids[:, 3:] + 1) % V
    module.propose(rejected, g, cache)
    cache.crop(-4)
    for start, stop in ((3, 4), (4, 7)):
        logits, cache = module.propose(ids[:, start:stop], g, cache)
        assert torch.allclose(logits, module.propose(ids[:, :stop], g)[0], atol=1e-5)


def test_noise_that_is_missing_or_too_short_is_refused(world):
    ids, g = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, K + 1, V)
    for noise, given in ((EVERYTHING, None), (EVERYTHING, g[:, 1:]), (NoiseConfig(), g)):
        with pytest.raises(ValueError, match="give that of the 4 that follow, and none to kind none"):
            student(world, noise).propose(ids, given)


@pytest.mark.parametrize("name", OPTIONS)
def test_only_the_heads_are_trained_and_every_weight_of_theirs_in_every_step(world, batch, name):
    """Under DDP, which stops at a weight that a step does not reach, and at a backbone among the weights."""
    objective = ObjectiveConfig(token_kd=0.5) if name in ("none", "independent") else ObjectiveConfig()
    module = student(world, OPTIONS[name], lm_head="own", blocks=2, objective=objective)
    before = [parameter.clone() for parameter in module.base.model.parameters()]
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = torch.nn.parallel.DistributedDataParallel(module)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
        for step in range(3):  # weights that start at 0 hold back the gradient of those behind them for a step
            optimizer.zero_grad()
            model(batch.split(8)[step], Chance(1, step, 32))[0].backward()
            optimizer.step()
    finally:
        torch.distributed.destroy_process_group()
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters())
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, module.base.model.parameters(), strict=True))
    assert not any(name.startswith("base") for name in module.own_state())
    assert sorted(module(batch, Chance(1, 1, 32))[1]) == sorted(module.figure_names)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_saved_student_finds_its_backbone_again_and_refuses_another(world, tmp_path, family):
    from pipeline.teacher import weights_hash

    backbone = shutil.copytree(world / family, tmp_path / family)
    module = shaken(student(tmp_path, EVERYTHING, family)).eval()
    save_student(tmp_path / "student", module, module.own_state(), {}, {})
    about = json.loads((tmp_path / "student" / "student.json").read_text())["student"]["medusa"]
    assert (about["backbone"], about["revision"], about["weights_sha256"]) == (str(backbone), "", weights_hash(backbone))
    loaded, ids, g = load_student(tmp_path / "student"), torch.randint(0, V, (2, 5)), noise_for(module)
    assert torch.equal(loaded.propose(ids, g)[0], module.propose(ids, g)[0])
    assert (tmp_path / "student" / "model.safetensors").stat().st_size < 4 * sum(p.numel() for p in module.parameters()) + 10_000
    write_backbone(backbone, family, seed=1)
    with pytest.raises(
        DatasetError, match=rf"{backbone} is another model .* weights_sha256 is {weights_hash(backbone)} here, {about['weights_sha256']}"
    ):
        load_student(tmp_path / "student")
    shutil.rmtree(backbone)
    with pytest.raises(DatasetError, match=rf"student.medusa.backbone '{backbone}' is no folder here"):
        load_student(tmp_path / "student")


def command(output: Path, world: Path, **changes) -> list[str]:
    settings = {
        "output": output, "data.path": world / "dataset", "student.kind": "medusa", "student.medusa.backbone": world / "llama",
        "student.noise.kind": "gumbel", "student.noise.input": "add", "student.noise.prior": "unigram", "student.noise.readout": "true",
        "student.noise.drafts": "[1,2]", "optim.global_batch": 8, "optim.steps": 6, "optim.warmup": 1, "optim.ema": 0.9, "log_every": 1,
        "eval_every": 0, "checkpoint_every": 2, "device": "cpu", "threads": 1, "tensorboard": "false",
    }  # fmt: skip
    settings |= {name.replace("__", "."): value for name, value in changes.items()}
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_stopped_and_with_the_same_backbone_alone(world, tmp_path, capsys, monkeypatch):
    assert main(command(tmp_path / "whole", world, data__heldout=world / "dataset")) == 0
    said = capsys.readouterr().err
    assert "frozen: not the dataset's teacher" in said and "head_1_top1_other_noise" in said
    save = checkpoint.save

    def interrupted(run: Path, state: checkpoint.State, *rest) -> None:
        save(run, state, *rest)
        if state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(checkpoint, "save", interrupted)
    shutil.copytree(world / "llama", tmp_path / "backbone")
    here = {"student__medusa__backbone": tmp_path / "backbone"}
    assert main(command(tmp_path / "stopped", world, **here)) == 130
    shutil.copytree(tmp_path / "stopped", tmp_path / "other")
    assert main(command(tmp_path / "stopped", world, **here)) == 0
    assert "resumed at step 3" in capsys.readouterr().err
    one, other = (load_tensors(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    write_backbone(tmp_path / "backbone", seed=1)
    assert main(command(tmp_path / "other", world, **here)) == 1
    assert f"{tmp_path / 'backbone'} is another model than the heads were trained on: weights_sha256 is" in capsys.readouterr().err


def write_tokenizer(folder: Path, words: list[str]) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: entry for entry, word in enumerate(words)}, unk_token=words[0]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=words[0]).save_pretrained(folder)


def test_a_backbone_that_does_not_fit_the_dataset_is_refused_by_field(world, tmp_path):
    write_backbone(tmp_path / "wide", vocab_size=V + 3)
    with pytest.raises(
        ValueError, match=r"logits of width 16, the dataset's vocab_size is 13 \(3 more: another tokenizer, or a padded output layer\)"
    ):
        student(tmp_path, family="wide")
    with pytest.raises(ValueError, match="reads 16 positions, the dataset's block_length is 17"):
        build(StudentConfig("medusa", medusa=MedusaConfig(backbone=str(world / "llama"))), V, 17)
    words = [f"w{entry}" for entry in range(V)]
    shutil.copytree(world / "llama", tmp_path / "llama")
    shutil.copytree(world / "dataset", tmp_path / "dataset")
    write_tokenizer(tmp_path / "llama", words)
    module = student(tmp_path)
    assert module.fits(NoiseDataset(tmp_path / "dataset"))  # nothing to compare
    write_tokenizer(tmp_path / "dataset" / "tokenizer", words)
    assert module.fits(NoiseDataset(tmp_path / "dataset"))
    write_tokenizer(tmp_path / "dataset" / "tokenizer", [*words[:5], "other", *words[6:]])
    with pytest.raises(DatasetError, match=r"has another tokenizer than .*dataset: tokenizer entry 5: 'w5' here, 'other' there"):
        module.fits(NoiseDataset(tmp_path / "dataset"))


def test_a_backbone_computes_in_its_own_dtype_and_the_heads_in_theirs(world, batch):
    """On a CPU, and under the autocast that a GPU run has."""
    module = shaken(student(world, EVERYTHING, dtype="bfloat16"))
    exact, g = shaken(student(world, EVERYTHING)), noise_for(module)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            hidden = module.base.read(batch.input_ids_BL)[0]
            loss = module(batch, Chance(1, 1, 32))[0]
        assert torch.equal(hidden, module.base.read(batch.input_ids_BL)[0]) and hidden.dtype == torch.float32
        assert float(loss.detach()) == pytest.approx(float(exact(batch, Chance(1, 1, 32))[0].detach()), rel=0.05)
        loss.backward()
    assert module.propose(batch.input_ids_BL[:2], g)[0].dtype == torch.float32
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_a_backbone_that_caps_its_logits_or_lacks_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import Gemma2Config, Gemma2ForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16}
    Gemma2ForCausalLM(Gemma2Config(vocab_size=V, final_logit_softcapping=0.01, initializer_range=0.5, **shape)).save_pretrained(tmp_path / "capped")
    with pytest.raises(ValueError, match="capped scales or caps its logits after the output layer"):
        student(tmp_path, family="capped")
    file = write_backbone(tmp_path / "llama") / "model.safetensors"
    weights = load_file(file)
    del weights["model.norm.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(DatasetError, match=r"lacks weights: model.norm.weight"):
        student(tmp_path)
    file.write_bytes(b"no tensors")
    with pytest.raises(DatasetError, match="cannot be loaded as a causal LM"):
        student(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 3}, "student.layers is 3, but a medusa student has the shape of its backbone"),
        ({"medusa": MedusaConfig()}, "student.medusa.backbone is empty"),
        ({"medusa": MedusaConfig("nowhere/at/all")}, "student.medusa.backbone 'nowhere/at/all' is no folder here"),
        ({"medusa": MedusaConfig("trainer", revision="main")}, "student.medusa.revision is 'main', but trainer is a local folder"),
        ({"medusa": MedusaConfig("trainer")}, "has no .safetensors weights"),
        ({"medusa": MedusaConfig("trainer", heads_count=0)}, "student.medusa.heads_count is 0; it must be at least 1"),
        ({"medusa": MedusaConfig("trainer", head_decay=1.5)}, "student.medusa.head_decay is 1.5"),
        ({"noise": NoiseConfig(kind="gumbel", drafts=[5])}, r"student.noise.drafts is \[5\]; name each layer once, of 1..4"),
        ({"noise": NoiseConfig(kind="gumbel", drafts=[1], draft_restart=True)}, "draft_restart is set, but a medusa head has no stream"),
    ],
)
def test_settings_that_cannot_work_or_would_be_ignored_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        build(StudentConfig("medusa", **settings), V, L)
    with pytest.raises(ValueError, match=r"student.medusa is .* which only student.kind medusa reads"):
        StudentConfig("mdlm", medusa=MedusaConfig(backbone="x"))


def bigram(folder: Path) -> Path:
    """A Llama that is the exact chain: without layers that act, its logits are the transition matrix's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "tie_word_embeddings": False}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, max_position_embeddings=16, **shape))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        model.model.embed_tokens.weight[:, :V] = torch.eye(V)
        model.lm_head.weight[:, :V] = transition(V).T / 4  # the last norm makes the 1 of each row a 4
    model.save_pretrained(folder)
    return folder


def test_noise_lets_the_heads_of_the_teacher_know_what_it_writes(tmp_path):
    """Trained alike on the exact chain with the chain as backbone, held out: informed against none and against noise that knows nothing."""
    bigram(tmp_path / "chain")
    data = NoiseDataset(write_chain(tmp_path / "data", rows=512, shards=1))
    heldout = NoiseDataset(write_chain(tmp_path / "heldout", rows=256, shards=1, text_seed=9, seed=78)).batch(np.arange(256))
    informed = NoiseConfig(kind="gumbel", input="replace", projection="tied", readout=True, drafts=[1, 2])
    found = {}
    for noise in (NoiseConfig(), replace(informed, kind="independent"), informed):
        module = student(tmp_path, noise, "chain", heads_count=2)
        optimizer = torch.optim.AdamW(module.parameters(), lr=3e-2)
        for step in range(80):
            rows = data.batch(np.arange(step * 64, step * 64 + 64) % 512)
            (module(rows, Chance(1, step, 64))[0] / rows.tokens()).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            figures = module.eval()(heldout, Chance(1, 0, 256))[1]
        found[noise.kind] = {name: float(value) / heldout.tokens() for name, value in figures.items()}
    for head in ("head_1", "head_2"):
        for other in ("none", "independent"):
            assert found["gumbel"][head] < 0.75 * found[other][head], found
            assert found["gumbel"][f"{head}_top1"] > 0.2 + found[other][f"{head}_top1"], found
