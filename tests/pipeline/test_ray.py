"""Extraction on real Ray processes: the number of workers, killed workers and killed drivers change no byte."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from noise.dataset import Manifest, committed
from noise.sketch import Codec
from pipeline.__main__ import main
from pipeline.verify import verify
from tests.pipeline.driver import driver
from tests.pipeline.world import World, save_teacher, shard_hashes, write_corpus


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


def test_shards_that_fail_by_their_data_are_reported_and_everything_else_is_committed(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    files = write_corpus(world.root / "zoo", 12)
    (world.root / "zoo" / "007.txt").write_text("Zebra " * 60)  # the one document with this letter
    save_teacher(world.root / "poisoned", poison="Z", tokenizer=world.root / "tokenizer")
    arguments = options(world, "partly", teacher__model=world.root / "poisoned", corpus__files=files, corpus__held_out=0, ray__workers=1)
    assert main(["extract", *arguments]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    plan = json.loads((world.root / "partly" / "plan.json").read_text())
    done = committed(world.root / "partly")
    assert len(done) == len(plan["shards"]) - 1 and not (world.root / "partly" / "manifest.json").exists()
    (absent,) = set(range(len(plan["shards"]))) - set(done)
    assert f"1 of {len(plan['shards'])} shards failed, everything else is committed; first: shard {absent}, row " in error
    assert "(NaN or infinite logits)" in error


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
