"""One student at a time: samples, perplexity and reconstruction by command, what is said of the judge, and that it is loaded once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from eval import causal, judge
from eval.__main__ import main
from eval.cautions import cautions_of_one
from noise.storage import weights_hash
from tests.eval.reports import recipe, run
from tests.eval.world import write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def test_single_students_are_sampled_judged_and_reconstructed(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--student", str(world / "gumbel"), "--output", str(tmp_path), "--nfe", "3", "--sequences", "20"]
    assert main(["sample", *common]) == 0
    assert "[0] w" in capsys.readouterr().out
    assert main(["perplexity", *common, "--judge", str(world / "judge")]) == 0
    assert "perplexity" in capsys.readouterr().out and len(list((tmp_path / "samples").iterdir())) == 1
    assert main(["reconstruct", "--student", str(world / "gumbel"), "--heldout", str(world / "heldout"), "--nfe", "[1,7]", "--rows", "9"]) == 0
    assert "NFE 7" in capsys.readouterr().out
    assert main(["perplexity", *common]) == 1 and "judge is empty" in capsys.readouterr().err
    for nfe in ("[]", "[0, 1]"):
        assert main(["reconstruct", "--student", str(world / "gumbel"), "--heldout", str(world / "heldout"), "--nfe", nfe]) == 1
        assert f"nfe is {nfe}; give at least one number" in capsys.readouterr().err


def test_perplexity_by_the_teacher_that_the_students_dataset_names_is_said(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(world / "gumbel", tmp_path / "student")
    about = json.loads((tmp_path / "student" / "student.json").read_text())
    about["provenance"]["identity"] = {"teacher": {"weights_sha256": weights_hash(world / "teacher")}}
    (tmp_path / "student" / "student.json").write_text(json.dumps(about))
    common = ["perplexity", "--output", str(tmp_path), "--nfe", "1", "--sequences", "4", "--device", "cpu", "--student"]
    for student, scorer, said in (
        (tmp_path / "student", "teacher", True),
        (tmp_path / "student", "judge", False),
        (world / "gumbel", "teacher", False),
    ):
        assert main([*common, str(student), "--judge", str(world / scorer)]) == 0
        assert ("The judge is the teacher that made the noise" in capsys.readouterr().out) == said


def test_a_teacher_in_several_files_is_known_again_and_a_model_of_the_hub_is_not(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.safetensors").write_text(name)
    (tmp_path / "student.json").write_text(json.dumps({"provenance": {"identity": {"teacher": {"weights_sha256": weights_hash(tmp_path)}}}}))
    assert len(cautions_of_one(tmp_path, causal.folder_identity(tmp_path))) == 1
    assert not cautions_of_one(tmp_path, {"hub": "gpt2"}) and not cautions_of_one(tmp_path / "none", causal.folder_identity(tmp_path))


def test_a_judge_is_loaded_once_for_all_sets(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    original = judge.CausalLM.__init__

    def counting(self: causal.CausalLM, name: str, *rest: str) -> None:
        loaded.append(name)
        original(self, name, *rest)

    monkeypatch.setattr(causal.CausalLM, "__init__", counting)
    assert run(recipe(world, tmp_path / "out", nfe=[1], shown=0)) == 0
    assert sorted(loaded) == sorted([str(world / "judge"), str(world / "teacher")])
