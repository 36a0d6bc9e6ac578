"""Publishing and fetching: the same shards under other names, nothing unchecked, nothing overwritten, and the same command continues."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from noise.dataset import Manifest, Plan
from noise.folder import Folder
from noise.local import LocalFolder
from noise.seal import read_seal, small_files, write_seal
from noise.storage import DatasetError
from pipeline import derive, rewrite
from pipeline.__main__ import main
from pipeline.card import write_card
from pipeline.plan import make_plan, write_plan
from pipeline.stages import find_job
from pipeline.transfer import describe, prepare, transfer
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


@pytest.fixture
def small(dataset: Path, tmp_path: Path) -> Path:
    """Two shards and every kind of small file."""
    derive.take([derive.Source.of(dataset, [0, 1])], tmp_path / "small")
    (tmp_path / "small" / "recipe.yaml").write_text("output: here\n")
    Manifest.read(tmp_path / "small").save(tmp_path / "small", {})
    return tmp_path / "small"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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


def test_a_push_cut_off_at_any_small_file_goes_on_to_the_same_end(small: Path, bucket: Bucket) -> None:
    transfer(small, bucket.uri("team/whole"))
    whole = bucket.under("team/whole")
    names = [name for name in whole if not name.endswith(".arrow")]
    assert {"plan.json", "README.md", "recipe.yaml", "tokenizer/tokenizer.json", "seal.json", "manifest.json"} <= set(names)
    for number, name in enumerate(names):
        place = f"team/cut{number}"
        fault = bucket.fail(403, "PUT", f"{place}/{name}", times=50)
        with pytest.raises(OSError, match=r"."):
            transfer(small, bucket.uri(place))
        assert fault.met and "manifest.json" not in bucket.under(place)
        bucket.faults.clear()
        transfer(small, bucket.uri(place))
        assert bucket.under(place) == whole


def test_a_pull_that_died_at_any_small_file_goes_on_also_with_a_new_card(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transfer(small, tmp_path / "whole")
    put = LocalFolder.put
    for name in [name for name in files(tmp_path / "whole") if not name.endswith(".arrow")]:
        place = tmp_path / f"cut at {name.replace('/', ' ')}"

        def die(self: LocalFolder, put_name: str, content: bytes, last: str = name) -> None:
            if put_name == last:
                raise KeyboardInterrupt
            put(self, put_name, content)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(LocalFolder, "put", die)
            transfer(small, place)
        transfer(small, place)
        assert files(place) == files(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    (tmp_path / "half" / "manifest.json").unlink()
    describe(small, corpus_license="mit")
    transfer(small, tmp_path / "half")
    assert verify(tmp_path / "half", 1) and "corpus_license" in (tmp_path / "half" / "plan.json").read_text()
    plan = Plan.read(small)
    Plan(plan.identity | {"seed": "7"}, plan.environment, plan.shards).rewrite(tmp_path / "other")
    with pytest.raises(DatasetError, match="part of another one"):
        transfer(small, tmp_path / "other")


@pytest.mark.parametrize("sealed", [True, False])
def test_what_is_no_part_of_a_dataset_is_neither_published_nor_sealed(
    small: Path, tmp_path: Path, sealed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    own, folder = {*files(small)}, Folder.of(small)
    for name in (".env", "notes.txt", "tokenizer/tokenization_evil.py"):
        (small / name).write_text("HF_TOKEN=hf_secret")
    assert {*small_files(folder)} == {*read_seal(folder)} < own
    if sealed:  # as one of before did, of everything
        write_seal(folder, small_files(folder) | {".env": "0" * 64})
    else:
        (small / "seal.json").unlink()
    transfer(small, tmp_path / "there")
    assert "stays behind: .env, notes.txt, tokenizer/tokenization_evil.py" in capsys.readouterr().err
    there = files(tmp_path / "there")
    assert {name for name in there if not name.endswith(".arrow")} == {name for name in own if not name.startswith("shards/")}
    assert {*read_seal(Folder.of(tmp_path / "there"))} < own and verify(tmp_path / "there", 1)
    derive.take([derive.Source.of(small, [0])], tmp_path / "shards")
    rewrite.rows_between(small, 0, 3, tmp_path / "rows")
    for output in (tmp_path / "shards", tmp_path / "rows"):
        assert not any("evil" in name for name in files(output)) and verify(output, 1)


def test_an_edited_or_missing_small_file_is_not_published_under_a_new_seal(small: Path, tmp_path: Path) -> None:
    (small / "recipe.yaml").write_text("output: elsewhere\n")
    with pytest.raises(DatasetError, match=r"recipe\.yaml is not what seal\.json says"):
        transfer(small, tmp_path / "there")
    (small / "recipe.yaml").unlink()
    with pytest.raises(DatasetError, match=r"recipe\.yaml is missing"):
        transfer(small, tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_a_shard_that_was_damaged_where_it_is_comes_again_or_is_said_to_be_unread(
    small: Path, bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transfer(small, tmp_path / "there")
    shard = tmp_path / "there" / "shards" / "00000" / "00001.arrow"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert [receipt.shard for receipt in prepare(small, tmp_path / "there").missing] == [1]
    transfer(small, tmp_path / "there")
    assert shard.read_bytes() == content and not prepare(small, tmp_path / "there").missing
    transfer(small, bucket.uri("team/data"))
    assert "compared by size" not in capsys.readouterr().err
    transfer(small, bucket.uri("team/data"))
    assert "2 shards that are there were compared by size alone" in capsys.readouterr().err


def test_somebodys_own_files_are_not_replaced(dataset: Path, tmp_path: Path) -> None:
    recipe = World(dataset.parent).recipe(output=tmp_path / "output", teacher__model=dataset.parent / "teacher")
    plan, _, tokenizer = make_plan(recipe)
    writers: list[Callable[[Path], object]] = [
        lambda output: transfer(dataset, output),
        lambda output: transfer(dataset, output, dry_run=True),
        lambda output: derive.take([derive.Source.of(dataset, [0])], output),
        lambda output: rewrite.rows_between(dataset, 0, 3, output),
        lambda output: write_plan(replace(recipe, output=str(output)), plan, tokenizer),
    ]
    for name in ("README.md", "recipe.yaml", "seal.json", "tokenizer/tokenizer.json", "shards/00000/mine.arrow", "manifest.json"):
        (tmp_path / name / name).parent.mkdir(parents=True)
        (tmp_path / name / name).write_text("my own")
        for write in writers:
            with pytest.raises(DatasetError, match=f"{name}.*" + ("name another folder, or move it away" if name != "manifest.json" else "")):
                write(tmp_path / name)
            assert files(tmp_path / name) == {name: b"my own"}
    for number, write in enumerate(writers):
        output = tmp_path / f"in nobody's way {number}"
        output.mkdir()
        (output / "notes.txt").write_text("my own")
        write(output)
        assert (output / "notes.txt").read_text() == "my own"


def test_a_plan_that_was_cut_off_before_its_tokenizer_goes_on(dataset: Path, tmp_path: Path) -> None:
    recipe = World(dataset.parent).recipe(output=tmp_path / "plan", teacher__model=dataset.parent / "teacher")
    find_job(recipe, True)
    before = files(tmp_path / "plan")
    shutil.rmtree(tmp_path / "plan" / "tokenizer")
    find_job(recipe, True)
    assert files(tmp_path / "plan") == before and "tokenizer/tokenizer.json" in before
    (tmp_path / "plan" / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(DatasetError, match=r"tokenizer\.json is not the tokenizer of this dataset.*move it away"):
        find_job(recipe, True)


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
