"""A student that reads the noise of known tokens is told, in sampling, what it was told in training: what wrote each token, or its posterior."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from eval import drafting
from eval.__main__ import main
from eval.causal import CausalLM
from eval.config import SampleConfig, System
from eval.decoding import Decoding
from eval.given import GivenTeacher, given_noise
from eval.prompts import BLANK
from eval.reconstruct import reconstruct
from eval.sample_set import SampleSet, sample_set
from eval.sampler import blank_rows, sample_counted, sampling_noise
from eval.stream import NOISE_DRAW
from eval.study import load_masked
from eval.systems import trace
from noise import philox
from noise.storage import weights_hash
from tests.eval.world import LENGTH, VOCAB, write_causal, write_student, write_world
from trainer.conditioning import KnownNoise
from trainer.config import NoiseConfig, StudentConfig
from trainer.data import NoiseDataset
from trainer.marginal import tempered
from trainer.students import build, save_student
from trainer.students.mdlm import MDLM

NOISES = {
    "known": NoiseConfig("gumbel", "replace", readout=True, known=True),
    "control": NoiseConfig("independent", "replace", known=True),
    "input": NoiseConfig("gumbel", "replace", known=True),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Students known/ and control/ (independent noise), and prompts whose tokens stand before, between and behind the blanks."""
    folder = write_world(tmp_path_factory.mktemp("world"))
    for name, noise in NOISES.items():
        write_student(folder / name, seed=6, noise=noise)
        weights = load_file(folder / name / "model.safetensors")
        save_file(weights | {"input.known_scale": 20 * weights["input.known_scale"]}, folder / name / "model.safetensors")
    write_causal(folder / "wide", 4, VOCAB + 3)
    blocks = build(StudentConfig("bd3lm", layers=1, hidden=16, heads=2, block_size=4), VOCAB, LENGTH)
    save_student(folder / "blocks", blocks, blocks.state_dict(), {}, {})
    write_student(folder / "elsewhere", seed=6, noise=NOISES["known"])
    about = json.loads((folder / "elsewhere" / "student.json").read_text())
    about["provenance"]["identity"] = {"teacher": {"weights_sha256": "ab", "temperature": 0.5}}
    (folder / "elsewhere" / "student.json").write_text(json.dumps(about))
    lines: list[Any] = [{"text": "w5 w6"}, {"text": ["w7 ", 2, " w8"]}, {"ids": [9, None, None, 10], "length": LENGTH}, {"ids": [None] * 7}]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


class Heard(MDLM):
    """Writes down what it is told of known tokens."""

    def logits(self, ids_BL, g_NV=None, length_B=None, known=None):  # type: ignore[no-untyped-def, override]
        self.heard.append((ids_BL.clone(), known))
        return super().logits(ids_BL, g_NV, length_B, known)


def heard(folder: Path) -> Any:
    student = load_masked(str(folder), "cpu")
    student.__class__ = Heard
    student.heard = []
    return student


SETTINGS: list[dict[str, Any]] = [
    {"nfe": 3},
    {"nfe": 3, "order": "confidence", "noise_temperature": 0.8},
    {"sampler": "first_hitting"},
    {"nfe": 9, "sampler": "ancestral"},
    {"sampler": "adaptive"},
]
PARTS: list[dict[str, Any]] = [{"sampler": "adaptive", **part} for part in ({"lookahead": 3}, {"recompute": 2}, {"lookahead": 4, "recompute": 3})]


def started(student: Any) -> torch.Tensor:
    """Rows with given tokens between, behind, and none."""
    ids_BL = blank_rows(student, 5, LENGTH, 0)
    ids_BL[1, 2], ids_BL[3, 5:] = 4, torch.tensor([7, 8, 9])
    return ids_BL


def small_model(decoding: Decoding) -> Any:
    return CausalTable() if decoding.sampler == "adaptive" else None


class CausalTable:
    """A small causal LM that looks at one token."""

    vocab_size = VOCAB

    def logits_of(self, ids_BL: torch.Tensor, where_N: torch.Tensor) -> torch.Tensor:
        table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1))
        return table[ids_BL.flatten()[where_N - 1]]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("row", [0, 1, 3])
