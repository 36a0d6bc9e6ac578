"""Extracted text and text that the teacher wrote, mixed: each row is what its own dataset has, and what a student cannot read is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from noise.storage import DatasetError
from tests.trainer import processes
from tests.trainer.chain import transition, write_chain
from tests.trainer.runs import arguments, lines, steps
from trainer import setup
from trainer.__main__ import main
from trainer.chance import Chance
from trainer.config import NoiseConfig, ObjectiveConfig, StudentConfig, TrainConfig
from trainer.data import Mixture, NoiseDataset, unigram
from trainer.mixture import refuse_unreadable
from trainer.order import BLOCK
from trainer.students import build, load_student

V, L = 13, 8
TEACHER = {"teacher": {"weights_sha256": "ab"}}
TEXT = {"student__kind": "ar", "student__noise__kind": "none", "student__noise__readout": "false", "student__noise__drafts": "[]"}
NOISE, TOKEN_KD = StudentConfig(noise=NoiseConfig("gumbel", "add")), StudentConfig(objective=ObjectiveConfig(1.0, 1.0))
READERS = {"text": TEXT, "noise": {}, "token_kd": TEXT | {"student__objective__token_kd": 0.5}}
BOTH = [(reader, heldout) for reader in READERS for heldout in ("heldout", "written-heldout") if (reader, heldout) != ("token_kd", "written-heldout")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One teacher's datasets, of every kind, each with a seed of its own."""
    root = tmp_path_factory.mktemp("kinds")
    about = {
        "extracted": {"draws": 2, "ragged": True, **TEACHER},
        "written": {"extraction": "sequential", "seed": 78, "text_seed": 2, "ragged": True, "generation": {"stop": "never"}, **TEACHER},
        "plain": {"extraction": "none", "seed": 79, "text_seed": 3, "teacher": None},
        "heldout": {"rows": 40, "seed": 80, "text_seed": 4, **TEACHER},
        "written-heldout": {"rows": 40, "extraction": "sequential", "seed": 81, "text_seed": 5, **TEACHER},
    }
    return {name: write_chain(root / name, **settings) for name, settings in about.items()}  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def mixture(folders: dict[str, Path]) -> Mixture:
    return Mixture([NoiseDataset(folders["extracted"]), NoiseDataset(folders["written"])], [0.7, 0.3])


def mix(*parts: tuple[Path, float]) -> str:
    return json.dumps([{"path": str(path), "weight": weight} for path, weight in parts])


def opened(folders: dict[str, Path], *names: str) -> list[NoiseDataset]:
    return [NoiseDataset(folders[name]) for name in names]


def test_shares_of_rows_are_the_weights(mixture: Mixture) -> None:
    row_B, _ = mixture.order(3).at(0, 2 * BLOCK)
    for half_B in np.split(row_B, 2):
        assert int((half_B >= 200).sum()) == round(0.3 * BLOCK)


def test_every_row_has_the_positions_and_the_noise_of_its_own_dataset(mixture: Mixture) -> None:
    row_B, epoch_B = mixture.order(5).at(400, 500)
    assert epoch_B.max() == 1
    batch = mixture.batch(row_B, epoch_B % mixture.codec.draws)
    assert batch.extraction == "mixed" and torch.equal(batch.written_B, torch.from_numpy(row_B >= 200).long())
    assert set(batch.draw_B[batch.written_B == 0].tolist()) == {1} and set(batch.draw_B[batch.written_B == 1].tolist()) == {0}
    for written, dataset in enumerate(mixture.datasets):
        at_b = (batch.written_B == written).nonzero()[:, 0]
        alone = dataset.batch(row_B[at_b.numpy()] - 200 * written, 1 - written)
        assert torch.equal(batch.valid_BL[at_b], alone.valid_BL)
        row_n, position_n = alone.valid_BL.nonzero(as_tuple=True)
        assert torch.equal(batch.noise_at(at_b[row_n] * L + position_n), alone.noise_at(row_n * L + position_n))
    where_N = batch.valid_BL.flatten().nonzero()[:, 0]
    log_p_NV = transition(V)[batch.input_ids_BL.flatten()[where_N - 1]]
    assert torch.equal((log_p_NV + batch.noise_at(where_N)).argmax(-1), batch.input_ids_BL.flatten()[where_N])
    pieces = batch.split(7)
    assert torch.equal(torch.cat([piece.valid_BL for piece in pieces]), batch.valid_BL)
    assert unigram(mixture).exp().sum() == pytest.approx(1, abs=1e-5)


