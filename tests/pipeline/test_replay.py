"""Who can check text that a teacher wrote: replay asks the teacher, verify needs none. No Ray."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from noise import philox
from noise.dataset import Manifest, open_shard
from noise.receipt import committed
from noise.shard import Rows
from noise.storage import DatasetError
from pipeline.replay import replay
from pipeline.verify import verify
from tests.pipeline.world import World
from tests.pipeline.written import BLOCK, choice_of, finish, forge, from_prompts, make_world, plan, rows_of


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("written"))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_replay_in_float64_returns_every_token_of_a_float64_run(world: World, kind: str) -> None:
    teacher = {"model": str(world.root / kind), "dtype": "float64", "temperature": 0.9}
    folder = finish(from_prompts(world, f"{kind}-exact", teacher=teacher, special_tokens="masked"))
    report = replay(folder)
    assert (report.tolerance, report.differ, report.failures, report.near_ties) == (0.0, 0, 0, [])
    assert report.positions == Manifest.read(folder).totals["tokens"] and report.log_prob_error < 1e-6
    assert 0 < replay(folder, rows=10).rows < report.rows


def test_replay_in_float32_lists_near_ties_and_fails_on_anything_else(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    job = plan(world, "single", stop="never")
    folder = finish(job)
    assert replay(folder).failures == replay(folder, dtype="float64").failures == 0
    rows = next(iter(open_shard(folder, committed(folder)[1], job.plan.identity)))
    ids_BL = rows.input_ids.astype(np.int64)
    ((_, logits_NV),) = list(job.teacher.logits(torch.from_numpy(ids_BL), torch.arange(len(rows)) * BLOCK + BLOCK - 2))  # type: ignore[union-attr]
    choice = choice_of(job)
    last_N5 = philox.rows(
        int(job.plan.identity["seed"]), torch.from_numpy(rows.sequence_id.view(np.int64).copy()), torch.full((len(rows),), BLOCK - 1)
    )
    scores_NV, log_probs_NV = choice.scores(logits_NV, last_N5)
    best_N2, token_N2 = scores_NV.topk(2)
    ids_BL[:, -1] = token_N2[:, 1].numpy()  # the second best, throughout
    log_prob = rows.log_prob.copy()
    log_prob[:, -1] = log_probs_NV.gather(1, token_N2[:, 1:])[:, 0].numpy()
    forge(job, 1, replace(rows, input_ids=ids_BL.astype(rows.input_ids.dtype), log_prob=log_prob))
    report = replay(folder)
    assert report.failures == report.differ == len(rows)
    assert report.first_failure.startswith(f"shard 1, row 0, position {BLOCK - 1}: token {token_N2[0, 1]} was written, {token_N2[0, 0]} is chosen")
    gaps = best_N2[:, 0] - best_N2[:, 1]
    monkeypatch.setattr("pipeline.replay.NEAR_TIE", float(gaps.median()) * (1 + 1e-3))
    report = replay(folder)
    assert len(report.near_ties) == int((gaps <= gaps.median()).sum()) and report.failures == len(rows) - len(report.near_ties)


def test_replay_in_bfloat16_reports_a_rate_and_fails_nothing(world: World) -> None:
    report = replay(finish(plan(world, "coarse", teacher={"dtype": "bfloat16"})))
    assert report.tolerance is None and report.failures == 0 and report.positions > 100 and report.differ < 0.1 * report.positions
    assert f"{report.differ} differ" in report.in_words()


def test_replay_refuses_another_teacher_and_a_dataset_that_nobody_wrote(world: World) -> None:
    folder = finish(plan(world, "own"))
    with pytest.raises(DatasetError, match=r"gpt2 is not the teacher that wrote this dataset: teacher\.weights_sha256: "):
        replay(folder, model=str(world.root / "gpt2"))
    assert world.run("extract", noise__extraction="none") == 0
    with pytest.raises(DatasetError, match="has extraction none: there is no generation to replay"):
        replay(world.output)


def swapped(rows: Rows) -> Rows:
    return replace(rows, sequence_id=rows.sequence_id[::-1].copy())


def softened(rows: Rows) -> Rows:
    return replace(rows, log_prob=rows.log_prob * np.float32(0.6))


def holed(rows: Rows) -> Rows:
    log_prob = rows.log_prob.copy()
    log_prob[2, 5] = 0
    return replace(rows, log_prob=log_prob)


def cut(rows: Rows) -> Rows:
    inside = np.arange(BLOCK) < 9
    return replace(rows, length=np.minimum(rows.length, 9), input_ids=rows.input_ids * inside, log_prob=rows.log_prob * inside)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (swapped, "a token that its noise and its log_prob do not choose"),
        (softened, "tokens, log_prob and noise do not belong together: E/p of the written tokens is 0"),
        (holed, "row 2: log_prob is 0 in the midst of what the teacher wrote"),
        (cut, "the row does not fill its block"),
    ],
)
def test_verify_needs_no_teacher_to_see_that_noise_and_text_do_not_belong_together(world: World, damage: Any, message: str) -> None:
    job = plan(world, f"damage-{damage.__name__}", stop="never", rows=60, shard_rows=60)
    verify(finish(job))
    forge(job, 0, damage(rows_of(job.folder)))
    with pytest.raises(DatasetError, match=message):
        verify(job.folder)


def test_rows_that_end_at_eos_are_verified_against_the_rule(world: World) -> None:
    job = plan(world, "rule", rows=60, shard_rows=60)
    with pytest.raises(DatasetError, match=r"is unfinished .* run `python -m pipeline generate` again"):
        verify(job.folder)
    rows = rows_of(finish(job))
    assert (rows.length < BLOCK).any(), "the teacher ends some rows"
    verify(job.folder)
    forge(job, 0, cut(rows))
    with pytest.raises(DatasetError, match="is shorter than its block and does not end in EOS"):
        verify(job.folder)
