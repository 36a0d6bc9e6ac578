"""A dataset at s3://, from its plan to its card; and one driver at a time, wherever it is."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from noise.dataset import Manifest, Plan
from noise.folder import Folder
from noise.receipt import listed
from noise.storage import DatasetError
from pipeline import lease, stages
from pipeline.__main__ import main
from pipeline.config import WorkError
from pipeline.lease import Holder, Lease, driving
from pipeline.worker import Worker
from tests.noise.s3 import SECRET, Bucket
from tests.pipeline.world import World, environment, save_teacher


@pytest.fixture
def world(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> World:
    made = World(tmp_path, capsys)
    assert made.run("tokenizer") == 0
    return made


def local_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def comparable(files: dict[str, bytes]) -> dict[str, bytes]:
    """All but what says where and when, and the seal, which has the recipe's hash."""
    return {name: content for name, content in files.items() if name not in ("recipe.yaml", "run.jsonl", "seal.json")}


def tokens(world: World, command: str, output: object, **changes: object) -> int:
    return world.run(command, output=output, noise__extraction="none", **changes)


def test_extraction_to_a_store_makes_the_files_that_it_makes_here(world: World, bucket: Bucket, capsys: pytest.CaptureFixture[str]) -> None:
    there = bucket.uri("some/data")
    assert tokens(world, "extract", world.output) == 0 and tokens(world, "plan", there) == 0 and tokens(world, "extract", there) == 0
    assert comparable(bucket.under("some/data")) == comparable(local_files(world.output))
    events = [json.loads(line)["event"] for line in bucket.under("some/data")["run.jsonl"].splitlines()]
    assert events[0] == "begin" and events[-1] == "end" and "shard" in events
    assert not any(SECRET.encode() in content for content in bucket.objects.values())
    capsys.readouterr()
    assert main(["verify", there]) == 0 and main(["inspect", there]) == 0
    said = capsys.readouterr()
    assert "some/data" in said.err and "is whole" in said.err and "finished" in said.out
    puts = sum(request.startswith("PUT") for request in bucket.requests)
    assert tokens(world, "extract", there) == 0 and "is complete" in capsys.readouterr().err
    assert sum(request.startswith("PUT") for request in bucket.requests) == puts  # nor the recipe: the seal has its hash


def test_a_killed_driver_resumes_on_a_store_and_makes_only_what_is_missing(world: World, bucket: Bucket) -> None:
    there = bucket.uri("some/data")
    assert tokens(world, "extract", world.output) == 0
    stalled = bucket.fail("stall", "PUT", r"00003\.arrow", times=10**9)
    command = [sys.executable, "-m", "pipeline", "extract", *world.options(output=there, noise__extraction="none")]
    driver = subprocess.Popen(command, cwd=Path(__file__).parents[2], env=environment(), stderr=subprocess.DEVNULL)
    assert stalled.meeting.wait(300)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    bucket.faults.clear()
    assert listed(there) == {0, 1, 2} and "shards/00003.arrow" not in bucket.under("some/data")
    bucket.requests.clear()
    assert tokens(world, "extract", there) == 0
    made = {request.split("?")[0][-11:] for request in bucket.requests if request.startswith("PUT") and ".arrow" in request}
    assert made == {f"{shard:05d}.arrow" for shard in range(3, len(Manifest.read(there).receipts))}
    assert comparable(bucket.under("some/data")) == comparable(local_files(world.output))


def test_workers_read_plan_and_tokenizer_from_a_store_and_write_their_shards_there(world: World, bucket: Bucket) -> None:
    there, teacher = bucket.uri("some/data"), save_teacher(world.root / "teacher")
    outcomes = {}
    for where in (str(world.output), there):
        changes = {"output": where, "teacher__model": teacher}
        assert world.run("plan", **changes) == 0
        worker = Worker(world.recipe(**changes), Plan.read(where).environment["corpus_roots"])
        assert not worker.load().failure
        outcomes[where] = [worker.extract(shard).receipt for shard in range(3)]
    assert outcomes[there] == outcomes[str(world.output)] and None not in outcomes[there]
    shards = {name: content for name, content in local_files(world.output).items() if name.startswith("shards/")}
    assert {name: content for name, content in bucket.under("some/data").items() if name.startswith("shards/")} == shards
    bucket.fail(403, "PUT", r"00003\.arrow")
    refused = worker.extract(3)
    assert refused.fatal and "the store refuses it" in refused.failure


