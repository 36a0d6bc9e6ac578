"""An mtp student writes whole rows: from left to right, the next tokens of each forward with its own noise, in its sampler, commands and reports."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eval.__main__ import main
from eval.decoding import Decoding
from eval.reconstruct import returned
from eval.sampler import blank_rows, sample, sample_counted, sampling_noise
from eval.stream import OUTPUT_DRAW, stream_uniform
from noise import philox
from tests.eval.known import ROWS, TableStudent, fits, law
from tests.eval.test_sampler import even
from tests.eval.world import LENGTH, VOCAB, write_heldout
from trainer.config import NoiseConfig, StudentConfig
from trainer.data import NoiseDataset
from trainer.students import build, save_student

NOISES = {
    "none": NoiseConfig(),
    "sampled": NoiseConfig("gumbel", "replace", prior="unigram"),
    "argmax": NoiseConfig("gumbel", "replace", readout=True, drafts=[1]),
    "known": NoiseConfig("gumbel", "replace", readout=True, known=True),
}


def mtp(noise: str = "none", context: str = "drawn", predict: int = 3, shift: bool = False) -> Any:
    torch.manual_seed(2)
    config = StudentConfig("mtp", layers=2, hidden=16, heads=2, predict=predict, context=context, noise=NOISES[noise], shift=shift)  # type: ignore[arg-type]
    student = build(config, VOCAB, LENGTH)
    with torch.no_grad():
        for weight in student.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return student.eval()


def left(nfe: int, output: str = "sample", **more: Any) -> Decoding:
    return Decoding(nfe, order="left_to_right", output=output, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("nfe", [2, 3])
def test_it_draws_from_the_law_of_groups_from_the_left(nfe: int) -> None:
    student: Any = TableStudent()
    student.ahead, student.config = 2, SimpleNamespace(context="drawn")
    drawn = sample(student, blank_rows(student, ROWS, 4, bos=0), torch.arange(ROWS), 5, left(nfe))[:, 1:]
    assert fits(drawn, student, law(student, nfe, even(nfe, "left_to_right")))
    assert all((ids_BL == student.mask_id).sum(1).max() <= 2 for ids_BL in student.asked)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("nfe", [3, 4, 7])
def test_every_forward_writes_the_next_tokens_of_a_prefix_and_masks_as_in_training(noise: str, shift: bool, nfe: int) -> None:
    """Against the student's own `predict` on one row at a time: a prefix, the next masks, nothing behind."""
    student, seed, sequences = mtp(noise, shift=shift), 9, torch.arange(30, 34)
    start_BL = blank_rows(student, 4, LENGTH, 0)
    start_BL[2, 1], start_BL[3, 1:3] = 5, torch.tensor([6, 7])
    decoding = left(nfe, "argmax" if student.noise.readout else "sample")
    found_BL, nfe_B = sample_counted(student, start_BL, sequences, seed, decoding)
    for row, start_L in enumerate(start_BL):
        known = int((start_L != student.mask_id).sum())
        unknown, ids = LENGTH - known, start_L[:known].tolist()
        for step in range(1, decoding.nfe + 1):
            until = known + -(-unknown * step // decoding.nfe)
            shown = min(len(ids) + 3, LENGTH)
            ids_1L = torch.tensor([ids + [student.mask_id] * (shown - len(ids))])
            at_N = torch.arange(len(ids), shown)
            everywhere_1L = torch.zeros(1, LENGTH, dtype=torch.bool)
            everywhere_1L[0, known:] = True
            g_LV = torch.zeros(LENGTH, VOCAB)
            g_LV[known:] = sampling_noise(seed, sequences[row : row + 1], everywhere_1L, VOCAB)
            told = _known(student, g_LV, known, len(ids))
            with torch.inference_mode():
                logits_NV = student.predict(ids_1L, None if noise == "none" else g_LV[at_N], told)[0]
            if decoding.output == "argmax":
                token_N = logits_NV.argmax(1)
            else:
                u_N = stream_uniform(philox.rows(seed, sequences[row].expand(len(at_N)), at_N, OUTPUT_DRAW))
                cumulative_NV = logits_NV.double().softmax(1).cumsum(1)
                token_N = torch.searchsorted(cumulative_NV, u_N[:, None] * cumulative_NV[:, -1:], right=True)[:, 0]
            ids += token_N[: until - len(ids)].tolist()
        assert found_BL[row].tolist() == ids and nfe_B[row] == min(decoding.nfe, unknown)


def _known(student: Any, g_LV: torch.Tensor, given: int, known: int) -> Any:
    from trainer.conditioning import KnownNoise

    return KnownNoise(torch.arange(given, known), g_LV[given:known]) if student.noise.known else None


@pytest.mark.parametrize("noise", NOISES)
def test_a_seed_names_a_row_at_any_batch_size_and_length(noise: str) -> None:
    student, output = mtp(noise), "argmax" if NOISES[noise].readout else "sample"
    ids_BL, length_B = blank_rows(student, 12, LENGTH, 0), torch.tensor([LENGTH, 6, 4] * 4)
    ids_BL = ids_BL.masked_fill(torch.arange(LENGTH) >= length_B[:, None], 0)
    whole = sample(student, ids_BL, torch.arange(12), 3, left(3, output), length_B=length_B)
    for row, length in enumerate(length_B.tolist()):
        alone = sample(student, ids_BL[row : row + 1, :length], torch.tensor([row]), 3, left(3, output))
        assert torch.equal(whole[row, :length], alone[0]) and not whole[row, length:].any()


@pytest.mark.parametrize(
    ("context", "unknown", "decoding", "message"),
    [
        ("drawn", 7, left(2), "nfe is 2, but the student writes at most 3 tokens a forward, and a row has 7 unknown ones; give at least 3"),
        ("drawn", 7, Decoding(4), "order random, but an mtp student writes from left to right"),
        ("drawn", 7, Decoding(sampler="first_hitting"), "sampler is first_hitting and order random"),
        ("row", 7, left(7), r"has 7 unknown positions, but the student has learnt the last 3 of a row alone \(student.context: row\)"),
        ("drawn", 0, left(2), "a row has tokens after its first unknown one"),
    ],
)
def test_what_it_cannot_write_is_refused(context: str, unknown: int, decoding: Decoding, message: str) -> None:
    student = mtp(context=context)
    ids_BL = blank_rows(student, 2, LENGTH, 0)
    if not unknown:
        ids_BL[1, 4] = 5
    with pytest.raises(ValueError, match=message):
        sample(student, ids_BL, torch.arange(2), 1, decoding)


def test_a_student_of_last_tokens_fills_the_ends_of_its_rows() -> None:
    student = mtp("argmax", context="row")
    ids_BL = blank_rows(student, 2, LENGTH, 0)
    ids_BL[:, : LENGTH - 3] = torch.tensor([0, 3, 4, 5, 6])
    assert bool((sample(student, ids_BL, torch.arange(2), 1, left(1, "argmax")) < VOCAB).all())


def test_rows_are_rebuilt_from_left_to_right(tmp_path: Path) -> None:
    write_heldout(tmp_path / "rows", rows=20)
    dataset = NoiseDataset(tmp_path / "rows")
    same = returned(mtp("argmax"), dataset, 10, 3, "left_to_right", seed=1)
    assert same.shape == (10, LENGTH) and (same[:, 0] == -1).all() and set(same[:, 1:].flatten()) == {0, 1}
    with pytest.raises(ValueError, match="an mtp student writes from left to right"):
        returned(mtp("argmax"), dataset, 10, 3, "random", seed=1)


def test_the_command_rebuilds_rows_and_refuses_what_cannot_be_before_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_heldout(tmp_path / "rows", rows=20)
    for context in ("drawn", "row"):
        student = mtp("argmax", context)
        save_student(tmp_path / context, student, student.state_dict(), {}, {})
    common = ["reconstruct", "--heldout", str(tmp_path / "rows"), "--rows", "5", "--device", "cpu", "--student"]
    assert main([*common, str(tmp_path / "drawn"), "--nfe", "[3,7]"]) == 0 and "NFE 7" in capsys.readouterr().out
    for name, options, message in [
        ("drawn", ["--nfe", "[4,2]"], "the student writes at most 3 tokens a forward, and a row has 7 unknown ones; give at least 3"),
        ("drawn", ["--nfe", "[4]", "--order", "confidence"], "order confidence, but an mtp student"),
        ("row", ["--nfe", "[7]"], "has learnt the last 3 of a row alone"),
    ]:
        assert main([*common, str(tmp_path / name), *options]) == 1
        out = capsys.readouterr()
        assert message in out.err and out.err.count("\n") == 1 and not out.out
