"""A dataset's folder on this machine and on a store: nothing is seen half-written, and of several writers one's work stays."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from noise import storage, stores
from noise.bucket import StoreFolder
from noise.commit import commit_shard
from noise.dataset import Manifest, Plan, open_shard
from noise.folder import Folder
from noise.local import LocalFolder
from noise.receipt import Receipt, committed, listed
from noise.sketch import Codec
from noise.storage import DatasetError, sha256_file
from noise.stores import StoreError
from tests.noise.s3 import Bucket
from tests.noise.teachers import BigramTeacher, identity_of, shard_rows, write_dataset

TEACHER, CODEC = BigramTeacher(40), Codec(40)
LARGE = 12 * 2**20
"""Bytes that are uploaded in two parts."""


@pytest.fixture(params=["local", "s3", "gs"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    if request.param == "local":
        return Folder.of(tmp_path / "data")
    return Folder.of(request.getfixturevalue({"s3": "bucket", "gs": "gs_bucket"}[request.param]).uri("a/data"))


@pytest.fixture
def remote(bucket: Bucket) -> Folder:
    return Folder.of(bucket.uri("a/data"))


def planned(where: Folder, shards: int = 2) -> Plan:
    plan = Plan(identity_of(CODEC, 12), {}, [{}] * shards)
    plan.write(where)
    return plan


def commit(where: Folder, plan: Plan, shard: int = 0, rows: int = 10) -> Receipt:
    return commit_shard(where, plan.metadata(shard), shard_rows(TEACHER, plan.metadata(shard), rows), characters_in=0)


def sha256_of(where: Folder, name: str) -> str:
    return hashlib.sha256(where.read(name)).hexdigest()


def test_all_kinds_of_folder_do_the_same(folder: Folder) -> None:
    assert not folder.exists("plan.json") and folder.sizes("shards") == {}
    folder.put("plan.json", b"one")
    folder.put("plan.json", b"two")
    assert folder.read("plan.json") == b"two" and folder.exists("plan.json")
    assert folder.put_new("shards/00000.json", b"first") and not folder.put_new("shards/00000.json", b"second!")
    for number in range(1, 8):
        folder.put(f"shards/{number:05d}.json", b"x" * number)
    assert folder.sizes("shards") == {"00000.json": 5} | {f"{number:05d}.json": number for number in range(1, 8)}
    assert folder.read_all(["shards/00000.json", "plan.json"]) == [b"first", b"two"]
    with folder.lock(), folder.draft("shards/00009.arrow") as draft:
        draft.write(b"drafted")
        assert "00009.arrow" not in folder.sizes("shards")
        folder.publish(draft, "shards/00009.arrow")
        assert folder.holds(draft, "shards/00009.arrow", sha256_of(folder, "shards/00009.arrow"))
    assert folder.map("shards/00009.arrow").read() == b"drafted"
    folder.put("tokenizer/vocab.json", b"{}")
    assert (folder.fetched("tokenizer") / "vocab.json").read_bytes() == b"{}"
    for _ in range(2):
        folder.remove("shards/00009.arrow")
    assert not folder.exists("shards/00009.arrow")
    for missing in (folder.read, folder.map):
        with pytest.raises(FileNotFoundError):
            missing("nothing")
    with pytest.raises(DatasetError, match=r"data/nothing\.json does not exist"):
        folder.json("nothing.json")
    assert str(pickle.loads(pickle.dumps(folder))) == str(folder)


@pytest.mark.parametrize("store", ["bucket", "gs_bucket"])
def test_a_dataset_on_a_store_has_the_bytes_of_one_on_this_machine(tmp_path: Path, request: pytest.FixtureRequest, store: str) -> None:
    bucket = request.getfixturevalue(store)
    remote = Folder.of(bucket.uri("a/data"))
    here, there = write_dataset(tmp_path, TEACHER, CODEC, [5, 70]), write_dataset(remote, TEACHER, CODEC, [5, 70])
    local = {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert here == there == Manifest.read(remote) and bucket.under("a/data") == local
    assert committed(remote) == committed(tmp_path) and listed(remote) == {0, 1}
    of_both = [
        [rows.input_ids.tolist() for receipt in there.receipts for rows in open_shard(where, receipt, there.identity)] for where in (tmp_path, remote)
    ]
    assert of_both[0] == of_both[1]


def test_what_is_done_is_told_by_listing_alone(bucket: Bucket, remote: Folder) -> None:
    plan = planned(remote, 12)
    for shard in range(12):
        commit(remote, plan, shard)
    bucket.requests.clear()
    assert listed(remote) == set(range(12))
    assert all("list-type=2" in request for request in bucket.requests)


def test_addresses_are_refused_where_they_hold_credentials_or_mean_nothing() -> None:
    for address, message in [
        ("s3://key:secret@bucket/x", "an address with credentials is refused"),
        ("s3://bucket/x?access_key=me&secret_key=it", "an address with credentials is refused"),
        ("s3://bucket/x?request_timeout=soon", "request_timeout is 'soon', expected seconds"),
        ("s3://bucket/x?region=here&scheme=ftp", "s3://bucket: Invalid S3 connection scheme 'ftp'"),
        ("gs://bucket/x?region=here", "there is no option 'region', only endpoint_override, scheme, anonymous"),
        ("gs://bucket/x?retry_limit_seconds=long", "retry_limit_seconds is 'long', expected seconds"),
        ("gs://bucket/x?retry_limit_seconds=inf", "retry_limit_seconds is 'inf', expected seconds"),
        ("gs://bucket/x?anonymous=yes", "anonymous is 'yes', expected true or false"),
        ("hf://me/x", "named hf://datasets/OWNER/NAME"),
    ]:
        with pytest.raises(DatasetError, match=message):
            Folder.of(address)
    assert isinstance(Folder.of("file:///some/where%20else"), LocalFolder) and str(Folder.of("file:///some/where%20else")) == "/some/where else"


@pytest.mark.parametrize("kind", [503, 500, "reset"])
@pytest.mark.parametrize("method", ["PUT", "GET"])
def test_errors_that_pass_are_waited_out(bucket: Bucket, remote: Folder, kind: str | int, method: str) -> None:
    content = os.urandom(LARGE)
    remote.put("large", content)
    fault = bucket.fail(kind, method, "large", times=2)
    if method == "PUT":
        remote.put("large", content)
    assert remote.read("large") == content and fault.met == 2


def test_answers_that_do_not_come_are_asked_for_again(bucket: Bucket, remote: Folder) -> None:
    remote.put("small", b"content")
    fault = bucket.fail("stall", "GET", "small")
    assert remote.read("small") == b"content" and fault.met == 1


def test_waiting_is_bounded_and_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)

    def fails() -> None:
        raise OSError("AWS Error SLOW_DOWN during PutObject operation")

    with pytest.raises(StoreError, match=f"s3://bucket/x: the store failed {stores.ATTEMPTS} times: AWS Error SLOW_DOWN"):
        stores.patiently(fails, "s3://bucket/x")
    assert len(waits) == stores.ATTEMPTS - 1 and all(2**at / 2 <= wait <= 2**at for at, wait in enumerate(waits))
    monkeypatch.setattr(stores.random, "uniform", lambda low, high: high)
    stores.pause(99)
    assert waits[-1] == 30


def test_an_upload_that_fails_for_good_is_never_seen(bucket: Bucket, remote: Folder) -> None:
    bucket.fail(503, "PUT", "partNumber=2", times=10**9)
    with pytest.raises(StoreError, match="s3://bucket/a/data/large: the store failed"):
        remote.put("large", bytes(LARGE))
    assert bucket.under("a/data") == {}


def test_a_shard_whose_upload_fails_is_uncommitted_and_made_again(bucket: Bucket, remote: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "ATTEMPTS", 1)
    plan = planned(remote)
    for method, name in [("PUT", r"00000\.arrow"), ("PUT", r"00000\.json")]:
        bucket.fail(503, method, name, times=3)  # as often as pyarrow's own client tries
        with pytest.raises(StoreError, match="s3://bucket/a/data/shards/00000"):
            commit(remote, plan)
        assert listed(remote) == set()
    receipt = commit(remote, plan)
    assert committed(remote) == {0: receipt} and sha256_of(remote, "shards/00000.arrow") == receipt.sha256


def test_an_uploader_that_is_killed_leaves_nothing_to_be_seen(bucket: Bucket, remote: Folder) -> None:
    fault = bucket.fail("stall", "PUT", "partNumber=2", times=10**9)
    script = f"from noise.folder import Folder; Folder.of({str(remote)!r}).put('large', bytes({LARGE}))"
    uploader = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[2])
    assert fault.meeting.wait(120)
    uploader.kill()
    uploader.wait()
    assert bucket.under("a/data") == {} and len(bucket.uploads) == 1


@pytest.mark.parametrize(
    ("operation", "where"),
    [
        (lambda there: there.exists("plan.json"), "a/data/plan.json"),
        (lambda there: there.put("plan.json", b""), "a/data/plan.json"),
        (lambda there: there.sizes("shards"), "a/data/shards"),
    ],
)
def test_missing_credentials_are_said_with_the_way_out(
    bucket: Bucket,
    monkeypatch: pytest.MonkeyPatch,
    operation: Callable[[Folder], object],
    where: str,
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StoreError, match=f"s3://bucket/{where}: the store refuses it; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        operation(Folder.of(bucket.uri("a/data")))


@pytest.mark.parametrize("store", ["bucket", "gs_bucket"])
def test_a_missing_bucket_is_said_when_it_is_first_asked(request: pytest.FixtureRequest, store: str) -> None:
    there = Folder.of(request.getfixturevalue(store).uri("a/data", "elsewhere"))
    for operation in (lambda: there.exists("plan.json"), lambda: there.put("plan.json", b"")):
        with pytest.raises(StoreError, match=r"(s3|gs)://elsewhere/.*: there is no such bucket; create it, or name another"):
            operation()


def test_a_full_disk_under_a_draft_leaves_the_store_as_it_was(bucket: Bucket, remote: Folder) -> None:
    plan = planned(remote)
    before = bucket.under("a/data")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            commit(remote, plan, rows=200)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert bucket.under("a/data") == before


class Writer:
    """tests.noise.rival, in a process of its own."""

    def __init__(self, where: Folder, rows: int):
        command = [sys.executable, "-m", "tests.noise.rival", str(where), str(rows)]
        self._process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def say(self, line: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def hear(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def writers(where: Folder) -> Iterator[list[Writer]]:
    pair = [Writer(where, 10), Writer(where, 20)]
    try:
        yield pair
    finally:
        for writer in pair:
            writer.close()


def test_of_two_processes_that_write_one_shard_at_once_the_file_and_receipt_of_one_stay(folder: Folder) -> None:
    shards = 15
    planned(folder, shards)
    with writers(folder) as pair:
        for shard in range(shards):
            for writer in pair:
                writer.say(shard)
            assert [writer.hear() for writer in pair] == ["ready"] * 2
            for writer in pair:
                writer.say("go")
            standing = {writer.hear() for writer in pair}
            receipt = committed(folder)[shard]
            assert receipt.sha256 == sha256_of(folder, f"shards/{shard:05d}.arrow") and receipt.sha256 in standing
            assert len(standing) == 1 or isinstance(folder, StoreFolder)  # where nothing is exclusive, one may hear of its own for a moment
    Manifest.write(folder, Plan.read(folder))
    assert not any(name.endswith(".tmp") for name in folder.sizes("shards"))


class Interleaved(StoreFolder):
    """A store where a rival commits the same shard, other bytes, just before or after this writer's file arrives."""

    rival: Callable[[], Any]
    before: bool

    def publish(self, draft: BinaryIO, name: str) -> None:
        rival, self.rival = self.rival, lambda: None
        if self.before:
            rival()
        super().publish(draft, name)
        if not self.before:
            rival()