def test_token_kd_counts_on_the_rows_that_were_extracted(mixture: Mixture) -> None:
    row_B = np.array([3, 250, 17, 399, 201, 60])
    student = build(StudentConfig(kind="ar", layers=1, hidden=16, heads=2, objective=ObjectiveConfig(0.5, 2.0)), V, L)
    text = build(StudentConfig(kind="ar", layers=1, hidden=16, heads=2, objective=ObjectiveConfig(0.5, 0.0)), V, L)
    text.load_state_dict(student.state_dict())
    extracted, written = mixture.datasets
    loss, figures = student(mixture.batch(row_B), Chance(1, 1, 6))
    of_extracted, theirs = student(extracted.batch(row_B[row_B < 200]), Chance(1, 1, 3))
    of_written, others = text(written.batch(row_B[row_B >= 200] - 200), Chance(1, 1, 3))
    assert float(loss.detach()) == pytest.approx(float((of_extracted + of_written).detach()), rel=1e-5)
    assert float(figures["token_kd"]) == pytest.approx(float(theirs["token_kd"]), rel=1e-5)
    assert float(figures["nll"]) == pytest.approx(float(theirs["nll"] + others["nll"]), rel=1e-5)


@pytest.mark.parametrize(("reader", "heldout"), BOTH)
def test_a_student_trains_on_both_kinds_and_is_held_out_on_either(folders: dict[str, Path], tmp_path: Path, reader: str, heldout: str) -> None:
    parts = mix((folders["extracted"], 0.7), (folders["written"], 0.3))
    longer = {"optim__steps": 80, "optim__lr": 1e-2, "optim__global_batch": 64, "student__dropout": 0.0, "log_every": 10, "checkpoint_every": 0}
    changes = {"data__mix": parts, "data__heldout": folders[heldout], **longer, **READERS[reader]}
    assert main(arguments(tmp_path / "run", "", **changes)) == 0  # type: ignore[arg-type]
    last = lines(tmp_path / "run")[-1]
    if reader == "noise":
        assert last["heldout/nelbo"] < 0.85 * last["heldout/nelbo_other_noise"]
    else:
        assert last["heldout/nll"] < 1.9  # log V is 2.56
    assert ("heldout/token_kd" in last) == (reader == "token_kd")
    mixed = load_student(tmp_path / "run").provenance["identity"]["mixture"]
    assert [(part["weight"], part["identity"]["extraction"]) for part in mixed] == [(0.7, "parallel"), (0.3, "sequential")]


def test_two_processes_train_on_the_same_batches_of_both_kinds(folders: dict[str, Path], tmp_path: Path) -> None:
    parts = mix((folders["extracted"], 0.7), (folders["written"], 0.3))
    for size in (1, 2):
        changes = {"data__mix": parts, "optim__steps": 4, "student__dropout": 0.0}
        ended = processes.run(arguments(tmp_path / str(size), "", **changes), tmp_path, size)  # type: ignore[arg-type]
        assert not any(process.status for process in ended), ended
    for a, b in zip(steps(tmp_path / "1"), steps(tmp_path / "2"), strict=True):
        assert a["train/nelbo"] == pytest.approx(b["train/nelbo"], rel=1e-4)