def test_a_store_that_cannot_be_used_gets_one_line_before_any_work(world: World, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    code, line = world.refusal("extract", output=bucket.uri("x", "elsewhere"), noise__extraction="none")
    assert code == 1 and "s3://elsewhere" in line and "there is no such bucket" in line
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    from noise import stores

    stores.client.cache_clear()
    code, line = world.refusal("extract", output=bucket.uri("x"), noise__extraction="none")
    assert code == 1 and "s3://bucket/x/plan.json: the store refuses it; set AWS_ACCESS_KEY_ID" in line
    code, line = world.refusal("extract", output="s3://me:secret@bucket/x", noise__extraction="none")
    assert code == 2 and "an address with credentials is refused" in line
    assert bucket.objects == {}


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    if request.param == "local":
        return Folder.of(tmp_path / "data")
    return Folder.of(request.getfixturevalue("bucket").uri("a/data"))


def elsewhere(now: float) -> Holder:
    """A driver on another machine."""
    return replace(Holder.here(now), id="other", host="far-away", machine="far-away", pid=77)


def put(folder: Folder, holder: Holder) -> None:
    folder.put_json(lease.NAME, holder.__dict__)


def test_a_second_driver_is_told_who_the_first_is_and_how_to_go_on(folder: Folder) -> None:
    first = Lease(folder, clock=lambda: 1000.0)
    with pytest.raises(WorkError, match=rf"data.* is being made by process {os.getpid()} on .*, which said so 30 s ago; stop it, or wait") as caught:
        Lease(folder, clock=lambda: 1030.0)
    assert "run again 150 s from now, or delete" in str(caught.value) and "driver.json and run again at once" in str(caught.value)
    first.release()
    assert not folder.exists(lease.NAME)
    Lease(folder).release()


def test_a_driver_that_died_here_is_replaced_at_once_and_one_elsewhere_after_its_time(folder: Folder) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)  # dead, and a zombie still
    put(folder, replace(Holder.here(1000.0), id="dead", pid=ended.pid))
    Lease(folder, clock=lambda: 1001.0).release()
    ended.wait()
    put(folder, replace(Holder.here(1000.0), id="dead", started="long ago"))  # its pid is another process's now
    Lease(folder, clock=lambda: 1001.0).release()
    put(folder, elsewhere(1000.0))
    with pytest.raises(WorkError, match="process 77 on far-away"):
        Lease(folder, clock=lambda: 1000.0 + lease.SECONDS - 1)
    Lease(folder, clock=lambda: 1000.0 + lease.SECONDS).release()
    folder.put(lease.NAME, b"{")
    with pytest.raises(DatasetError, match=r"driver\.json is not valid JSON"):
        Lease(folder)


def test_a_lease_is_renewed_until_another_driver_takes_it_and_is_not_removed_then(folder: Folder) -> None:
    times = iter([1000.0, 1000.0, 1020.0, 1030.0])
    held = Lease(folder, clock=lambda: next(times, 2000.0))
    held.beat()
    assert folder.json(lease.NAME)["time"] in (1000.0, 1020.0)
    put(folder, elsewhere(3000.0))
    with pytest.raises(WorkError, match="process 77 on far-away"):
        held.beat()
    held.release()
    assert held.lost and folder.json(lease.NAME)["id"] == "other"


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN], ids=["in the foreground", "in a shell's background"])
def interrupts(request: pytest.FixtureRequest) -> Iterator[None]:
    """What Ctrl-C does; a shell has the commands that it starts with & ignore it."""
    before = signal.signal(signal.SIGINT, request.param)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_a_driver_that_lost_its_lease_stops_with_the_same_message(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.01)
    before = signal.getsignal(lease.INTERRUPT)
    with pytest.raises(WorkError, match="process 77 on far-away"), driving(folder):
        for _ in range(300):  # work, until the beat that finds out; a beat at the same moment may have put the lease back
            put(folder, elsewhere(10.0**10))
            threading.Event().wait(0.1)
    assert folder.json(lease.NAME)["id"] == "other" and signal.getsignal(lease.INTERRUPT) == before


def test_two_drivers_of_one_dataset_the_second_stops_and_the_first_finishes(world: World, bucket: Bucket) -> None:
    there = bucket.uri("some/data")
    assert tokens(world, "plan", there) == 0
    with driving(Folder.of(there)):
        code, line = world.refusal("extract", output=there, noise__extraction="none")
        assert code == 1 and f"is being made by process {os.getpid()}" in line and listed(there) == set()
    assert tokens(world, "extract", there) == 0


def test_two_drivers_that_run_all_the_same_make_the_same_bytes(world: World, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second begins and ends while the first is about to commit a shard."""
    monkeypatch.setattr(lease.Lease, "_must_be_ours", lambda self: None)
    monkeypatch.setattr(lease.Holder, "is_alive", lambda self, now: False)
    assert tokens(world, "extract", world.output) == 0
    there, job_extract, others = bucket.uri("some/data"), stages.Job.extract, ["the second"]

    def extract(job: stages.Job, shard: int, making: stages.Making) -> object:
        if shard == 2 and others:
            others.pop()
            assert tokens(world, "extract", there) == 0
        return job_extract(job, shard, making)

    monkeypatch.setattr(stages.Job, "extract", extract)
    assert tokens(world, "extract", there) == 0
    assert others == [] and comparable(bucket.under("some/data")) == comparable(local_files(world.output))
