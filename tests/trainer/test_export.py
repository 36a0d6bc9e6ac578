"""What others get: a folder that needs neither this project nor what it was trained on."""

import ast
import json
import re

import pytest
import torch
import yaml

from noise.identity import identity_hash
from tests.trainer.chain import write_chain
from tests.trainer.test_medusa import write_backbone
from trainer.__main__ import main
from trainer.conditioning import KnownNoise
from trainer.config import MedusaConfig, NoiseConfig, StudentConfig
from trainer.export import export
from trainer.marginal import seen
from trainer.students import build, load_student, load_tensors, save_student

V, L = 13, 8
READ = {"readout": True, "drafts": [1, 2]}
ALL = {"kind": "gumbel", **READ}
STUDENTS = {
    "plain": {},
    "noise": {"noise": NoiseConfig(kind="gumbel", input="replace", projection="own")},
    "gaussian": {"noise": NoiseConfig(kind="gaussian", input="add", projection="low_rank", rank=4)},
    "everything": {"noise": NoiseConfig(input="add", projection="tied", prior="unigram", **ALL)},
    "restart and shift": {"shift": True, "noise": NoiseConfig(input="replace", projection="tied", draft_restart=True, **ALL)},
    "drafts without a readout": {"noise": NoiseConfig(kind="gumbel", input="replace", drafts=[2])},
    "drafts without noise": {"noise": NoiseConfig(drafts=[1])},
    "dit": {"backbone": "dit", "tied": False, "noise": NoiseConfig(input="replace", **ALL)},
    "tied dit": {"backbone": "dit"},
    "blocks": {"kind": "bd3lm", "block_size": 4, "noise": NoiseConfig(input="replace", draft_restart=True, **ALL)},
    "mtp": {"kind": "mtp", "predict": 3, "shift": True, "noise": NoiseConfig(input="replace", **ALL)},
    "ar": {"kind": "ar"},
}


def lines_of(folder) -> str:
    code = re.search(r"```python\n(.*?)\n```", (folder / "README.md").read_text(), re.DOTALL)[1]
    imported = {name.name.partition(".")[0] for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import) for name in node.names}
    assert imported <= {"torch", "safetensors"} and not any(isinstance(node, ast.ImportFrom) for node in ast.walk(ast.parse(code)))
    return code


def exported(tmp_path, monkeypatch, config):
    """A student with strong opinions, and what its card's lines define."""
    torch.manual_seed(1)
    student = build(config, V, L).eval()
    for name, tensor in student.own_state().items():
        if name != "backbone_sha256":
            tensor.normal_(0, 0.3)
    save_student(tmp_path / "student", student, student.own_state(), {}, {})
    export(tmp_path / "student", tmp_path / "exported")
    code = lines_of(tmp_path / "exported")
    assert len(code.splitlines()) <= 20 and max(map(len, code.splitlines())) <= 240
    monkeypatch.chdir(tmp_path / "exported")
    scope = {}
    exec(code, scope)
    return student, scope


@pytest.mark.parametrize("name", STUDENTS)
def test_the_cards_twenty_lines_compute_what_the_student_computes(tmp_path, monkeypatch, name):
    student, scope = exported(tmp_path, monkeypatch, StudentConfig(**{"layers": 2, "hidden": 16, "heads": 2, **STUDENTS[name]}))
    ids = torch.tensor([[0, 3, 5, 7, V, 2, V, V], [0, 12, 1, 1, 9, V, 4, V]])
    if name == "mtp":
        ids = torch.tensor([[0, 3, 5, 7, 1, V, V, V], [0, 12, 1, 1, 9, 4, V, V]])
    if name == "ar":
        torch.testing.assert_close(scope["logits"](ids.clamp_max(V - 1)), student.logits(ids.clamp_max(V - 1)), rtol=1e-4, atol=1e-4)
        return
    noisy = student.noise.kind != "none"
    gumbel = -torch.empty(int((ids == V).sum()), V).exponential_().log()
    seen = torch.special.ndtri(torch.exp(-torch.exp(-gumbel.double()))).float() if name == "gaussian" else gumbel
    ours, theirs = student.logits(ids, gumbel if noisy else None), scope["logits"](ids, *([seen] if noisy else []))
    torch.testing.assert_close(theirs, ours, rtol=2e-4, atol=2e-4)


