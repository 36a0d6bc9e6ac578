"""Extraction on real Ray processes: the number of workers, killed workers and killed drivers change no byte."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from noise.dataset import Manifest, Plan
from noise.receipt import committed
from noise.sketch import Codec
from pipeline.__main__ import main
from pipeline.verify import verify
from tests.pipeline.driver import driver
from tests.pipeline.world import World, save_teacher, shard_hashes, texts, write_corpus


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = World(tmp_path_factory.mktemp("ray"))
    assert made.run("tokenizer") == 0
    save_teacher(made.root / "teacher")
    return made


def options(world: World, name: str, **changes: object) -> list[str]:
    return world.options(output=world.root / name, packing__shard_characters=200, **({"teacher.model": world.root / "teacher"} | changes))


@pytest.fixture(scope="module")
def undisturbed(world: World) -> Path:
    """The dataset as one worker makes it."""
    assert main(["extract", *options(world, "undisturbed", ray__workers=1)]) == 0
    return world.root / "undisturbed"


def test_killed_worker_and_killed_driver_change_no_byte_and_two_workers_make_what_one_makes(world: World, undisturbed: Path) -> None:
    dataset, arguments = world.root / "disturbed", options(world, "disturbed", ray__workers=2)
    with driver(dataset, ["extract", *arguments]) as running:
        os.kill(running.next("shard")["pid"], signal.SIGKILL)
        assert running.next("worker died")["times"] == 1
        running.next("shard")
        running.process.kill()
        running.process.wait()
    before = {name: digest for name, digest in shard_hashes(dataset).items() if name.endswith(".json")}
    shards = len(Manifest.read(undisturbed).receipts)
    assert 0 < len(before) < shards and not (dataset / "manifest.json").exists()
    assert main(["extract", *arguments]) == 0
    assert before.items() <= shard_hashes(dataset).items()
    assert shard_hashes(dataset) == shard_hashes(undisturbed)
    assert (dataset / "manifest.json").read_bytes() == (undisturbed / "manifest.json").read_bytes()
    verify(dataset)


def test_a_finished_dataset_stays_within_the_theorem_and_needs_no_ray_again(
    world: World, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = Manifest.read(undisturbed)
    codec = Codec(manifest.identity["vocab_size"], manifest.identity["epsilon"], manifest.identity["draws"])
    assert 0 < manifest.totals["kept"] <= 1.05 * manifest.totals["tokens"] * codec.expected_kept_bound
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["extract", *options(world, "undisturbed", ray__workers=1)]) == 0
    assert "is complete" in capsys.readouterr().err


def test_a_shard_that_fails_by_its_data_is_retried_reported_and_at_last_made_without_its_bad_row(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write_corpus(world.root / "zoo", 12)
    (world.root / "zoo" / "007.txt").write_text("Zebra. " + texts(1, 7)[0])  # the one document with this letter
    save_teacher(world.root / "poisoned", poison="Z", tokenizer=world.root / "tokenizer")
    dataset = world.root / "partly"
    changes = {"teacher__model": world.root / "poisoned", "corpus__files": files, "corpus__held_out": 0, "ray__workers": 1, "ray__retries": 1}
    arguments = options(world, "partly", **changes)
    assert main(["extract", *arguments]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    shards, done = len(Plan.read(dataset).shards), committed(dataset)
    (absent,) = set(range(shards)) - set(done)
    assert f"1 of {shards} shards failed, everything else is committed; first: shard {absent}, row " in error
    assert "(NaN or infinite logits)" in error and not (dataset / "manifest.json").exists()
    assert [event["shard"] for event in events(dataset, "shard retried")] == [absent]
    assert main(["extract", *arguments, "--quarantine"]) == 0
    manifest = verify(dataset)
    assert {shard for shard, receipt in committed(dataset).items() if receipt.quarantined} == {absent} and done.items() <= committed(dataset).items()
    assert manifest.totals["rows_quarantined"] == 1 and "1 more quarantined" in capsys.readouterr().err
    assert main(["extract", *arguments]) == 0  # it is whole, as it is
    assert {event["shard"] for event in events(dataset, "shard")} == set(range(shards))


def events(dataset: Path, kind: str) -> list[dict[str, Any]]:
    return [event for line in (dataset / "run.jsonl").read_text().splitlines() if (event := json.loads(line))["event"] == kind]


def test_the_first_worker_finds_the_micro_batch_that_the_plan_leaves_open(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = options(world, "auto", teacher__micro_batch="auto", ray__workers=2, ray__pinned="true")
    assert main(["extract", *arguments]) == 0
    assert "micro-batches of 128 rows" in capsys.readouterr().err
    assert Plan.read(world.root / "auto").environment["numerics"]["micro_batch"] == 128
    made = events(world.root / "auto", "shard")
    assert made and all(event["seconds"] >= event["teacher_seconds"] > 0 and event["micro_batch"] is None for event in made)
    verify(world.root / "auto")


def test_a_local_ray_that_does_not_start_at_once_is_started_again_and_one_that_never_does_is_one_line(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    attempts: list[str] = []

    def never(**options: object) -> None:
        attempts.append(str(options["address"]))
        raise RuntimeError("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", never)
    assert main(["extract", *options(world, "no-ray")]) == 1
    assert attempts == ["local"] * 3
    assert "does not answer after 3 attempts: The current node timed out during startup." in capsys.readouterr().err.splitlines()[-1]
    assert main(["extract", *options(world, "no-ray", ray__address="auto")]) == 1
    assert attempts == ["local"] * 3 + ["auto"]
