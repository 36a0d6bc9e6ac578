"""What students are held against: the teacher's cross-entropy from kept entries is the dense one on average, through a whole student."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from noise import philox
from noise.sketch import encode
from noise.storage import DatasetError
from tests.trainer.chain import write_chain
from trainer import objectives
from trainer.batch import Batch
from trainer.chance import Chance
from trainer.config import DataConfig, NoiseConfig, ObjectiveConfig, OptimConfig, StudentConfig, TrainConfig
from trainer.data import NoiseDataset
from trainer.loop import train
from trainer.students import build, load_student, save_student

V, L = 13, 8
ROWS, DRAWS = 128, 16


def config(kind: str = "mdlm", nelbo: float = 1.0, token_kd: float = 0.0, noise: NoiseConfig | None = None) -> StudentConfig:
    return StudentConfig(kind=kind, layers=1, hidden=16, heads=2, noise=noise or NoiseConfig(), objective=ObjectiveConfig(nelbo, token_kd))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Batch:
    return NoiseDataset(write_chain(tmp_path_factory.mktemp("chain") / "dataset", ragged=True)).batch(np.arange(64))


def teacher() -> Tensor:
    """Log-probs float32 [V, V], every one in the middle of its code's bin, so that nothing but chance parts an estimate from it.

    They sum to nearly 1 and not to 1: for that the estimator adds a constant, which has no gradient."""
    code_V = torch.tensor([9, 15, 17, 18, 22, 28, 34, 40, 47, 55, 64, 80, 96])
    generator = torch.Generator().manual_seed(1)
    return torch.stack([-0.125 * (code_V[torch.randperm(V, generator=generator)] + 0.5) for _ in range(V)])


def one_text(batch: Batch, seed: int) -> Batch:
    """The same text with the same masks many times over, each with noise and kept entries of its own."""
    ids_L = torch.tensor([0, 3, 7, 1, 12, 5, 5, 9])
    same = torch.zeros(ROWS, dtype=torch.int64)
    token_N, before_N = ids_L.repeat(ROWS), ids_L.roll(1).repeat(ROWS)
    rows_N5 = philox.rows(seed, torch.arange(ROWS).repeat_interleave(L), torch.arange(L).repeat(ROWS))
    sketch = encode(teacher()[before_N], token_N, rows_N5, batch.codec)
    first = torch.arange(L).repeat(ROWS) == 0  # BOS has no noise
    kept = replace(sketch, kept_N=sketch.kept_N.masked_fill(first, 0), index_K=sketch.index_K[~first.repeat_interleave(sketch.kept_N)])
    kept = replace(kept, code_K=sketch.code_K[~first.repeat_interleave(sketch.kept_N)], log_prob_N=sketch.log_prob_N.masked_fill(first, 0.0))
    return replace(batch, input_ids_BL=ids_L.expand(ROWS, L).clone(), length_B=same + L, sequence_id_B=same, seed_B=same, draw_B=same,
                   place_B=same, sketch=kept, padded=False)  # fmt: skip


def gradient(student: torch.nn.Module, loss: Tensor) -> Tensor:
    """Of one text, flat, float64."""
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(student.parameters()), materialize_grads=True)]).double() / ROWS


@pytest.mark.parametrize("kind", ["mdlm", "ar"])
def test_the_gradient_is_the_dense_teachers_on_average_over_the_noise(batch: Batch, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    student, chance = build(config(kind, 0.0, 1.0), V, L), Chance(3, 11, 1)

    def dense(_: ObjectiveConfig, logits_NV: Tensor, token_N: Tensor, of: Batch, where_N: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return -(teacher()[of.input_ids_BL.flatten()[where_N - 1]].exp() * logits_NV.log_softmax(1)).sum(1), {"nelbo": torch.zeros(len(token_N))}

    found_DP = torch.stack([gradient(student, student(one_text(batch, seed), chance)[0]) for seed in range(1, DRAWS + 1)])
    with monkeypatch.context() as patched:
        patched.setattr(objectives, "losses", dense)
        true_P = gradient(student, student(one_text(batch, 1), chance)[0])
    student.config = config(kind)
    text_P = gradient(student, student(one_text(batch, 1), chance)[0])
    directions = torch.randn(6, len(true_P), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for direction_P in [true_P, *directions]:
        along_D = (found_DP - true_P) @ direction_P
        assert abs(float(along_D.mean())) < 4 * float(along_D.std()) / DRAWS**0.5
    off_D, off = (found_DP - true_P) @ (text_P - true_P), float((text_P - true_P).norm() ** 2)
    assert abs(float(off_D.mean())) < 4 * float(off_D.std()) / DRAWS**0.5 < 0.1 * off  # and the text's own gradient is far away


def test_token_kd_is_its_formula_at_every_position_of_ragged_rows(batch: Batch) -> None:
    torch.manual_seed(0)
    student = build(config("ar", 0.25, 0.5), V, L)
    loss, figures = student(batch, Chance(1, 1, 64))
    expected, nll, codec = 0.0, 0.0, batch.codec
    end_N = torch.cumsum(batch.sketch.kept_N, 0)
    for row in range(64):
        log_q_LV = student.logits(batch.input_ids_BL[row : row + 1, : int(batch.length_B[row])])[0].double().log_softmax(1).detach()
        for t in range(1, int(batch.length_B[row])):
            place, token = row * L + t, int(batch.input_ids_BL[row, t])
            kept = slice(int(end_N[place] - batch.sketch.kept_N[place]), int(end_N[place]))
            p_K = torch.exp(-codec.step * (batch.sketch.code_K[kept].double() + 0.5))
            loss_V, b = -log_q_LV[t - 1], float(torch.special.entr(log_q_LV[t - 1].exp()).sum())
            p_x = float(batch.sketch.log_prob_N[place].double().exp())
            inclusion_K = 1 - (1 + p_K / codec.c) ** -codec.draws
            expected += b + p_x * (float(loss_V[token]) - b) + float((p_K / inclusion_K * (loss_V[batch.sketch.index_K[kept]] - b)).sum())
            nll += float(loss_V[token])
    assert float(figures["token_kd"]) == pytest.approx(expected, rel=1e-5) and float(figures["nll"]) == pytest.approx(nll, rel=1e-5)
    assert float(loss.detach()) == pytest.approx(0.25 * nll + 0.5 * expected, rel=1e-5)


@pytest.mark.parametrize(
    "noise", [NoiseConfig(drafts=[1], draft_weight=0.5), NoiseConfig(kind="independent", input="replace")], ids=["none", "control"]
)
def test_weights_add_and_an_objective_of_weight_zero_has_no_gradient(batch: Batch, noise: NoiseConfig) -> None:
    results = []
    for nelbo, token_kd in ((1.0, 0.0), (0.0, 1.0), (0.5, 2.0)):
        torch.manual_seed(0)
        student = build(config("mdlm", nelbo, token_kd, noise), V, L)
        loss, figures = student(batch, Chance(3, 5, 64))
        assert set(figures) == set(student.figure_names) and ("token_kd" in figures) == (token_kd > 0)
        results.append((float(loss.detach()), gradient(student, loss), float(figures["nelbo"])))
    (a, grad_a, nelbo_a), (b, grad_b, nelbo_b), (both, grad_both, _) = results
    assert both == pytest.approx(0.5 * a + 2 * b, rel=1e-5) and nelbo_a == pytest.approx(nelbo_b, rel=1e-6)
    torch.testing.assert_close(grad_both, 0.5 * grad_a + 2 * grad_b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (config(token_kd=1.0, noise=NoiseConfig(kind="gumbel", input="replace")), "token_kd is 1.0 and student.noise.kind gumbel.* biased"),
        (config(token_kd=1.0, noise=NoiseConfig(kind="gaussian", readout=True)), "noise.kind gaussian"),
        (config(nelbo=0.0), "both 0"),
        (config("ar", nelbo=0.0), "both 0"),
        (config("ar", token_kd=-1.0), "token_kd is -1.0"),
        (config(nelbo=float("nan")), "nelbo is nan"),
    ],
)
def test_weights_that_cannot_be_meant_are_refused(settings: StudentConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(settings, V, L)


@pytest.mark.parametrize("extraction", ["sequential", "none"])
def test_a_dataset_that_kept_nothing_of_its_teacher_is_refused(tmp_path: Path, extraction: str) -> None:
    folder = write_chain(tmp_path / "dataset", extraction=extraction)
    with pytest.raises(DatasetError, match=rf"token_kd is 1.0, but data.path .*dataset keeps no entries of a teacher \(extraction: {extraction}\)"):
        train(TrainConfig(str(tmp_path / "out"), DataConfig(path=str(folder)), config("ar", token_kd=1.0)))
    with pytest.raises(DatasetError, match="keeps no entries"):
        build(config("ar", token_kd=1.0), V, L)(NoiseDataset(folder).batch(np.arange(4)), Chance(1, 1, 4))


def test_a_student_trains_on_the_teacher_alone_and_loads_as_does_one_saved_before_there_were_objectives(tmp_path: Path) -> None:
    path = write_chain(tmp_path / "dataset")
    student = config("ar", 0.0, 1.0)
    optim = OptimConfig(steps=40, global_batch=64, lr=1e-2, warmup=5)
    train(
        TrainConfig(str(tmp_path / "out"), DataConfig(path=str(path), heldout=str(path)), student, optim, threads=1, tensorboard=False, eval_every=0)
    )
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["heldout/token_kd"] < 1.7 and lines[-1]["heldout/nll"] < 1.7  # log V is 2.56
    assert load_student(tmp_path / "out").config.objective == ObjectiveConfig(0.0, 1.0)
    old = build(config(), V, L)
    save_student(tmp_path / "old", old, old.state_dict(), {}, {})
    about = json.loads((tmp_path / "old" / "student.json").read_text())
    del about["student"]["objective"], about["student"]["noise"]["rank"]
    (tmp_path / "old" / "student.json").write_text(json.dumps(about))
    assert load_student(tmp_path / "old").config.objective == ObjectiveConfig()
