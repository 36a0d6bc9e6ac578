"""A dataset whose corpus grew: what was there stays, only what is new is made, and every part keeps its identity."""

import json
import shutil
from pathlib import Path

import pytest

from noise.dataset import Manifest, Plan, open_shard
from noise.identity import identity_hash
from noise.lineage import parts
from noise.receipt import committed
from noise.storage import DatasetError
from pipeline.__main__ import main
from pipeline.inspect import in_words, summary
from pipeline.verify import verify
from pipeline.worker import Worker
from tests.pipeline.world import World, save_teacher, texts


@pytest.fixture
def world(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> World:
    """A finished dataset of tokens."""
    made = World(tmp_path, capsys)
    assert made.run("tokenizer") == 0 and made.run("extract", noise__extraction="none") == 0
    return made


def add(world: World, name: str, seed: int, count: int = 12) -> None:
    """A file that sorts before the others."""
    lines = (json.dumps({"text": text}) for text in texts(count, seed))
    (world.root / "corpus" / f"{name}.jsonl").write_text("\n".join(lines))


def extract(world: World, command: str = "extract") -> int:
    return world.run(command, noise__extraction="none", corpus__files=world.root / "corpus" / "*")


def rows_of(world: World) -> list[list[int]]:
    manifest = Manifest.read(world.output)
    return [row.tolist() for receipt in manifest.receipts for rows in manifest.open(world.output, receipt) for row in rows.input_ids]


def test_a_grown_dataset_keeps_every_shard_and_makes_only_new_ones(world: World) -> None:
    before, old = world.hashes(), Manifest.read(world.output)
    add(world, "00-more", 1)
    assert extract(world, "plan") == 0
    assert Manifest.read(world.output) == old and not summary(world.output)["finished"]
    with pytest.raises(DatasetError, match="is being grown"):
        verify(world.output)
    assert extract(world) == 0
    add(world, "00-and-more", 2)
    assert extract(world, "plan") == 0 and extract(world) == 0
    manifest = verify(world.output)
    assert before.items() < world.hashes().items()
    assert [len(part["corpus"]["files"]) for part in parts(manifest.identity)] == [40, 1, 1]
    assert parts(manifest.identity)[0] == old.identity and manifest.receipts[: len(old.receipts)] == old.receipts
    assert {part["seed"] for part in parts(manifest.identity)} == {old.identity["seed"]} == {manifest.identity["seed"]}
    assert manifest.root_hash != old.root_hash and summary(world.output)["finished"]
    assert "grown 2 times" in in_words(world.output)
    of_shard = [open_shard(world.output, receipt, manifest.identity).metadata for receipt in manifest.receipts]
    assert [metadata.shard for metadata in of_shard] == list(range(len(manifest.receipts)))
    assert [metadata.identity_hash for metadata in of_shard[: len(old.receipts)]] == [identity_hash(old.identity)] * len(old.receipts)
    ids = [int(row) for receipt in manifest.receipts for rows in manifest.open(world.output, receipt) for row in rows.sequence_id]
    assert len(set(ids)) == len(ids)


def test_growing_adds_the_rows_that_the_new_files_have_alone(world: World) -> None:
    old = rows_of(world)
    add(world, "00-more", 1)
    assert extract(world, "plan") == 0 and extract(world) == 0
    alone = World(world.root)
    alone.output = world.root / "alone"
    assert alone.run("extract", noise__extraction="none", corpus__files=world.root / "corpus" / "00-more.jsonl") == 0
    assert rows_of(world) == old + rows_of(alone)


def test_growing_is_the_same_whatever_was_extracted_before_it(world: World) -> None:
    other = World(world.root)
    other.output = world.root / "other"
    assert other.run("plan", noise__extraction="none") == 0
    add(world, "zz-more", 1)
    for grown in (world, other):
        assert extract(grown, "plan") == 0 and extract(grown) == 0
    assert other.hashes() == world.hashes() and (other.output / "manifest.json").read_bytes() == (world.output / "manifest.json").read_bytes()


def test_extract_does_not_grow_a_dataset_by_itself(world: World) -> None:
    add(world, "zz-more", 1)
    code, line = world.refusal("extract", noise__extraction="none", corpus__files=world.root / "corpus" / "*")
    assert code == 2 and "1 files are new to the plan" in line and "run `python -m pipeline plan` first" in line
    assert world.run("extract", noise__extraction="none") == 0  # without them it is what it was


def test_a_file_that_is_gone_or_changed_is_named_and_other_settings_are_refused(world: World) -> None:
    add(world, "zz-more", 1)
    (world.root / "corpus" / "005.txt").write_text("changed")
    for command in ("plan", "extract"):
        _, line = world.refusal(command, noise__extraction="none", corpus__files=world.root / "corpus" / "*")
        assert "005.txt has 7 bytes, the plan saw" in line
    (world.root / "corpus" / "005.txt").unlink()
    _, line = world.refusal("plan", noise__extraction="none", corpus__files=world.root / "corpus" / "*")
    assert "005.txt is not among corpus.files any more" in line
    _, line = world.refusal("plan", noise__extraction="none", noise__draws=2)
    assert "draws: 2 here, 1 there" in line


def test_a_corpus_that_moved_is_the_same_corpus(world: World) -> None:
    shutil.move(world.root / "corpus", world.root / "elsewhere")
    for receipt in list((world.output / "shards").glob("*.json"))[:4]:
        receipt.unlink()
    assert world.run("extract", noise__extraction="none", corpus__files=world.root / "elsewhere" / "*.txt") == 0
    assert main(["verify", str(world.output)]) == 0


def test_an_edit_that_keeps_the_size_is_found_when_the_shard_is_made(world: World) -> None:
    undisturbed = world.output
    world.output = world.root / "edited"
    assert world.run("plan", noise__extraction="none") == 0
    path = world.root / "corpus" / "003.txt"
    text = path.read_text()
    path.write_text(text.replace("Document", "document"))
    code, line = world.refusal("extract", noise__extraction="none")
    assert code != 0 and "003.txt was changed since; restore it" in line
    path.write_text(text)
    assert world.run("extract", noise__extraction="none") == 0
    assert (world.output / "manifest.json").read_bytes() == (undisturbed / "manifest.json").read_bytes()


def test_a_plan_that_stands_is_found_without_reading_the_corpus(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline import formats

    def never(location: str) -> None:
        raise AssertionError(f"{location} was opened")

    monkeypatch.setattr(formats, "open_file", never)
    assert world.run("extract", noise__extraction="none") == 0
    assert len(committed(world.output)) == len(Plan.read(world.output).shards)


def test_workers_make_the_shards_of_old_and_new_files(world: World) -> None:
    save_teacher(world.root / "teacher")
    world.output = world.root / "parallel"
    changes = {"teacher__model": world.root / "teacher", "corpus__files": world.root / "corpus" / "*"}
    assert world.run("plan", **changes) == 0
    elsewhere = world.root / "far" / "away"
    elsewhere.mkdir(parents=True)
    (elsewhere / "more.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts(9, 1)))
    files = f'["{world.root}/corpus/*", "{elsewhere}/*"]'
    assert world.run("plan", **changes | {"corpus__files": files}) == 0
    recipe = world.recipe(**changes | {"corpus__files": files})
    plan = Plan.read(world.output)
    worker = Worker(recipe, plan.environment["corpus_roots"])
    assert not worker.load().failure
    outcomes = [worker.extract(shard) for shard in range(len(plan.shards))]
    assert not any(outcome.failure for outcome in outcomes)
    manifest = Manifest.write(world.output, plan)
    assert verify(world.output) == manifest and manifest.totals["tokens"] > 0 and len(parts(manifest.identity)) == 2


def test_a_corpus_of_token_ids_becomes_rows_of_them(world: World) -> None:
    documents = [[number % 200 + 5] * (number % 7 + 1) for number in range(40)]
    (world.root / "ids.jsonl").write_text("\n".join(json.dumps({"ids": ids}) for ids in documents))
    world.output = world.root / "ids"
    changes = {"corpus.files": world.root / "ids.jsonl", "corpus.ids_field": "ids", "corpus.split": "all", "noise.extraction": "none"}
    assert world.run("extract", **changes) == 0
    manifest = verify(world.output)
    eos = manifest.identity["tokenizer"]["eos"]
    of_shards = [rows for receipt in manifest.receipts for rows in manifest.open(world.output, receipt)]
    stream = [int(token) for rows in of_shards for row, length in zip(rows.input_ids, rows.length, strict=True) for token in row[1:length]]
    assert stream == [token for ids in documents for token in [*ids, eos]]
    assert manifest.totals["characters_in"] == 0 and manifest.identity["corpus"]["ids_field"] == "ids"
    (world.root / "ids.jsonl").write_text(json.dumps({"ids": [1, 9999]}))
    world.output = world.root / "wide"
    _, line = world.refusal("extract", **changes)
    assert "token id 9999 is not below" in line
