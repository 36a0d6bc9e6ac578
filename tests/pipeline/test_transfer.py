"""Publishing and fetching: the same shards under other names, nothing unchecked, nothing overwritten, and the same command continues."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from noise.dataset import Manifest, Plan
from noise.storage import DatasetError
from pipeline.__main__ import main
from pipeline.card import write_card
from pipeline.transfer import prepare, transfer
from pipeline.verify import verify
from tests.noise.s3 import Bucket
from tests.pipeline.world import World, make_here, save_teacher
from trainer.data import NoiseDataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("transfer")
    world = World(root)
    assert world.run("tokenizer") == 0
    make_here(["extract", *world.options(teacher__model=save_teacher(root / "teacher"), packing__shard_characters=2000)])
    plan, manifest = Plan.read(world.output), Manifest.read(world.output)
    write_card(world.output, plan, manifest)
    manifest.save(world.output, {})
    return world.output


@pytest.mark.parametrize("store", ["bucket", "gs_bucket"])
def test_what_was_pushed_and_pulled_is_the_dataset(dataset: Path, request: pytest.FixtureRequest, store: str, tmp_path: Path) -> None:
    bucket = request.getfixturevalue(store)
    there, here = bucket.uri("team/data"), tmp_path / "here"
    assert main(["push", str(dataset), "--output", there]) == 0
    assert set(bucket.under("team/data")) >= {"shards/00000/00000.arrow", "manifest.json", "plan.json"}
    assert not any(name.endswith(".json") for name in bucket.under("team/data") if name.startswith("shards/"))
    assert main(["verify", there]) == 0 and main(["pull", there, "--output", str(here)]) == 0
    assert verify(here).root_hash == Manifest.read(dataset).root_hash
    theirs = NoiseDataset(dataset)
    for ours in (NoiseDataset(here), NoiseDataset(there, cache=tmp_path / "cache")):
        rows, where = torch.arange(len(ours)).numpy(), torch.arange(1, 20)
        assert torch.equal(ours.batch(rows).input_ids_BL, theirs.batch(rows).input_ids_BL)
        assert torch.equal(ours.batch(rows).noise_at(where), theirs.batch(rows).noise_at(where))


def test_a_dry_run_moves_nothing(dataset: Path, bucket: Bucket, capsys: pytest.CaptureFixture[str]) -> None:
    there, before = bucket.uri("team/data"), dict(bucket.objects)
    assert main(["push", str(dataset), "--output", there, "--dry-run"]) == 0
    assert bucket.objects == before and "would move" in capsys.readouterr().err


def test_a_push_that_broke_off_goes_on_with_what_is_missing(dataset: Path, bucket: Bucket) -> None:
    there, shards = bucket.uri("team/data"), len(Manifest.read(dataset).receipts)
    bucket.fail(403, "PUT", f"{shards - 1:05d}.arrow", times=50)
    with pytest.raises(OSError, match=r"."):
        transfer(dataset, there)
    assert "manifest.json" not in bucket.under("team/data")
    bucket.faults.clear()
    assert [receipt.shard for receipt in prepare(dataset, there).missing] == [shards - 1]
    bucket.requests.clear()
    transfer(dataset, there)
    assert sum("PUT" in request and ".arrow" in request for request in bucket.requests) == 1 and verify(there)


def test_damage_on_the_way_is_named_and_not_kept(dataset: Path, bucket: Bucket, tmp_path: Path) -> None:
    there = bucket.uri("team/data")
    transfer(dataset, there)
    (name,) = [name for name in bucket.objects if name.endswith("00001.arrow")]
    content = bytearray(bucket.objects[name])
    content[len(content) // 2] ^= 1
    bucket.objects[name] = bytes(content)
    with pytest.raises(DatasetError, match=r"00001\.arrow has sha256"):
        transfer(there, tmp_path / "here")
    assert not (tmp_path / "here" / "manifest.json").exists() and not list((tmp_path / "here").rglob("00001.arrow"))


def test_another_dataset_is_not_overwritten(dataset: Path, tmp_path: Path) -> None:
    assert main(["subset", str(dataset), "--shards", "0", "--output", str(tmp_path / "part")]) == 0
    before = (tmp_path / "part" / "manifest.json").read_bytes()
    assert main(["push", str(dataset), "--output", str(tmp_path / "part")]) == 2
    assert (tmp_path / "part" / "manifest.json").read_bytes() == before


def test_some_shards_are_a_dataset_of_their_own(dataset: Path, bucket: Bucket, tmp_path: Path) -> None:
    there = bucket.uri("team/data")
    transfer(dataset, there)
    assert main(["pull", there, "--shards", "1-2", "--output", str(tmp_path / "some")]) == 0
    whole, some = Manifest.read(dataset), verify(tmp_path / "some")
    assert [receipt.sha256 for receipt in some.receipts] == [receipt.sha256 for receipt in whole.receipts[1:3]]
    assert len(NoiseDataset(tmp_path / "some")) == sum(receipt.rows for receipt in whole.receipts[1:3])
    assert some.identity["sources"][0]["root_hash"] == whole.root_hash


def test_a_published_dataset_loads_by_its_card(dataset: Path, tmp_path: Path) -> None:
    from datasets import load_dataset

    transfer(dataset, tmp_path / "published")
    rows = load_dataset(str(tmp_path / "published"), cache_dir=str(tmp_path / "cache"))["train"]
    assert rows.num_rows == Manifest.read(dataset).totals["rows"]
