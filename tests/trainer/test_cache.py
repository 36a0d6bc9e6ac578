"""Datasets at a URI: shards are fetched once, checked, kept within bounds and never torn, whoever dies, on a real S3 server on this machine."""

import os
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from noise.storage import DatasetError
from tests.noise.s3 import bucket
from tests.trainer.chain import write_chain
from tests.trainer.test_data import equal
from trainer import cache
from trainer.__main__ import main
from trainer.data import NoiseDataset, Place, batches

__all__ = ["bucket"]
SHARDS = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_chain(tmp_path_factory.mktemp("chain") / "dataset", rows=320, shards=SHARDS)


@pytest.fixture
def uri(folder, bucket):
    """The dataset in the store."""
    for path in folder.rglob("*"):
        if path.is_file():
            bucket.objects[f"data/{path.relative_to(folder)}"] = path.read_bytes()
    return bucket.uri("data")


def fetched(bucket) -> list[str]:
    """Shards that were asked for, in order."""
    with bucket.lock:
        return [request.split("/shards/")[1].split("?")[0] for request in bucket.requests if request.startswith("GET") and "/shards/" in request]


def bytes_of(folder: Path, shards: int) -> int:
    """What the largest so many shards take."""
    return sum(sorted((path.stat().st_size for path in (folder / "shards").glob("*.arrow")), reverse=True)[:shards])


def test_batches_from_a_store_are_those_of_the_folder_within_a_bounded_cache(folder, uri, bucket, tmp_path, monkeypatch):
    """Into a second epoch, in windows of two shards, with room for eight of sixteen, by two processes' worth of readers of one cache."""
    local = NoiseDataset(folder, window=2)
    alone = list(islice(batches(local, 5, 20, Place()), 20))
    limit = bytes_of(folder, 8)
    readers = [batches(NoiseDataset(uri, window=2, cache=tmp_path, cache_bytes=limit), 5, 20, Place(), rank, 2, ahead=1) for rank in range(2)]
    for step, parts in enumerate(islice(zip(*readers, strict=True), 20)):
        for rank, (part, place) in enumerate(parts):
            assert equal(part, alone[step][0].split(10)[rank]) and place == alone[step][1]
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= limit
    for reader in readers:
        reader.close()
    assert SHARDS <= len(fetched(bucket)) <= 3 * SHARDS  # so much and what was fetched ahead; readers fetch hardly a shard twice


def test_the_next_windows_shards_are_here_before_they_are_asked_for(folder, uri, bucket, tmp_path):
    """After the first batch of the first of eight windows, the store may lose everything: two windows' batches come."""
    dataset = NoiseDataset(uri, window=2, cache=tmp_path)
    order = dataset.order(5)
    source, local = batches(dataset, 5, 10, Place(), ahead=1), batches(NoiseDataset(folder, window=2), 5, 10, Place())
    first = next(source)[0]
    for fetching in dataset._cache._waiting:
        fetching.result(120)
    ahead = {f"{shard:05d}.arrow" for window in (0, 1) for shard in order.shards_of(0, window)}
    assert len(ahead) == 4 and set(fetched(bucket)) == ahead
    bucket.objects.clear()
    assert equal(first, next(local)[0]) and all(equal(next(source)[0], next(local)[0]) for _ in range(7))
    source.close()


def test_a_resume_fetches_the_shards_that_it_still_needs_and_no_others(folder, uri, bucket, tmp_path):
    dataset = NoiseDataset(uri, window=2, cache=tmp_path)
    order = dataset.order(5)
    place = Place(0, 90)  # in the third of eight windows
    source = batches(dataset, 5, 10, place, ahead=1)
    whole = batches(NoiseDataset(folder, window=2), 5, 10, place)
    assert all(equal(next(source)[0], next(whole)[0]) for _ in range(2))
    source.close()
    needed = {f"{shard:05d}.arrow" for window in (2, 3) for shard in order.shards_of(0, window)}
    assert set(fetched(bucket)) <= needed and len(fetched(bucket)) == len(set(fetched(bucket)))


def test_a_second_reader_finds_what_is_in_the_cache_and_asks_the_store_for_no_shard(folder, uri, bucket, tmp_path):
    rows = np.arange(320)
    first = NoiseDataset(uri, cache=tmp_path).batch(rows)
    before = len(fetched(bucket))
    assert equal(NoiseDataset(uri, cache=tmp_path).batch(rows), first) and equal(NoiseDataset(folder).batch(rows), first)
    assert before == len(fetched(bucket)) == SHARDS


