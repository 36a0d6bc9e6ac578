"""What others get: a folder that needs neither this project nor what it was trained on."""

import ast
import json
import re

import pytest
import torch
import yaml

from noise.identity import identity_hash
from tests.trainer.chain import write_chain
from trainer.__main__ import main
from trainer.config import NoiseConfig, StudentConfig
from trainer.export import export
from trainer.students import build, load_student, load_tensors, save_student

V, L = 13, 8
ALL = {"kind": "gumbel", "readout": True, "drafts": [1, 2]}
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


@pytest.mark.parametrize("name", STUDENTS)
def test_the_cards_twenty_lines_compute_what_the_student_computes(tmp_path, monkeypatch, name):
    torch.manual_seed(1)
    student = build(StudentConfig(**{"layers": 2, "hidden": 16, "heads": 2, **STUDENTS[name]}), V, L).eval()
    for tensor in student.state_dict().values():
        tensor.normal_(0, 0.3)
    save_student(tmp_path / "student", student, student.own_state(), {}, {})
    export(tmp_path / "student", tmp_path / "exported")
    code = lines_of(tmp_path / "exported")
    assert len(code.splitlines()) <= 20 and max(map(len, code.splitlines())) <= 200
    monkeypatch.chdir(tmp_path / "exported")
    scope = {}
    exec(code, scope)
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


def test_where_twenty_lines_are_not_enough_the_card_loads_the_tensors(tmp_path, monkeypatch):
    student = build(StudentConfig(layers=1, hidden=16, heads=2, noise=NoiseConfig("gumbel", "replace", known=True)), V, L)
    save_student(tmp_path / "student", student, student.own_state(), {}, {})
    export(tmp_path / "student", tmp_path / "exported")
    monkeypatch.chdir(tmp_path / "exported")
    scope = {}
    exec(lines_of(tmp_path / "exported"), scope)
    assert "logits" not in scope and scope["tensors"].keys() == student.own_state().keys()


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
