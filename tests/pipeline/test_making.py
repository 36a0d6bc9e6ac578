"""One shard while it is made: rows that cannot be encoded, and micro-batches that do not fit. No Ray."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from noise.commit import commit_shard
from noise.dataset import Manifest, open_shard
from noise.receipt import Quarantined, committed
from noise.shard import Rows
from noise.storage import DatasetError, write_json
from pipeline.card import write_card
from pipeline.extract import Job
from pipeline.inspect import in_words
from pipeline.making import Making, RowError
from pipeline.plan import make_plan, settle_micro_batch, write_plan
from pipeline.teacher import Teacher
from pipeline.verify import verify
from pipeline.worker import Worker
from tests.pipeline import written
from tests.pipeline.world import World, save_teacher, texts


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A corpus with a letter in one place alone, and a teacher that has NaN for it, and its twin that has not."""
    made = World(tmp_path_factory.mktemp("making"))
    assert made.run("tokenizer") == 0
    (made.root / "zoo.txt").write_text("\n\n".join([*texts(8, 1), "A Zebra.", *texts(8, 2)]))
    save_teacher(made.root / "teacher")
    save_teacher(made.root / "poisoned", poison="Z", tokenizer=made.root / "tokenizer")
    return made


def job(world: World, name: str, **changes: Any) -> Job:
    """A dataset of one shard that is planned, with its teacher in this process."""
    settings = {"teacher.model": world.root / "poisoned", "corpus.files": world.root / "zoo.txt", "corpus.held_out": 0, "corpus.split": "all"}
    recipe = world.recipe(output=world.root / name, packing__shard_characters=10**6, **settings | changes)
    plan, corpus, tokenizer = make_plan(recipe)
    standing = write_plan(recipe, plan, tokenizer)
    return Job(Path(recipe.output), standing, corpus, tokenizer, Teacher(recipe.teacher, plan.identity["vocab_size"]))


def rows_of(made: Job) -> Rows:
    receipt = committed(made.folder)[0]
    return Rows.concatenate(list(open_shard(made.folder, receipt, made.plan.identity)))


def test_a_row_in_quarantine_is_left_out_and_every_other_row_keeps_its_bits(world: World) -> None:
    poisoned, healthy = job(world, "poisoned-data"), job(world, "healthy-data", teacher__model=world.root / "teacher")
    with pytest.raises(RowError, match=r"shard 0, row \d+, position \d+: the teacher's log-prob of the token is nan") as error:
        poisoned.extract(0)
    assert error.value.again and committed(poisoned.folder) == {}
    receipt, whole = poisoned.extract(0, Making(0, quarantine=True)), healthy.extract(0)
    (out,) = receipt.quarantined
    assert receipt.rows == whole.rows - 1 and receipt.tokens + out.tokens == whole.tokens and out.reason.startswith("position ")
    ours, theirs = rows_of(poisoned), rows_of(healthy)
    assert out.row not in (ours.sequence_id % 2**32) and len(ours) == receipt.rows
    kept = np.arange(len(theirs)) != out.row
    # the twin's seed differs, since its weights do: what the teacher says of the other rows is the same bit by bit
    assert np.array_equal(ours.log_prob, theirs.log_prob[kept]) and np.array_equal(ours.sequence_id, theirs.sequence_id[kept])


def test_what_is_in_quarantine_is_counted_in_receipt_manifest_card_and_verified(world: World) -> None:
    made = job(world, "recorded")
    receipt = made.extract(0, Making(0, quarantine=True))
    manifest = Manifest.write(made.folder, made.plan)
    assert verify(made.folder) == manifest == Manifest.read(made.folder) and manifest.receipts == [receipt]
    (out,) = receipt.quarantined
    assert manifest.totals["rows_quarantined"] == 1 and manifest.totals["tokens_quarantined"] == out.tokens
    write_card(made.folder, made.plan, manifest)
    line = f"shard 0, row {out.row}, {out.tokens} tokens: {out.reason}"
    assert line in (made.folder / "README.md").read_text() and line in in_words(made.folder)
    forged = replace(receipt, quarantined=(replace(out, row=0),))
    (made.folder / "shards" / "00000.json").unlink()
    (made.folder / "manifest.json").unlink()
    write_json(made.folder / "shards" / "00000.json", forged.to_json())
    Manifest.write(made.folder, made.plan)
    with pytest.raises(DatasetError, match="row 0 is there, but its receipt says that it was left out"):
        verify(made.folder)


