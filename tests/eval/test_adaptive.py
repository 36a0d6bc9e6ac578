"""Adaptive parallel decoding: the rule against brute force, its two limits, and a prefix that never shrinks as R grows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eval.adaptive import accepted, target_scores
from eval.decoding import Decoding
from eval.sampler import blank_rows, sample_counted
from eval.stream import NOISE_DRAW, OUTPUT_DRAW
from noise import philox
from tests.eval.known import ROWS, TableLM, TableStudent, fits, product


def adaptive(student: TableStudent, lm: TableLM, weight: float, rows: int = ROWS, **settings: object) -> tuple[torch.Tensor, torch.Tensor]:
    decoding = Decoding(sampler="adaptive", student_weight=weight, **settings)  # type: ignore[arg-type]
    blank_BL = blank_rows(student, rows, student.unknown + 1, bos=0)
    ids_BL, nfe_B = sample_counted(student, blank_BL, torch.arange(rows), 5, decoding, auxiliary=lm)
    return ids_BL[:, 1:], nfe_B


def noise(student: TableStudent, rows: int, draw: int) -> torch.Tensor:
    """[B, M, V]"""
    sequence_id, position = (part.flatten() for part in torch.meshgrid(torch.arange(rows), torch.arange(1, student.unknown + 1), indexing="ij"))
    return philox.gumbel(philox.rows(5, sequence_id, position, draw), student.vocab_size).view(rows, student.unknown, -1)


def rollout(student: TableStudent, g_BMV: torch.Tensor) -> torch.Tensor:
    """argmax(log p + g) from left to right."""
    ids_BM = torch.full(g_BMV.shape[:2], student.mask_id)
    for m in range(student.unknown):
        ids_BM[:, m] = (student.conditionals(ids_BM)[:, m].log().float() + g_BMV[:, m]).argmax(-1)
    return ids_BM


def test_where_the_small_model_alone_decides_and_is_exact_its_own_sample_comes_out_in_fewer_calls() -> None:
    student = TableStudent()
    ids_BM, nfe_B = adaptive(student, TableLM(student), 0.0)
    assert torch.equal(ids_BM, rollout(student, noise(student, ROWS, OUTPUT_DRAW)))
    assert fits(ids_BM, student, student.joint)
    assert float(nfe_B.float().mean()) < 2.5 and int(nfe_B.max()) == 3


@pytest.mark.parametrize("noise_temperature", [1.0, 0.8])
def test_with_a_readout_the_small_model_reads_the_same_noise_and_a_teacher_gives_its_own_text(noise_temperature: float) -> None:
    student = TableStudent(noise="gumbel", readout=True)
    ids_BM, _ = adaptive(student, TableLM(student), 0.0, 3000, output="argmax", noise_temperature=noise_temperature)
    assert torch.equal(ids_BM, rollout(student, noise_temperature * noise(student, 3000, NOISE_DRAW)))


def test_where_the_student_alone_decides_all_tokens_are_taken_at_once() -> None:
    student = TableStudent()
    ids_BM, nfe_B = adaptive(student, TableLM(TableStudent(seed=3)), 1.0)
    assert bool((nfe_B == 1).all()) and fits(ids_BM, student, product(student.marginals(), student.words))


def test_more_weight_on_the_student_takes_fewer_calls() -> None:
    student = TableStudent(vocab_size=2, unknown=6)
    lm = TableLM(TableStudent(vocab_size=2, unknown=6, seed=3))
    nfe = [float(adaptive(student, lm, weight, 500)[1].float().mean()) for weight in (0.0, 0.3, 0.6, 0.9, 1.0)]
    assert nfe == sorted(nfe, reverse=True) and nfe[0] > nfe[2] > nfe[4] == 1


@given(st.integers(0, 2**31), st.lists(st.integers(1, 6), min_size=1, max_size=4), st.booleans())
def test_the_accepted_prefix_never_gets_shorter_as_the_weight_grows(seed: int, masked: list[int], restricted: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    row_N = torch.arange(len(masked)).repeat_interleave(torch.tensor(masked))
    student_NV, lm_NV = (torch.randn(len(row_N), 5, generator=generator) * 2 for _ in range(2))
    if restricted:
        student_NV[:, seed % 5] = -torch.inf
        lm_NV[:, (seed + 1) % 5] = -torch.inf
    proposed_N, before_N = student_NV.argmax(1), torch.zeros(len(row_N), dtype=torch.bool)
    for weight in torch.linspace(0, 1, 21).tolist():
        now_N = accepted(proposed_N, target_scores(student_NV, lm_NV, weight).argmax(1), row_N)
        prefix = [part.long().diff().le(0).all() and bool(part[0]) for part in torch.split(now_N, masked)]
        assert all(prefix) and bool((before_N <= now_N).all())
        before_N = now_N
    assert bool(before_N.all())


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"top_k": 2}, {"nucleus": 0.8}, {"lookahead": 1}, {"lookahead": 2}, {"lookahead": 3}])
def test_the_rule_is_what_brute_force_says_a_row_and_a_position_at_a_time(settings: dict) -> None:
    student = TableStudent(vocab_size=3, unknown=5)
    lm = TableLM(TableStudent(vocab_size=3, unknown=5, seed=1))
    rows, weight, mask = 60, 0.4, student.mask_id
    blank_BM = torch.full((rows, 5), mask)
    blank_BM[::3, 2] = 1
    h_BMV = noise(student, rows, OUTPUT_DRAW)
    temperature = settings.get("temperature", 1.0)
    expected, calls = blank_BM.clone(), torch.zeros(rows, dtype=torch.int64)
    for row in range(rows):
        ids = expected[row]
        while mask in ids:
            calls[row] += 1
            score = {}
            open_, most = (ids == mask).nonzero()[:, 0].tolist(), settings.get("lookahead") or 5
            shown = ids.clone()
            if len(open_) > most:
                shown[open_[most] :] = mask
            for m in open_[:most]:
                p = student.conditionals(shown[None])[0, m] ** (1 / temperature)
                falling = (p / p.sum()).sort(descending=True)
                keep = min(settings.get("top_k", 3), int((falling.values.cumsum(0) - falling.values < settings.get("nucleus", 1.0)).sum()))
                left_out = falling.indices[keep:]
                score[m] = p.log() + h_BMV[row, m]
                score[m][left_out] = -torch.inf
            proposed = ids.clone()
            for m, scores in score.items():
                proposed[m] = scores.argmax()
            for place, (m, scores) in enumerate(score.items()):
                seen = proposed.clone()
                seen[m:] = mask
                read = lm.student.conditionals(seen[None])[0, m].log() / temperature + h_BMV[row, m]
                if place and int((weight * scores + (1 - weight) * read).argmax()) != int(proposed[m]):
                    break
                ids[m] = proposed[m]
    blank_BL = torch.cat([torch.zeros(rows, 1, dtype=torch.int64), blank_BM], 1)
    decoding = Decoding(sampler="adaptive", student_weight=weight, **settings)
    ids_BL, nfe_B = sample_counted(student, blank_BL, torch.arange(rows), 5, decoding, auxiliary=lm)
    assert torch.equal(ids_BL[:, 1:], expected) and torch.equal(nfe_B, calls)
    assert 1 < float(calls.float().mean()) < (5 if settings.get("lookahead") != 1 else 6)


def test_models_of_different_vocabularies_are_refused() -> None:
    with pytest.raises(ValueError, match="a vocabulary of 2, the student of 3"):
        adaptive(TableStudent(), TableLM(TableStudent(vocab_size=2)), 0.5, 1)