def test_each_written_token_keeps_the_noise_it_was_written_from_and_given_ones_have_none(world: Path, settings: dict[str, Any], row: int) -> None:
    student = heard(world / "known")
    start_1L, decoding = started(student)[row : row + 1], Decoding(output="argmax", **settings)
    sample_counted(student, start_1L, torch.tensor([40]), 9, decoding, auxiliary=small_model(decoding))
    everywhere_1L = torch.ones(1, LENGTH, dtype=torch.bool)
    g_LV = tempered(sampling_noise(9, torch.tensor([40]), everywhere_1L, VOCAB), "gumbel", decoding.noise_temperature)
    assert len(student.heard) > 1
    for shown_1L, known in student.heard:
        written_1L = (shown_1L != student.mask_id) & (start_1L == student.mask_id)
        assert torch.equal(known.where_K, written_1L[0].nonzero()[:, 0]) and torch.equal(known.g_KV, g_LV[known.where_K])


@pytest.mark.parametrize("settings", [*SETTINGS, *PARTS])
@pytest.mark.parametrize("name", ["known", "control", "input"])
def test_a_row_is_written_in_a_batch_as_it_is_alone_with_and_without_noise_of_given_tokens(world: Path, name: str, settings: dict[str, Any]) -> None:
    student = load_masked(str(world / name), "cpu")
    ids_BL, sequence_id_B = started(student), torch.arange(5) + 40
    decoding = Decoding(output="argmax" if student.noise.readout else "sample", **settings)
    given = KnownNoise(
        torch.tensor([LENGTH + 2, 3 * LENGTH + 5, 3 * LENGTH + 7]), 10 * torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(2))
    )
    found = []
    for noise in (None, given):
        together = sample_counted(student, ids_BL, sequence_id_B, 9, decoding, auxiliary=small_model(decoding), given=noise)
        for row in range(5):
            here_K = given.where_K // LENGTH == row
            alone = sample_counted(
                student, ids_BL[row : row + 1], sequence_id_B[row : row + 1], 9, decoding, auxiliary=small_model(decoding),
                given=None if noise is None else KnownNoise(noise.where_K[here_K] - row * LENGTH, noise.g_KV[here_K]),
            )  # fmt: skip
            assert torch.equal(together[0][row], alone[0][0]) and torch.equal(together[1][row], alone[1][0])
        found.append(together[0])
    assert torch.equal(found[0][[0, 2, 4]], found[1][[0, 2, 4]]) and not torch.equal(found[0], found[1])


@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("seed", [3, 4])
def test_posterior_noise_of_given_tokens_makes_the_teacher_choose_them(world: Path, temperature: float, seed: int) -> None:
    teacher = CausalLM(str(world / "teacher"))
    given_BL = torch.tensor([[0, 5, 6, BLANK, 7], [0, BLANK, 4, 4, 4], [0, 23, 1, 9, BLANK]])
    told = given_noise(teacher, temperature, given_BL, torch.tensor([4, 5, 6]), seed)
    assert told is not None and told.where_K.tolist() == [1, 2, 11, 12, 13]
    for where, g in zip(told.where_K.tolist(), told.g_KV, strict=True):
        row, position = divmod(where, 5)
        with torch.no_grad():
            log_p = torch.log_softmax(teacher.model(input_ids=given_BL[row : row + 1, :position]).logits[0, -1] / temperature, -1)
        token = int(given_BL[row, position])
        rows_15 = philox.rows(seed, torch.tensor([4 + row]), torch.tensor([position]), NOISE_DRAW)
        e, e0 = philox.exponential(philox.words(rows_15, VOCAB))[0], philox.winner_exponential(rows_15)
        a = torch.where(torch.arange(VOCAB) == token, 0, e) + log_p.exp() * e0
        assert int((log_p + g).argmax()) == token and torch.allclose(g, -a.log(), atol=1e-4)


def test_nothing_is_asked_of_the_teacher_where_nothing_is_given() -> None:
    assert given_noise(None, 1.0, torch.tensor([[0, BLANK, 3], [0, BLANK, BLANK]]), torch.arange(2), 1) is None  # type: ignore[arg-type]


