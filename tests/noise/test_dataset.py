"""A dataset refuses what it is not, by field; what is committed stays, and what fails leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from noise import storage
from noise.commit import commit_shard
from noise.dataset import Manifest, Plan, open_shard
from noise.identity import default_seed, differences, identity_hash
from noise.receipt import Receipt, Totals, committed
from noise.sketch import Codec
from noise.storage import DatasetError, atomic_file, canonical_json, read_json, sha256_text, write_json
from tests.noise.teachers import BigramTeacher, identity_of, shard_rows, write_dataset

TEACHER, CODEC = BigramTeacher(40), Codec(40)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished dataset of two shards."""
    write_dataset(tmp_path, TEACHER, CODEC, [5, 70])
    return tmp_path


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def edit(path: Path, **change: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def commit(folder: Path, plan: Plan, shard: int, rows: int = 10) -> Receipt:
    metadata = plan.metadata(shard)
    return commit_shard(folder, metadata, shard_rows(TEACHER, metadata, rows), characters_in=rows)


def test_the_same_plan_makes_the_same_bytes(tmp_path: Path) -> None:
    roots = [write_dataset(tmp_path / name, TEACHER, CODEC, [5, 70]).root_hash for name in ("a", "b")]
    assert roots[0] == roots[1]
    assert everything(tmp_path / "a") == everything(tmp_path / "b")


def test_identity_hash_is_the_canonical_json_hash_whatever_the_order() -> None:
    identity = {"b": [1, "ä"], "a": {"y": None, "x": 0.125}}
    assert canonical_json(identity) == '{"a":{"x":0.125,"y":null},"b":[1,"\\u00e4"]}'
    assert identity_hash(identity) == sha256_text(canonical_json(identity)) == identity_hash(dict(reversed(identity.items())))


def test_default_seed_comes_from_all_the_rest_and_is_never_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    identity = identity_of(CODEC, 12)
    assert default_seed(identity) == default_seed(identity | {"seed": "5"}) == int(identity["seed"])
    assert default_seed(identity | {"corpus": "other"}) != default_seed(identity)
    assert 0 < default_seed(identity) < 2**64
    monkeypatch.setattr("noise.identity.identity_hash", lambda _: "0" * 64)
    assert default_seed(identity) != 0


def test_differences_name_each_field() -> None:
    ours = identity_of(CODEC, 12)
    theirs = json.loads(json.dumps(ours))
    assert differences(ours, theirs) == []
    theirs["corpus"]["files"][0]["sha256"] = "cd"
    theirs["epsilon"] = 0.25
    del theirs["draws"]
    theirs["dtype"] = "bfloat16"
    assert differences(ours, theirs) == [
        "corpus.files[a.txt].sha256: 'ab' here, 'cd' there",
        "draws: 1 here, None there",
        "dtype: None here, 'bfloat16' there",
        "epsilon: 0.125 here, 0.25 there",
    ]
    theirs["corpus"]["files"].append("b.txt")
    assert differences(ours["corpus"], theirs["corpus"])[0].startswith("files: [{'path'")


def test_a_plan_refuses_a_folder_of_another_identity_by_field(folder: Path) -> None:
    before, plan = everything(folder), Plan.read(folder)
    plan.write(folder)
    with pytest.raises(DatasetError, match=r"another identity:\n  epsilon: 0\.25 here, 0\.125 there\nchoose another output folder"):
        replace(plan, identity=plan.identity | {"epsilon": 0.25}).write(folder)
    assert everything(folder) == before


def test_plan_and_manifest_come_back_as_written(folder: Path) -> None:
    plan, manifest = Plan.read(folder), Manifest.read(folder)
    assert plan.identity == manifest.identity and plan.shards == [{"rows": 5}, {"rows": 70}]
    assert manifest.receipts == list(committed(folder).values())
    assert manifest.totals["rows"] == 75 and manifest.totals["saturated"] == 0 and manifest.totals["characters_in"] == 75
    for receipt in manifest.receipts:
        recount = Totals(plan.metadata(receipt.shard))
        for rows in open_shard(folder, receipt, manifest.identity):
            recount.add(rows)
        assert recount.receipt(receipt.file, receipt.sha256, receipt.bytes, receipt.characters_in) == receipt


def test_an_unfinished_dataset_says_how_to_go_on(folder: Path, tmp_path: Path) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(DatasetError, match=r"is unfinished .* run `python -m pipeline extract` again"):
        Manifest.read(folder)
    (folder / "shards" / "00001.json").unlink()
    with pytest.raises(DatasetError, match="1 of 2 shards are not committed, first 1"):
        Manifest.write(folder, Plan.read(folder))
    with pytest.raises(DatasetError, match="is not a noise dataset"):
        Manifest.read(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"root_hash": "0" * 64}, "root_hash or totals do not belong"),
        ({"totals": {}}, "root_hash or totals do not belong"),
        ({"identity_hash": "0" * 64}, "identity_hash does not belong"),
        ({"identity": None}, "has no identity"),
        ({"receipts": None}, "has no list of receipts"),
        ({"receipts": []}, "root_hash or totals do not belong"),
        ({"receipts": [3]}, "a receipt is not a JSON object"),
    ],
)
def test_an_edited_manifest_is_refused(folder: Path, change: dict[str, Any], message: str) -> None:
    edit(folder / "manifest.json", **change)
    with pytest.raises(DatasetError, match=message):
        Manifest.read(folder)


