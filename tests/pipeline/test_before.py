"""Before a week is spent: dry runs, pilots, and how far a dataset is. No Ray."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from noise.dataset import Manifest, Plan, open_shard
from noise.folder import Folder
from pipeline import estimate, stages
from pipeline.__main__ import main
from pipeline.extract import Job
from pipeline.pilot import Report, run
from pipeline.progress import Progress
from pipeline.run_log import RunLog
from pipeline.status import Status, in_words
from pipeline.teacher import Teacher
from tests.pipeline import written
from tests.pipeline.world import World, save_teacher


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = written.make_world(tmp_path_factory.mktemp("before"))
    save_teacher(made.root / "teacher")
    return made


def test_a_dry_run_writes_nothing_and_its_estimate_is_close(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = world.root / "dry"
    arguments = world.options(output=dataset, noise__extraction="none")
    for command in ("plan", "extract"):
        assert main([command, *arguments, "--dry-run"]) == 0
        assert "nothing was written" in capsys.readouterr().out and not dataset.exists()
    job = stages.find_job(world.recipe(output=dataset, noise__extraction="none"), grow=False, write=False)
    expected = estimate.of_job(job)
    assert main(["extract", *arguments]) == 0
    manifest = Manifest.read(dataset)
    assert stages.count_tokens(dataset, manifest) == pytest.approx(expected.tokens, rel=0.02)  # eight of its nine shards are the sample
    assert expected.rows == pytest.approx(manifest.totals["rows"], rel=0.05)
    capsys.readouterr()
    assert main(["extract", *arguments, "--dry-run"]) == 0
    shards = len(manifest.receipts)
    assert f"{shards} shards, {shards} of them committed" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["plan", "extract"])
def test_a_dry_run_is_refused_where_the_run_would_be(world: World, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = world.root / f"theirs-{command}"
    (theirs / "shards").mkdir(parents=True)
    (theirs / "shards" / "holiday.jpg").write_text("mine")
    assert main([command, *world.options(output=theirs, noise__extraction="none"), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert "holiday.jpg would be replaced by a dataset's own" in error and error.count("\n") == 1
    assert [path.name for path in theirs.rglob("*")] == ["shards", "holiday.jpg"]


def test_a_dry_run_of_a_grown_corpus_leaves_the_plan_alone(world: World) -> None:
    dataset = world.root / "dry-grown"
    arguments = world.options(output=dataset, noise__extraction="none")
    assert main(["plan", *arguments]) == 0
    before = (dataset / "plan.json").read_bytes()
    (world.root / "corpus" / "zz.jsonl").write_text(json.dumps({"text": "More of it. " * 30}))
    grown = world.options(output=dataset, noise__extraction="none", corpus__files=world.root / "corpus" / "*")
    assert main(["plan", *grown, "--dry-run"]) == 0
    assert (dataset / "plan.json").read_bytes() == before
    (world.root / "corpus" / "zz.jsonl").unlink()


def test_the_estimated_bytes_are_the_formats(world: World) -> None:
    """At the entries that are really kept, for a dataset that a teacher made."""
    job = pilot_job(world, "bytes")
    receipts = [job.extract(shard) for shard in range(len(job.plan.shards))]
    manifest = Manifest.write(job.folder, job.plan)
    totals = manifest.totals
    said = estimate.of_job(job, totals["kept"] / totals["tokens"])
    headers = 4096 * len(receipts)
    assert 0 < totals["bytes"] - said.bytes < headers and said.tokens == pytest.approx(totals["tokens"], rel=0.01)
    assert estimate.of_job(job).bytes > said.bytes  # the bound


def pilot_job(world: World, name: str, **changes: object) -> Job:
    recipe = world.recipe(output=world.root / name, teacher__model=world.root / "teacher", **changes)
    job = stages.find_job(recipe, grow=True)
    return replace(job, teacher=Teacher(recipe.teacher, job.plan.identity["vocab_size"]))


def piloted(world: World, name: str, rows: int, **changes: object) -> Report:
    recipe = world.recipe(output=world.root / name, **changes)
    return run(recipe, stages.find_job(recipe, grow=True, write=False), rows)


def own_text(world: World) -> Path:
    """Rows that the teacher of `written` wrote, as a corpus of token ids."""
    job = written.plan(world, "own-text", rows=240, shard_rows=120, stop="never")
    rows = written.rows_of(written.finish(job))
    path = world.root / "own.jsonl"
    path.write_text("\n".join(json.dumps({"text": "", "ids": row[1:].tolist()}) for row in rows.input_ids))
    return path


def test_a_pilot_finds_that_a_teacher_fits_its_own_text_and_not_another(world: World) -> None:
    # each document is a row of the teacher's own: BOS, its tokens, and no EOS behind them
    layout = {"packing.policy": "pad", "packing.long_documents": "cut", "packing.block_length": written.BLOCK, "corpus.split": "all"}
    own = {"corpus.files": own_text(world), "corpus.ids_field": "ids", "corpus.held_out": 0, **layout}
    fits = piloted(world, "fits", 200, teacher__model=world.root / "llama", **own)
    assert 180 <= fits.rows <= 200 and fits.tokens == fits.rows * (written.BLOCK - 1)
    assert abs(fits.difference) < 3 * fits.standard_error < 0.3 and fits.difference == pytest.approx(fits.nll - fits.entropy)
    other = piloted(world, "other", 200, teacher__model=world.root / "gpt2", **own)
    assert other.difference > 10 * other.standard_error > 0
    assert "surprises the teacher" in other.fit() and not other.failures


def test_what_the_difference_says() -> None:
    def said(difference: float) -> str:
        whole = estimate.Estimate(1, 1, 1, 0.0)
        return Report(1, 1, [], "the CPU", 1, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0, difference, 0.01, whole).fit()

    assert "looks like the teacher's own samples" in said(0.015) and "looks like" in said(-0.015)
    assert "surprises the teacher by 0.300 nats" in said(0.3) and "0.300 nats a token easier" in said(-0.3)


def test_the_entropy_of_a_pilot_is_the_teachers(world: World) -> None:
    report = piloted(world, "entropy", 10**6, teacher__model=world.root / "teacher", teacher__temperature=0.8, teacher__micro_batch="auto")
    job = pilot_job(world, "entropy-job", teacher__temperature=0.8)
    total, nll, count = 0.0, 0.0, 0
    for shard in range(len(job.plan.shards)):
        receipt = job.extract(shard)
        for rows in open_shard(job.folder, receipt, job.plan.identity):
            for row, length in zip(rows.input_ids, rows.length, strict=True):
                ids_BL = torch.from_numpy(row.astype("int64"))[None]
                ((_, log_probs_NV),) = list(job.teacher.log_probs(ids_BL, torch.arange(int(length) - 1)))  # type: ignore[union-attr]
                total -= float((log_probs_NV.exp() * log_probs_NV).sum())
        nll, count = nll + receipt.nll_sum, count + receipt.tokens
    assert report.tokens == count == pytest.approx(report.whole.tokens, rel=0.02) and report.micro_batch == 128
    assert report.entropy == pytest.approx(total / count, rel=1e-4) and report.nll == pytest.approx(nll / count, rel=1e-4)
    assert report.kept_a_token <= report.kept_bound and report.hours > 0


def test_a_pilot_prints_and_leaves_only_the_plan(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = world.root / "piloted"
    assert main(["plan", *world.options(output=dataset, teacher__model=world.root / "teacher"), "--pilot", "20"]) == 0
    out = capsys.readouterr().out
    assert "pilot: 20 rows" in out and "tokens/s" in out and "standard error" in out
    assert (dataset / "plan.json").exists() and not (dataset / "shards").exists()
    assert main(["plan", *world.options(output=world.root / "piloted-dry", teacher__model=world.root / "teacher"), "--pilot", "20", "--dry-run"]) == 0
    assert not (world.root / "piloted-dry").exists()
    assert main(["plan", *world.options(output=world.root / "piloted-none", noise__extraction="none"), "--pilot", "20"]) == 2
    assert "there is no teacher to try" in capsys.readouterr().err


def test_a_pilot_says_which_micro_batches_it_could_not_encode(world: World) -> None:
    save_teacher(world.root / "poisoned", poison="Z", tokenizer=world.root / "tokenizer")
    (world.root / "corpus-z").mkdir()
    (world.root / "corpus-z" / "a.jsonl").write_text("\n".join(json.dumps({"text": f"{'Z' * (at == 3)} river {at}"}) for at in range(60)))
    files = {"corpus__files": world.root / "corpus-z" / "a.jsonl", "corpus__split": "all"}
    report = piloted(world, "poisoned-pilot", 100, teacher__model=world.root / "poisoned", **files)
    assert len(report.failures) == 1 and "NaN" in report.failures[0] and "failed  1 micro-batches" in report.in_words()


def test_status_reads_what_is_there_while_a_run_goes_on_elsewhere(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    job = pilot_job(world, "underway")
    shards = len(job.plan.shards)
    assert main(["status", str(job.folder)]) == 0
    assert f"0 of {shards} shards committed, {shards} left" in capsys.readouterr().out
    log = RunLog(job.folder)
    log.write("begin", shards=shards, pending=shards)
    receipts = [job.extract(shard) for shard in (0, 2, 3)]
    path = world.root / "underway" / "run.jsonl"
    events = [json.dumps({"event": "shard", "time": 100.0 + 10 * at, "receipt": receipt.to_json()}) for at, receipt in enumerate(receipts)]
    trouble = json.dumps({"event": "shard failed", "time": 130.0, "shard": 1, "reason": "shard 1, row 3: it is bad"})
    path.write_text(path.read_text() + "\n".join([*events, trouble, '{"event": "sha']))
    status = Status.read(Folder.of(job.folder))
    assert len(status.receipts) == 3 and 0 < status.work_done < status.work and not status.finished
    assert status.rate() == pytest.approx((receipts[1].tokens + receipts[2].tokens) / 20)
    words = in_words(job.folder)
    assert f"3 of {shards} shards committed, {shards - 3} left" in words
    assert "tokens/s now" in words and "to go" in words and "1 failed" in words and "row 3: it is bad" in words


def test_status_of_a_finished_dataset_and_of_none(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = world.root / "done"
    assert main(["extract", *world.options(output=dataset, noise__extraction="none")]) == 0
    capsys.readouterr()
    assert main(["status", str(dataset)]) == 0
    shards = len(Plan.read(dataset).shards)
    assert f"{shards} of {shards} shards committed, finished" in capsys.readouterr().out
    assert main(["status", str(world.root / "nothing")]) == 2
    assert "is not a noise dataset" in capsys.readouterr().err


def test_progress_shows_what_is_done_retried_and_left_and_both_rates(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from pipeline import progress as module

    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    with Progress("extract", "shards", total=10, work=100.0, done=2, done_work=20.0) as progress:
        assert progress.text() == "2/10 shards (8 left)"
        clock[0] = 1000.0
        progress.restart()  # loading the teacher is not part of any rate
        for _ in range(3):
            clock[0] += 100.0
            progress.advance(work=10.0, tokens=1000)
        assert progress.text() == "5/10 shards (5 left), 10 tokens/s, 10 overall, 8:20 to go"
        progress.restart()  # nor does a worker that is replaced begin another
        clock[0] += 50.0
        progress.retry(2)
        progress.advance(work=10.0, tokens=2000)
        assert progress.text() == "6/10 shards (2 retried, 4 left), 20 tokens/s, 14 overall, 5:50 to go"
        progress.warn("a micro-batch does not fit")
        progress.warn("a micro-batch does not fit")
    lines = capsys.readouterr().err.splitlines()
    assert lines.count("extract: a micro-batch does not fit") == 1 and lines[-1].startswith("extract: 6/10 shards")