def test_a_student_of_the_text_alone_takes_any_text(folders: dict[str, Path], tmp_path: Path) -> None:
    """No teacher, another teacher, another sketch: none of it is read."""
    other = write_chain(tmp_path / "other", epsilon=0.25, draws=1, teacher={"weights_sha256": "cd"}, seed=82)
    parts = Mixture([*opened(folders, "plain", "written", "extracted"), NoiseDataset(other)], [1, 1, 1, 1])
    batch = parts.batch(np.array([0, 200, 400, 600]))
    assert parts.extraction == "none" and batch.valid_BL.sum(1)[0] == L - 1 and not batch.valid_BL[1, :2].any()
    for noise in (NoiseConfig(), NoiseConfig(kind="independent", input="replace")):
        refuse_unreadable(StudentConfig(noise=noise), parts.datasets, "data.mix")


@pytest.mark.parametrize(
    ("student", "names", "message"),
    [
        (NOISE, ["extracted", "plain"], r"data\.mix .*plain has tokens but no noise .*extraction: none"),
        (
            StudentConfig(objective=ObjectiveConfig(0.0, 1.0)), ["extracted", "written"],
            r"token_kd is 1.0, but data\.mix .*written keeps no entries .*\(extraction: sequential\); set token_kd to 0, .* and set nelbo above 0",
        ),
        (TOKEN_KD, ["written"], r"data\.mix .*written keeps no entries"),
        (TOKEN_KD, ["extracted", "plain"], r"data\.mix .*plain keeps no entries .*\(extraction: none\)"),
    ],
)  # fmt: skip
def test_what_a_student_reads_and_a_dataset_lacks_is_refused_by_its_name(
    folders: dict[str, Path], student: StudentConfig, names: list[str], message: str
) -> None:
    with pytest.raises(DatasetError, match=message):
        refuse_unreadable(student, opened(folders, *names), "data.mix")


MASKED = {"extraction": "sequential", "generation": {"stop": "never", "special_tokens": "masked"}}
OTHER_LAWS: list[tuple[dict[str, object], str]] = [
    ({"teacher": {"weights_sha256": "cd"}}, r"teacher\.weights_sha256: 'cd' here, 'ab' there$"),
    (TEACHER | {"draws": 4}, r"draws: 4 here, 2 there$"),
    (TEACHER | {"draws": 2, "epsilon": 0.25}, r"epsilon: 0.25 here, 0.125 there$"),
]


@pytest.mark.parametrize(
    ("student", "about", "message"),
    [(student, *other) for student in (NOISE, TOKEN_KD) for other in OTHER_LAWS]
    + [(NOISE, TEACHER | MASKED, r"generation\.special_tokens: 'masked' here, 'allowed' there$")],
)
def test_what_is_not_of_one_law_is_refused_by_field_where_it_is_read(
    folders: dict[str, Path], tmp_path: Path, student: StudentConfig, about: dict[str, object], message: str
) -> None:
    datasets = [*opened(folders, "extracted"), NoiseDataset(write_chain(tmp_path / "other", **about))]  # type: ignore[arg-type]
    with pytest.raises(DatasetError, match=r"data\.mix .*other does not fit .*extracted: " + message):
        refuse_unreadable(student, datasets, "data.mix")
    refuse_unreadable(StudentConfig(), datasets, "data.mix")


def test_written_text_beside_token_kd_may_be_of_another_law(folders: dict[str, Path], tmp_path: Path) -> None:
    other = write_chain(tmp_path / "other", **MASKED, teacher={"weights_sha256": "cd"})  # type: ignore[arg-type]
    refuse_unreadable(TOKEN_KD, [NoiseDataset(other), *opened(folders, "extracted")], "data.mix")


@pytest.mark.parametrize(
    ("student", "heldout", "message"),
    [
        (TOKEN_KD, "written-heldout", r"data\.heldout .*written-heldout keeps no entries of a teacher"),
        (NOISE, "plain", r"data\.heldout .*plain has tokens but no noise"),
    ],
)
def test_a_held_out_dataset_without_what_the_student_reads_is_refused(
    folders: dict[str, Path], mixture: Mixture, student: StudentConfig, heldout: str, message: str
) -> None:
    config = TrainConfig("", student=student)
    config.data.heldout = str(folders[heldout])
    with pytest.raises(DatasetError, match=message):
        setup.open_heldout(config, mixture)
    config.student = StudentConfig()
    assert setup.open_heldout(config, mixture) is not None