def test_edited_receipts_in_a_manifest_are_refused(folder: Path) -> None:
    path = folder / "manifest.json"
    receipts = json.loads(path.read_text())["receipts"]
    for change, message in [
        ({"kept": 1}, "totals do not belong"),
        ({"sha256": "ä" * 64}, "expected 64 hexadecimal digits"),
        ({"bytes": "many"}, "field bytes is 'many', expected int"),
        ({"file": "../../secret"}, "names the file"),
    ]:
        edit(path, receipts=[receipts[0] | change, receipts[1]])
        with pytest.raises(DatasetError, match=message):
            Manifest.read(folder)
    edit(path, receipts=receipts[::-1])
    with pytest.raises(DatasetError, match="not in shard order"):
        Manifest.read(folder)


@pytest.mark.parametrize("name", ["plan.json", "manifest.json"])
def test_another_format_version_or_extraction_is_refused(folder: Path, name: str) -> None:
    identity = json.loads((folder / name).read_text())["identity"]
    read = Plan.read if name == "plan.json" else Manifest.read
    for change, message in [
        ({"format_version": 3}, "has format version 3; this code reads versions 1 and 2"),
        ({"extraction": "guessed"}, "extraction is 'guessed'"),
        ({"epsilon": 0.3}, "the file was edited"),
    ]:
        edit(folder / name, identity=identity | change)
        with pytest.raises(DatasetError, match=message):
            read(folder)
    edit(folder / name, identity={key: value for key, value in identity.items() if key != "draws"})
    with pytest.raises(DatasetError, match="the identity lacks draws"):
        read(folder)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"identity": NaN}', "[" * 10**6, "\udcff"])
def test_json_that_is_none_is_a_damaged_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DatasetError, match=r"manifest\.json (is not valid JSON|holds list)"):
        Manifest.read(tmp_path)


def test_a_shard_of_another_dataset_or_place_is_refused(folder: Path) -> None:
    manifest = Manifest.read(folder)
    first, second = manifest.receipts
    with pytest.raises(DatasetError, match="belongs to another dataset"):
        open_shard(folder, first, manifest.identity | {"epsilon": 0.25})
    (folder / "shards" / "00001.arrow").write_bytes((folder / "shards" / "00000.arrow").read_bytes())
    with pytest.raises(DatasetError, match="truncated or edited"):
        open_shard(folder, second, manifest.identity)
    swapped = replace(first, shard=1, file="00001.arrow")
    with pytest.raises(DatasetError, match="belongs to another dataset"):
        open_shard(folder, swapped, manifest.identity)
    (folder / "shards" / "00000.arrow").unlink()
    with pytest.raises(DatasetError, match="is missing; fetch it again"):
        open_shard(folder, first, manifest.identity)


def test_a_receipt_under_another_shards_name_is_refused(folder: Path) -> None:
    (folder / "shards" / "00001.json").write_bytes((folder / "shards" / "00000.json").read_bytes())
    with pytest.raises(DatasetError, match=r"00001\.json is the receipt of shard 0"):
        committed(folder)