@pytest.mark.parametrize("before", [True, False])
def test_a_rival_between_any_two_steps_on_a_store_leaves_file_and_receipt_of_one(bucket: Bucket, before: bool) -> None:
    ours, theirs = Interleaved(bucket.uri("a/data")), Folder.of(bucket.uri("a/data"))
    plan = planned(theirs, 1)
    ours.before, ours.rival = before, lambda: commit(theirs, plan, rows=20)
    standing = commit(ours, plan, rows=10)
    assert committed(theirs) == {0: standing} and sha256_of(theirs, "shards/00000.arrow") == standing.sha256


def test_a_rival_of_the_same_bytes_costs_nothing(bucket: Bucket) -> None:
    ours, theirs = Interleaved(bucket.uri("a/data")), Folder.of(bucket.uri("a/data"))
    plan = planned(theirs, 1)
    ours.before, ours.rival = True, lambda: commit(theirs, plan)
    assert commit(ours, plan) == committed(theirs)[0]
    assert sum(request.startswith("PUT") and "00000.arrow" in request for request in bucket.requests) == 2


def test_without_locks_a_file_replaced_under_a_writer_is_found_and_its_receipt_withdrawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = LocalFolder(tmp_path)
    plan = planned(folder, 1)
    place_new = storage.place_new

    def replaced(file: BinaryIO, path: Path) -> bool:
        storage.write_text(tmp_path / "shards" / "00000.arrow", "another writer's")
        return place_new(file, path)

    monkeypatch.setattr(storage, "place_new", replaced)
    with pytest.raises(DatasetError, match="another writer makes other bytes of this shard"):
        commit(folder, plan)
    assert listed(folder) == set()