def test_a_shard_without_quarantine_has_no_word_of_it_in_its_receipt(world: World) -> None:
    made = job(world, "plain", teacher__model=world.root / "teacher")
    receipt = made.extract(0, Making(0, quarantine=True))
    assert receipt.quarantined == () and "quarantined" not in (made.folder / "shards" / "00000.json").read_text()
    assert "rows_quarantined" not in Manifest.write(made.folder, made.plan).totals


def test_token_ids_that_the_teacher_does_not_have_can_be_left_out(world: World) -> None:
    save_teacher(world.root / "narrow", vocab_size=300)
    documents = [[7] * 30 if at != 4 else [7] * 20 + [310] * 3 for at in range(20)]
    (world.root / "ids.jsonl").write_text("\n".join(json.dumps({"ids": ids}) for ids in documents))
    made = job(world, "narrow-data", teacher__model=world.root / "narrow", corpus__files=world.root / "ids.jsonl", corpus__ids_field="ids")
    with pytest.raises(RowError, match="token id 310 is not below the teacher's width 300") as error:
        made.extract(0)
    assert not error.value.again  # no other machine would do better
    receipt = made.extract(0, Making(0, quarantine=True))
    assert len(receipt.quarantined) in (1, 2) and all("token id 310" in out.reason for out in receipt.quarantined)
    assert receipt.tokens + receipt.tokens_quarantined == sum(map(len, documents)) + 20  # and an EOS each


def test_a_teacher_that_fails_at_half_of_a_shard_is_not_taken_for_bad_data(world: World) -> None:
    save_teacher(world.root / "broken", poison=" river", tokenizer=world.root / "tokenizer")
    made = job(world, "broken-data", teacher__model=world.root / "broken")
    with pytest.raises(RowError, match="rows fail, which is the teacher or the machine and not the data: not quarantined"):
        made.extract(0, Making(0, quarantine=True))
    assert committed(made.folder) == {}


def test_a_prompt_that_leaves_no_room_can_be_left_out(tmp_path: Path) -> None:
    world = written.make_world(tmp_path)
    made = written.from_prompts(world, "cramped", block_length=6, prompt_tokens=None)
    with pytest.raises(RowError, match="leaves no room to write") as error:
        made.extract(0)
    assert not error.value.again
    receipt = made.extract(0, Making(0, quarantine=True))
    assert receipt.quarantined and all("leaves no room" in out.reason for out in receipt.quarantined)
    assert receipt.rows + len(receipt.quarantined) == made.plan.shards[0]["rows"]


class Cramped:
    """A teacher in whose memory `rows` fit at once."""

    def __init__(self, teacher: Any, rows: int, error: Callable[[], BaseException]):
        self.teacher, self.rows, self.error = teacher, rows, error
        self.tried: list[int] = []

    def scores(self, input_ids_BL: Tensor, at_N: Tensor) -> Iterator[tuple[slice, Tensor]]:
        self.tried.append(len(input_ids_BL))
        if len(input_ids_BL) > self.rows:
            raise self.error()
        yield from self.teacher.scores(input_ids_BL, at_N)


ERRORS: list[Callable[[], BaseException]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    MemoryError,
]