KNOWN = {"known": True, "readout": True, "drafts": [1, 2]}
LEADING = {
    "blocks, shifted": {"kind": "bd3lm", "block_size": 4, "shift": True, "noise": NoiseConfig("gumbel", "replace", draft_restart=True, **READ)},
    "known": {"noise": NoiseConfig("gumbel", "add", "low_rank", 4, "unigram", **KNOWN)},
    "known, restart and shift": {"shift": True, "noise": NoiseConfig("gumbel", "replace", draft_restart=True, **KNOWN)},
    "known, blocks": {"kind": "bd3lm", "block_size": 4, "noise": NoiseConfig("gumbel", "add", "tied", **KNOWN)},
    "known, blocks, shifted": {
        "kind": "bd3lm",
        "block_size": 4,
        "shift": True,
        "noise": NoiseConfig("gumbel", "replace", draft_restart=True, **KNOWN),
    },
    "known, dit": {"backbone": "dit", "tied": False, "noise": NoiseConfig("gumbel", "replace", known=True)},
    "known, mtp": {"kind": "mtp", "predict": 3, "noise": NoiseConfig("gumbel", "replace", draft_restart=True, **KNOWN)},
}


@pytest.mark.parametrize("name", LEADING)
@pytest.mark.parametrize("first", [0, 1])
def test_so_it_is_with_the_block_that_is_masked_and_with_noise_at_known_tokens(tmp_path, monkeypatch, name, first):
    student, scope = exported(tmp_path, monkeypatch, StudentConfig(**{"layers": 2, "hidden": 16, "heads": 2, **LEADING[name]}))
    ids = torch.tensor([[0, 3, 5, 7, V, 2, V, V], [0, 12, 1, 1, 9, V, V, V]])
    if first == 0:
        ids = torch.tensor([[0, 3, V, V], [0, V, 5, V]]) if name != "known, mtp" else torch.tensor([[0, V, V, V]])
    g = -torch.empty(int((ids == V).sum()), V).exponential_().log()
    if not student.noise.known:
        torch.testing.assert_close(scope["logits"](ids, g), student.logits(ids, g), rtol=2e-4, atol=2e-4)
        return
    known = ((ids != V) & (torch.arange(ids.shape[1]) > 0)).flatten().nonzero()[1:, 0]  # one token has none
    h = -torch.empty(len(known), V).exponential_().log()
    ours = student.logits(ids, g, known=KnownNoise(known, h))
    torch.testing.assert_close(scope["logits"](ids, g, known, h), ours, rtol=2e-4, atol=2e-4)
    if len(known):
        assert not torch.allclose(ours, student.logits(ids, g), rtol=1e-2)