def config(world: Path, output: Path, **settings: Any) -> SampleConfig:
    settings = {"student": "known", "sequences": 11, "device": "cpu", "nfe": 3, "prompts": str(world / "prompts.jsonl"), **settings}
    return SampleConfig(**{**settings, "student": str(world / settings["student"]), "output": str(output)})


def ids_of(made: SampleSet) -> np.ndarray:
    return made.columns["input_ids"]


def test_with_the_teacher_at_hand_prompts_carry_the_noise_that_makes_it_choose_them(world: Path, tmp_path: Path) -> None:
    teacher = str(world / "teacher")
    made = sample_set(config(world, tmp_path, given_teacher=teacher))
    again = sample_set(config(world, tmp_path / "again", given_teacher=teacher, batch=3))
    without = sample_set(config(world, tmp_path))
    assert made.path != without.path and np.array_equal(ids_of(made), ids_of(again)) and made.path.name == again.path.name
    changed = (ids_of(made) != ids_of(without)).any(1)
    assert changed[[0, 1, 2, 4, 5, 6, 8, 9, 10]].any() and not changed[[3, 7]].any()  # BOS alone: nothing is given
    student = heard(world / "known")
    given_BL = torch.tensor([[0, 5, 6] + [BLANK] * 5])
    told = given_noise(CausalLM(teacher), 1.0, given_BL, torch.tensor([0]), 1)
    assert told is not None
    start_1L = given_BL.masked_fill(given_BL == BLANK, student.mask_id)
    ids_1L, _ = sample_counted(student, start_1L, torch.tensor([0]), 1, Decoding(3, output="argmax"), given=told)
    assert ids_1L[0].tolist() == ids_of(made)[0].tolist()
    sample_counted(student, start_1L, torch.tensor([0]), 1, Decoding(3, noise_temperature=0.5, output="argmax"), given=told)  # theirs is as it is
    for _, known in student.heard:
        assert isinstance(known, KnownNoise) and known.where_K.tolist()[-2:] == [1, 2] and torch.equal(known.g_KV[-2:], told.g_KV)