@pytest.mark.parametrize("error", ERRORS, ids=["gpu", "cpu", "python"])
def test_a_micro_batch_that_does_not_fit_goes_in_halves_and_says_so(world: World, error: Callable[[], BaseException]) -> None:
    name = f"cramped-{type(error()).__name__}"
    made = job(world, name, teacher__model=world.root / "teacher", teacher__micro_batch=16)
    cramped = Cramped(made.teacher, 5, error)
    making = Making(0)
    receipt = replace(made, teacher=cramped).extract(0, making)
    assert making.micro_batch == 4 and cramped.tried[:6] == [16, 8, 4, 4, 4, 4]
    assert receipt.rows > 16 and cramped.tried.count(16) == 1  # once a shard
    whole = job(world, f"{name}-whole", teacher__model=world.root / "teacher", teacher__micro_batch=16)
    making = Making(0)
    whole.extract(0, making)
    assert making.micro_batch is None
    assert np.allclose(rows_of(made).log_prob, rows_of(whole).log_prob, atol=1e-5)


def test_a_poisoned_row_is_named_right_in_halves_too(world: World) -> None:
    whole = job(world, "whole-poison", teacher__micro_batch=16)
    made = replace(job(world, "halved-poison", teacher__micro_batch=16), teacher=Cramped(whole.teacher, 3, MemoryError))
    assert made.extract(0, Making(0, True)).quarantined == whole.extract(0, Making(0, True)).quarantined != ()


def test_not_even_one_row_that_fits_is_an_error_with_a_way_out(world: World) -> None:
    made = job(world, "tiny", teacher__model=world.root / "teacher")
    with pytest.raises(MemoryError, match=r"shard 0: not even one row of 24 positions fits .*\(teacher\.device_map\)"):
        replace(made, teacher=Cramped(made.teacher, 0, MemoryError)).extract(0)


def test_another_error_is_not_taken_for_short_memory(world: World) -> None:
    made = job(world, "other", teacher__model=world.root / "teacher")
    with pytest.raises(RuntimeError, match="something else"):
        replace(made, teacher=Cramped(made.teacher, 0, lambda: RuntimeError("something else"))).extract(0)


def test_the_largest_micro_batch_that_fits_is_a_power_of_two_and_is_settled_once(world: World) -> None:
    made = job(world, "auto", teacher__model=world.root / "teacher", teacher__micro_batch="auto")
    assert made.plan.environment["numerics"]["micro_batch"] == "auto"
    assert replace(made, teacher=Cramped(made.teacher, 50, MemoryError)).largest_micro_batch() == 32
    assert settle_micro_batch(made.folder, 32) == 32 and settle_micro_batch(made.folder, 8) == 32
    again = job(world, "auto", teacher__model=world.root / "teacher", teacher__micro_batch="auto")
    assert again.plan.environment["numerics"]["micro_batch"] == 32 and again.plan.identity == made.plan.identity
    with pytest.raises(DatasetError, match=r"teacher\.micro_batch: 16 here, 32 there"):
        job(world, "auto", teacher__model=world.root / "teacher", teacher__micro_batch=16)
    assert again.extract(0).rows > 0


def test_a_worker_says_where_the_time_went_and_what_failed_how(world: World) -> None:
    made = job(world, "worker")
    worker = Worker(
        world.recipe(output=made.folder, teacher__model=world.root / "poisoned", corpus__files=world.root / "zoo.txt", corpus__split="all"),
        made.corpus.roots,
    )
    assert not worker.load().failure and worker.largest_micro_batch().micro_batch == 128
    failed = worker.extract(0)
    assert failed.row and failed.again and not failed.fatal and "row" in failed.failure
    outcome = worker.extract(0, quarantine=True)
    assert outcome.receipt is not None and len(outcome.receipt.quarantined) == 1
    assert 0 < outcome.teacher_seconds <= outcome.seconds and outcome.beside_seconds >= 0 and outcome.micro_batch is None


def test_a_receipt_with_a_broken_quarantine_is_named(tmp_path: Path, world: World) -> None:
    made = job(world, "mangled", teacher__model=world.root / "teacher")
    receipt = commit_shard(made.folder, made.plan.metadata(0), [], 0, quarantined=[Quarantined(3, 20, "position 1: x")])
    path = made.folder / "shards" / "00000.json"
    assert committed(made.folder)[0] == receipt
    path.write_text(path.read_text().replace('"row": 3', '"row": "3"'))
    with pytest.raises(DatasetError, match=r"00000\.json: a quarantined row: field row is '3', expected int"):
        committed(made.folder)