HEADS = {
    "without noise": ({}, NoiseConfig()),
    "own output layers": ({"lm_head": "own", "blocks": 2}, NoiseConfig("gumbel", "replace", "tied", prior="unigram")),
    "input added": ({}, NoiseConfig("gumbel", "add", readout=True, drafts=[1])),
    "drafts": ({"blocks": 2}, NoiseConfig("gumbel", drafts=[1, 2])),
    "drafts without noise": ({}, NoiseConfig(drafts=[2])),
    "everything": ({"lm_head": "own"}, NoiseConfig("uniform", "add", "low_rank", 4, readout=True, drafts=[1, 2, 3])),
}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", HEADS)
def test_so_it_is_with_heads_on_a_backbone(tmp_path, monkeypatch, name, family):
    from transformers import AutoModelForCausalLM

    write_backbone(tmp_path / "backbone", family)
    medusa, noise = HEADS[name]
    config = StudentConfig("medusa", medusa=MedusaConfig(backbone=str(tmp_path / "backbone"), heads_count=3, **medusa), noise=noise)
    student, scope = exported(tmp_path, monkeypatch, config)
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "backbone")
    ids, g = torch.randint(0, V, (3, 5)), -torch.empty(3, 4, V).exponential_().log()
    with torch.no_grad():
        hidden = lm.base_model(ids).last_hidden_state[:, -1]
    given = [] if noise.kind == "none" else [seen(g, noise.kind)]
    theirs = scope["logits"](hidden, lm.get_output_embeddings(), lm.get_input_embeddings().weight, *given)
    torch.testing.assert_close(theirs, student.propose(ids, g if given else None)[0], rtol=2e-4, atol=2e-4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    data = write_chain(folder / "data", rows=60)
    (data / "tokenizer").mkdir()
    (data / "tokenizer" / "tokenizer.json").write_text("{}")
    settings = {
        "output": folder / "run", "data.path": data, "data.heldout": data, "student.layers": 1, "student.hidden": 16, "student.heads": 2,
        "optim.global_batch": 8, "optim.steps": 6, "optim.lr": 0.3, "optim.warmup": 0, "eval_every": 1, "log_every": 1, "keep_best": "true",
        "keep_checkpoints": 1, "checkpoint_every": 2, "device": "cpu", "threads": 1, "tensorboard": "false",
    }  # fmt: skip
    assert main([part for name, value in settings.items() for part in (f"--{name}", str(value))]) == 0
    return folder


def test_the_folder_says_where_the_student_comes_from_and_is_a_student_again(trained, tmp_path, capsys):
    assert main(["export", str(trained / "run"), "--output", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "README.md").read_text()
    manifest = json.loads((trained / "data" / "manifest.json").read_text())
    assert manifest["root_hash"] in text and identity_hash(manifest["identity"]) in text and '"text_seed": 1' in text and "lr: 0.3" in text
    logged = [json.loads(line) for line in (trained / "run" / "metrics.jsonl").read_text().splitlines()]
    assert f"| heldout/nelbo | {logged[-1]['heldout/nelbo']:.6g} |" in text
    assert yaml.safe_load(text.split("---")[1])["tags"] == ["gumbel-distillation", "mdlm", "noise:none"]
    assert str(trained) not in text and str(trained) not in (tmp_path / "out" / "student.json").read_text()
    assert (tmp_path / "out" / "tokenizer" / "tokenizer.json").exists()
    again = load_student(tmp_path / "out")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in load_student(trained / "run").state_dict().items())
    capsys.readouterr()
    assert main(["export", str(trained / "run"), "--output", str(tmp_path / "out")]) == 1
    assert "exists and is not empty" in capsys.readouterr().err


def test_the_card_is_one_that_the_hub_reads(trained, tmp_path):
    from huggingface_hub import ModelCard

    export(trained / "run", tmp_path / "out")
    assert ModelCard.load(tmp_path / "out" / "README.md").data.library_name == "safetensors"


def test_the_best_checkpoint_is_exported_on_demand(trained, tmp_path, capsys):
    heldout = {}
    for line in (trained / "run" / "metrics.jsonl").read_text().splitlines():
        figures = json.loads(line)
        heldout |= {figures["step"]: figures["heldout/nelbo"]} if "heldout/nelbo" in figures else {}
    best = min(heldout, key=heldout.get)
    export(trained / "run", tmp_path / "best", "best")
    expected = load_tensors(trained / "run" / "checkpoints" / f"{best:06d}" / "average.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_tensors(tmp_path / "best" / "model.safetensors").items())
    assert f"trained for {best} steps" in (tmp_path / "best" / "README.md").read_text()
    assert main(["export", str(trained / "run"), "--output", str(tmp_path / "x"), "--checkpoint", "77"]) == 1
    assert "has no checkpoint 77" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_what_is_no_student_is_not_exported(tmp_path, capsys):
    assert main(["export", str(tmp_path), "--output", str(tmp_path / "x")]) == 1
    assert "is not a student" in capsys.readouterr().err


def test_help_of_the_command_teaches_it(capsys):
    with pytest.raises(SystemExit) as end:
        main(["export", "--help"])
    assert end.value.code == 0 and "--checkpoint" in capsys.readouterr().out