def test_reconstruction_tells_each_step_the_posterior_noise_of_what_came_back(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student, dataset = heard(world / "known"), NoiseDataset(world / "heldout")
    reconstruct(student, dataset, 8, 2, "random", 1)
    batch = dataset.batch(np.arange(8))
    told = [known for _, known in student.heard if len(known.where_K)]
    assert told and all(torch.allclose(known.g_KV, batch.noise_at(known.where_K)) for known in told)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"student": "gumbel", "given_teacher": "teacher"}, "the student reads no posterior noise at known tokens"),
        ({"student": "control", "given_teacher": "teacher"}, "the student reads no posterior noise at known tokens"),
        ({"student": "known", "given_teacher": "wide"}, "it has a vocabulary of 27, the student of 24"),
        ({"student": "known", "given_teacher": "teacher", "prompts": ""}, "nothing is given: prompts is empty"),
        ({"student": "teacher", "given_teacher": "teacher", "nfe": 0}, "given_teacher is .*, but .* is a causal LM"),
        ({"student": "blocks", "given_teacher": "teacher"}, "the student reads no posterior noise at known tokens"),
        ({"student": "elsewhere", "given_teacher": "teacher"}, r"its weights have sha256 \w{64}, those of the teacher of the student's dataset ab"),
        ({"student": "known", "fresh_noise": True}, "fresh_noise is set, but the student reads the noise of known tokens"),
    ],
)
def test_what_would_be_ignored_is_refused(world: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    teacher = {"given_teacher": str(world / settings["given_teacher"])} if "given_teacher" in settings else {}
    with pytest.raises(ValueError, match=message):
        sample_set(config(world, tmp_path, **{**settings, **teacher}))


def test_the_teacher_that_judges_drafts_gives_prompts_their_noise(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prefixes.jsonl").write_text(f'{{"text": "w5 w6 w7"}}\n{{"text": "w8 w9"}}\n{json.dumps({"ids": [None] * 7})}\n')
    real, handed = drafting.write_drafted, []

    def noted(*given: Any) -> Any:
        handed.append(given)
        return real(*given)

    monkeypatch.setattr(drafting, "write_drafted", noted)
    settings = {"student": "teacher", "prompts": str(tmp_path / "prefixes.jsonl"), "nfe": 0, "length": LENGTH, "sequences": 40}
    drafter, teacher = {"drafter": str(world / "known")}, {"given_teacher": str(world / "teacher")}
    alone, silent, told = (sample_set(config(world, tmp_path, **settings, **more)) for more in ({}, drafter, {**drafter, **teacher}))
    assert np.array_equal(told.columns["input_ids"], alone.columns["input_ids"]) and len({alone.path, silent.path, told.path}) == 3
    more = told.columns["nfe"] - silent.columns["nfe"]
    assert (more >= -1).all() and len(set(more)) > 1 and not more[2::3].any()  # a call more where tokens are given, and drafts that fare otherwise
    *_, seed, given_BP, _, _, sequence_id_B, noise = handed[-1]
    blank_BP = torch.arange(LENGTH) >= torch.tensor([4, 3, 1])[sequence_id_B % 3, None]
    expected = given_noise(CausalLM(str(world / "teacher")), 1.0, given_BP.masked_fill(blank_BP, BLANK), sequence_id_B, seed)
    assert expected is not None and torch.equal(noise.where_K, expected.where_K) and torch.equal(noise.g_KV, expected.g_KV)
    for batch in (1, 7):
        together = sample_set(config(world, tmp_path / str(batch), **settings, **drafter, **teacher, batch=batch))
        assert all(np.array_equal(together.columns[name], told.columns[name]) for name in told.columns)
    slash = config(world, tmp_path, **settings, **drafter, given_teacher=str(world / "teacher") + "/")
    assert sample_set(slash).path == told.path
    for changed, message in [
        ({"given_teacher": str(world / "judge")}, "but drafts are judged by"),
        ({**teacher, "drafter": str(world / "gumbel")}, "the student reads no posterior noise at known tokens"),
        ({**teacher, "drafter": str(world / "judge")}, "is a causal LM, which reads no noise"),
        ({**teacher, "prompts": ""}, "prompts is empty; give prompts, or drop it"),
    ]:
        with pytest.raises(ValueError, match=message):
            sample_set(config(world, tmp_path, **{**settings, **drafter, **changed}))


def test_noise_of_given_tokens_is_refused_by_a_student_that_reads_none(world: Path) -> None:
    plain = load_masked(str(world / "gumbel"), "cpu")
    given = KnownNoise(torch.tensor([1]), torch.zeros(1, VOCAB))
    with pytest.raises(ValueError, match="noise of given tokens is handed over"):
        sample_counted(plain, started(plain), torch.arange(5), 1, Decoding(2), given=given)


def test_the_teacher_of_the_dataset_is_read_at_its_temperature(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "known", tmp_path / "known")
    about = json.loads((tmp_path / "known" / "student.json").read_text())
    recorded = {"weights_sha256": weights_hash(world / "teacher"), "temperature": 0.5}
    about["provenance"]["identity"] = {"teacher": recorded}
    (tmp_path / "known" / "student.json").write_text(json.dumps(about))
    student = load_masked(str(tmp_path / "known"), "cpu")
    teacher = GivenTeacher(str(world / "teacher"), student, "cpu")
    given_BL = torch.tensor([[0, 5, 6, 7, BLANK]])
    told, expected = (
        ask(given_BL, torch.tensor([2]), 8) for ask in (teacher, lambda *rest: given_noise(CausalLM(str(world / "teacher")), 0.5, *rest))
    )
    assert told is not None and expected is not None and torch.equal(told.g_KV, expected.g_KV) and teacher.identity["temperature"] == 0.5


def test_a_report_refuses_fresh_noise_for_such_a_student_before_anything_is_drawn(world: Path) -> None:
    system = System(str(world / "known"), fresh_noise=True)
    with pytest.raises(ValueError, match="reads the noise of known tokens"):
        trace("known", system, load_masked(str(world / "known"), "cpu"), [2])


def test_the_command_takes_a_teacher_for_prompts(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--student",
        str(world / "known"),
        "--output",
        str(tmp_path),
        "--prompts",
        str(world / "prompts.jsonl"),
        "--sequences",
        "4",
        "--nfe",
        "2",
    ]
    assert main(["sample", *options, "--device", "cpu", "--given_teacher", str(world / "teacher")]) == 0
    assert "w5 w6" in capsys.readouterr().out