def test_listing_tells_what_is_committed(tmp_path: Path) -> None:
    plan = Plan(identity_of(CODEC, 12), {}, [0, 1, 2])
    plan.write(tmp_path)
    assert committed(tmp_path) == {}
    receipt = commit(tmp_path, plan, 1)
    (tmp_path / "shards" / "00002.arrow").write_bytes(b"renamed, then killed before its receipt")
    (tmp_path / "shards" / "00000.arrow.1234.tmp").write_bytes(b"killed while writing")
    assert committed(tmp_path) == {1: receipt}
    commit(tmp_path, plan, 0)
    commit(tmp_path, plan, 2)
    assert Manifest.write(tmp_path, plan).totals["rows"] == 30


def test_the_first_receipt_wins_and_later_work_is_discarded(tmp_path: Path) -> None:
    plan = Plan(identity_of(CODEC, 12), {}, [0])
    plan.write(tmp_path)
    first = commit(tmp_path, plan, 0, rows=10)
    before = everything(tmp_path)
    assert commit(tmp_path, plan, 0, rows=20) == first
    assert everything(tmp_path) == before


def test_a_writer_that_fails_leaves_nothing_and_harms_nothing(tmp_path: Path) -> None:
    plan = Plan(identity_of(CODEC, 12), {}, [0, 1])
    plan.write(tmp_path)
    commit(tmp_path, plan, 0)
    before = everything(tmp_path)

    def interrupted() -> Iterator[Any]:
        yield from shard_rows(TEACHER, plan.metadata(1), 70)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        commit_shard(tmp_path, plan.metadata(1), interrupted(), 0)
    assert everything(tmp_path) == before


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """The operating system refuses to let files grow: a real failing write, as a full disk gives."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [0, 4096, 8192])
def test_a_write_that_the_disk_refuses_leaves_what_was_committed(tmp_path: Path, size: int) -> None:
    plan = Plan(identity_of(CODEC, 12), {}, [0, 1])
    plan.write(tmp_path)
    commit(tmp_path, plan, 0)
    before = everything(tmp_path)
    with files_no_larger_than(size), pytest.raises(OSError) as caught:
        commit(tmp_path, plan, 1, rows=200)
    assert caught.value.errno == errno.EFBIG
    assert everything(tmp_path) == before
    assert commit(tmp_path, plan, 1, rows=200).rows == 200


@pytest.mark.parametrize("failing", ["fsync", "sha256_file"])
def test_a_full_disk_at_the_last_moment_leaves_what_was_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    plan = Plan(identity_of(CODEC, 12), {}, [0, 1])
    plan.write(tmp_path)
    commit(tmp_path, plan, 0)
    before = everything(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync" if failing == "fsync" else "noise.commit.sha256_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        commit(tmp_path, plan, 1)
    if failing == "fsync":
        with pytest.raises(OSError, match="No space left on device"):
            write_json(tmp_path / "manifest.json", {})
    assert everything(tmp_path) == before


def test_atomic_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.json"
    with pytest.raises(RuntimeError), atomic_file(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert list(path.parent.iterdir()) == []
    with atomic_file(path) as file:
        file.write(b"whole")
        file.flush()
        assert not path.exists()
        (temporary,) = path.parent.iterdir()
        assert temporary.suffix == ".tmp"
    assert [*path.parent.iterdir()] == [path] and path.read_bytes() == b"whole"


def test_json_never_holds_nan(tmp_path: Path) -> None:
    for write in (lambda: canonical_json({"x": float("nan")}), lambda: write_json(tmp_path / "x.json", {"x": float("inf")})):
        with pytest.raises(ValueError, match="Out of range float"):
            write()
    assert not list(tmp_path.iterdir())
    with pytest.raises(DatasetError, match="does not exist"):
        read_json(tmp_path / "x.json" / "y.json")


def test_receipts_hold_exactly_what_the_format_names(folder: Path) -> None:
    names = ["shard", "file", "sha256", "bytes", "rows", "tokens", "kept", "saturated", "nll_sum", "characters_in"]
    receipt = json.loads((folder / "shards" / "00000.json").read_text())
    assert sorted(receipt) == sorted(names) == sorted(committed(folder)[0].to_json())
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sorted(manifest["totals"]) == sorted(set(names) - {"shard", "file", "sha256"})
    assert storage.sha256_file(folder / "shards" / "00000.arrow") == receipt["sha256"]