def test_a_shard_that_arrives_damaged_is_fetched_again_and_then_refused_by_name(folder, uri, bucket, tmp_path, monkeypatch):
    name = "data/shards/00003.arrow"
    good = bucket.objects[name]
    bad = bytes(byte ^ (at == len(good) // 2) for at, byte in enumerate(good))
    bucket.objects[name] = bad
    with pytest.raises(DatasetError, match=r"s3://bucket/data/shards/00003\.arrow arrived 3 times with sha256 .* receipt says"):
        NoiseDataset(uri, cache=tmp_path).batch(np.array([65]))
    assert fetched(bucket) == ["00003.arrow"] * 3 and not list(tmp_path.glob("*.part")) and not list(tmp_path.glob("*.arrow"))

    download = cache.Folder.of(uri).__class__.download

    def mended(self, name, file):
        download(self, name, file)
        bucket.objects["data/shards/00003.arrow"] = good

    monkeypatch.setattr(cache.Folder.of(uri).__class__, "download", mended)
    assert equal(NoiseDataset(uri, cache=tmp_path).batch(np.array([65])), NoiseDataset(folder).batch(np.array([65])))
    assert len(fetched(bucket)) == 5


def test_a_byte_that_flips_in_the_cache_is_found_and_the_shard_fetched_again(folder, uri, bucket, tmp_path):
    NoiseDataset(uri, cache=tmp_path).batch(np.array([65]))
    (kept,) = tmp_path.glob("*.arrow")
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 1
    kept.write_bytes(content)
    assert equal(NoiseDataset(uri, cache=tmp_path).batch(np.array([65])), NoiseDataset(folder).batch(np.array([65])))
    assert fetched(bucket) == ["00003.arrow"] * 2


def test_what_is_mapped_is_never_evicted(folder, uri, bucket, tmp_path, monkeypatch):
    """With room for four shards, a reader that holds four keeps them; another waits, says so, and has room when they are let go."""
    monkeypatch.setattr(cache, "_PATIENCE", 0.0)
    limit = bytes_of(folder, 4)
    holder, other = (NoiseDataset(uri, window=2, cache=tmp_path, cache_bytes=limit) for _ in range(2))
    holder.batch(np.array([0, 20, 40, 60]))
    held = set(tmp_path.glob("*.arrow"))
    with pytest.raises(DatasetError, match=r"has no room for s3://bucket/data/shards/00007\.arrow within data\.cache_bytes"):
        other.batch(np.array([140]))
    assert set(tmp_path.glob("*.arrow")) == held and len(held) == 4
    assert equal(holder.batch(np.array([1, 61])), NoiseDataset(folder).batch(np.array([1, 61])))
    holder.release()
    assert equal(other.batch(np.array([140])), NoiseDataset(folder).batch(np.array([140])))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= limit


def test_a_cache_too_small_for_what_is_read_at_a_time_is_refused(folder, uri, tmp_path):
    dataset = NoiseDataset(uri, window=2, cache=tmp_path, cache_bytes=bytes_of(folder, 5))
    with pytest.raises(DatasetError, match=r"data\.cache_bytes is .*; reading s3://.* with 1 batches ahead needs up to .*: raise it"):
        next(batches(dataset, 1, 20, Place(), ahead=1))


def test_a_process_killed_during_a_fetch_leaves_a_usable_cache(folder, uri, bucket, tmp_path):
    stalled = bucket.fail("stall", "GET", r"shards/00003\.arrow")
    script = "import sys, numpy; from trainer.data import NoiseDataset; NoiseDataset(sys.argv[1], cache=sys.argv[2]).batch(numpy.array([65]))"
    slow = uri.replace("request_timeout=1", "request_timeout=300")
    process = subprocess.Popen([sys.executable, "-c", script, slow, str(tmp_path)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert stalled.meeting.wait(120)
    assert len(list(tmp_path.glob("*.part"))) == 1
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert equal(NoiseDataset(uri, cache=tmp_path).batch(np.array([65])), NoiseDataset(folder).batch(np.array([65])))
    assert not list(tmp_path.glob("*.part")) and len(list(tmp_path.glob("*.arrow"))) == 1


def test_a_student_trains_from_a_store_and_from_a_mixture_of_a_store_and_a_folder(folder, uri, tmp_path, capsys):
    small = {
        "student.layers": 1, "student.hidden": 16, "student.heads": 2, "student.noise.kind": "gumbel",
        "student.noise.input": "add", "student.noise.readout": "true",
        "student.noise.prior": "unigram", "optim.global_batch": 8, "optim.steps": 3, "device": "cpu", "threads": 1, "tensorboard": "false",
        "data.cache": tmp_path / "cache",
    }  # fmt: skip
    mix = f'[{{"path": "{uri}", "weight": 3}}, {{"path": "{folder}"}}]'
    for name, data in (("alone", {"data.path": uri, "data.heldout": uri}), ("mixed", {"data.mix": mix})):
        settings = {"output": tmp_path / name, **small, **data}
        assert main([part for key, value in settings.items() for part in (f"--{key}", str(value))]) == 0, capsys.readouterr().err
        assert (tmp_path / name / "student.json").exists()
    settings = {"output": tmp_path / "alone", **small, "data.path": uri, "data.window": 3, "optim.steps": 4}
    assert main([part for key, value in settings.items() for part in (f"--{key}", str(value))]) == 1