def test_a_name_is_taken_once(tmp_path: Path) -> None:
    with storage.temporary_file(tmp_path / "x") as one, storage.temporary_file(tmp_path / "x") as two:
        one.write(b"one")
        two.write(b"two")
        assert storage.place_new(two, tmp_path / "x") and not storage.place_new(one, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"two" and len(list(tmp_path.iterdir())) == 1


def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_stay(tmp_path: Path) -> None:
    folder, later = Folder.of(tmp_path), time.time() + 60
    lines = (
        "from pathlib import Path",
        "from noise import storage",
        "with storage.temporary_file(Path('0')):",
        " print(flush=True); input()",
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    (tmp_path / "shards").mkdir()
    command = [sys.executable, "-c", "\n".join(lines)]
    writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path / "shards", env=environment)
    assert writer.stdout is not None and writer.stdout.readline()
    (tmp_path / "shards" / "00001.arrow").write_bytes(b"")
    folder.remove_leftovers(later)
    folder.remove_leftovers(0.0)
    (left,) = (name for name in folder.sizes("shards") if name.endswith(".tmp"))
    writer.kill()
    writer.communicate()
    folder.remove_leftovers(0.0)
    assert left in folder.sizes("shards")
    folder.remove_leftovers(later)
    assert list(folder.sizes("shards")) == ["00001.arrow"]


def test_a_manifest_is_not_written_over_files_that_are_not_as_their_receipts_say(folder: Folder) -> None:
    plan = planned(folder)
    for shard in (0, 1):
        commit(folder, plan, shard)
    folder.put("shards/00001.arrow", b"short")
    with pytest.raises(DatasetError, match=r"00001\.arrow has 5 bytes, its receipt says"):
        Manifest.write(folder, plan)
    folder.remove("shards/00001.arrow")
    with pytest.raises(DatasetError, match=r"00001\.arrow is missing; fetch it again, or delete its receipt"):
        Manifest.write(folder, plan)
    folder.remove("shards/00001.json")
    commit(folder, plan, 1)
    assert len(Manifest.write(folder, plan).receipts) == 2


def test_damage_on_a_store_is_found_by_readers(remote: Folder) -> None:
    plan = planned(remote, 1)
    receipt = commit(remote, plan)
    content = remote.read("shards/00000.arrow")
    remote.put("shards/00000.arrow", content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DatasetError, match=r"s3://bucket/a/data/shards/00000\.arrow has sha256"):
        open_shard(remote, receipt, plan.identity)
    remote.put("shards/00000.arrow", b"")
    with pytest.raises(DatasetError, match="has 0 bytes, its receipt says"):
        open_shard(remote, receipt, plan.identity)


def test_a_file_is_hashed_from_its_beginning(tmp_path: Path) -> None:
    with (tmp_path / "x").open("w+b") as file:
        file.write(b"some")
        file.flush()
        assert sha256_file(file) == sha256_file(tmp_path / "x")
    assert json.loads(storage.readable_json({"b": 1, "a": 2})) == {"a": 2, "b": 1}
