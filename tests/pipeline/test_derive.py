"""Datasets of datasets: shards keep their bytes, rows keep their noise, and what does not belong together is refused by field."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from noise import philox
from noise.dataset import Manifest, Plan
from noise.decode import decode
from noise.receipt import listed
from noise.sketch import Sketch
from noise.storage import DatasetError, sha256_file
from pipeline import dense, derive, rewrite
from pipeline.__main__ import main
from pipeline.inspect import in_words
from pipeline.sharing import numbers
from pipeline.verify import verify
from tests.pipeline.world import World, make_here, save_teacher, write_corpus

Row = tuple[tuple[int, ...], bytes, bytes, bytes, bytes]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two finished datasets of one teacher and two corpora, and one of another noise seed."""
    root = tmp_path_factory.mktemp("derive")
    world = World(root)
    assert world.run("tokenizer") == 0
    save_teacher(root / "teacher")
    write_corpus(root / "more", 9)
    made = {}
    for name, changes in {
        "first": {"corpus__files": root / "corpus" / "0[0-2]*.txt"},
        "second": {"corpus__files": root / "corpus" / "03*.txt"},
        "other": {"noise__epsilon": 0.25},
    }.items():
        made[name] = root / name
        make_here(["extract", *world.options(output=root / name, teacher__model=root / "teacher", corpus__held_out=0, **changes)])
    return made


def rows_of(dataset: Path) -> list[Row]:
    """Every row: (seed, id) and the bytes of its columns, whatever their widths in the file."""
    manifest = Manifest.read(dataset)
    found = []
    for receipt in manifest.receipts:
        reader = manifest.open(dataset, receipt)
        for batch in reader:
            for at in range(len(batch)):
                row = batch[at : at + 1]
                columns = (
                    row.input_ids.astype(np.int64),
                    row.log_prob,
                    row.kept.astype(np.int64),
                    np.stack([row.index, row.code], -1).astype(np.int64),
                )
                found.append(((int(reader.metadata.seed), int(row.sequence_id[0])), *(column.tobytes() for column in columns)))
    return found


def test_a_merge_is_its_parents_shards_byte_for_byte(given: dict[str, Path], tmp_path: Path) -> None:
    merged = derive.merge([given["first"], given["second"]], tmp_path / "merged")
    parents = [Manifest.read(given[name]) for name in ("first", "second")]
    assert [receipt.sha256 for receipt in merged.receipts] == [receipt.sha256 for parent in parents for receipt in parent.receipts]
    assert [receipt.shard for receipt in merged.receipts] == list(range(len(merged.receipts)))
    assert merged.identity["parents"] == [parent.identity for parent in parents]
    assert [source["root_hash"] for source in merged.identity["sources"]] == [parent.root_hash for parent in parents]
    assert verify(tmp_path / "merged") == merged and merged.root_hash not in {parent.root_hash for parent in parents}
    assert rows_of(tmp_path / "merged") == rows_of(given["first"]) + rows_of(given["second"])
    assert "byte for byte, of 2 datasets" in in_words(tmp_path / "merged")


def test_splits_are_disjoint_whole_and_merge_to_all_of_it_again(given: dict[str, Path], tmp_path: Path) -> None:
    assert main(["split", str(given["first"]), "--shares", "{train: 0.6, heldout: 0.4}", "--output", str(tmp_path)]) == 0
    rows = {name: rows_of(tmp_path / name) for name in ("train", "heldout")}
    assert rows["train"] and rows["heldout"] and sorted(rows["train"] + rows["heldout"]) == sorted(rows_of(given["first"]))
    again = derive.merge([tmp_path / "train", tmp_path / "heldout", given["second"]], tmp_path / "again")
    assert verify(tmp_path / "again") == again  # a merge of splits: lineage two deep
    assert sorted(rows_of(tmp_path / "again")) == sorted(rows_of(given["first"]) + rows_of(given["second"]))


def test_the_same_rows_are_not_taken_twice(given: dict[str, Path], tmp_path: Path) -> None:
    derive.take([derive.Source.of(given["first"], [0, 1])], tmp_path / "some")
    with pytest.raises(DatasetError, match="hold the same noise"):
        derive.merge([tmp_path / "some", given["first"]], tmp_path / "merged")
    rewrite.reshard(given["first"], 7, tmp_path / "resharded")
    for pair in ([tmp_path / "resharded", given["first"]], [given["first"], tmp_path / "resharded"]):
        with pytest.raises(DatasetError, match="rows of one dataset"):
            derive.merge(pair, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_what_does_not_fit_is_refused_by_field(given: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(given["first"]), str(given["other"]), "--output", str(tmp_path / "merged")]) == 2
    assert "epsilon: 0.125 here, 0.25 there" in capsys.readouterr().err
    derive.merge([given["first"], given["second"]], tmp_path / "merged")
    with pytest.raises(DatasetError, match="holds a dataset of another identity"):
        derive.merge([given["second"], given["first"]], tmp_path / "merged")
    with pytest.raises(DatasetError, match=r"has the shards 0\.\."):
        derive.Source.of(given["first"], [10_000])
    for options in (["--shards", "x"], ["--rows", "5"], ["--rows", "0:9999999"], [], ["--rows", "0:2", "--shards", "1"]):
        assert main(["subset", str(given["first"]), *options, "--output", str(tmp_path / "no")]) == 2
    assert not (tmp_path / "no").exists() and numbers("0-3,7") == [0, 1, 2, 3, 7]


def test_an_interrupted_merge_goes_on_and_damage_on_the_way_is_not_committed(given: dict[str, Path], tmp_path: Path) -> None:
    whole = derive.merge([given["first"], given["second"]], tmp_path / "whole")
    broken = tmp_path / "second"
    derive.take([derive.Source.of(given["second"])], broken)
    last = Manifest.read(broken).receipts[-1]
    content = bytearray((broken / "shards" / last.file).read_bytes())
    content[len(content) // 2] ^= 1
    (broken / "shards" / last.file).write_bytes(content)
    with pytest.raises(DatasetError, match="its receipt says"):
        derive.merge([given["first"], broken], tmp_path / "merged")
    done = listed(tmp_path / "merged")
    assert len(done) == len(whole.receipts) - 1 and not (tmp_path / "merged" / "manifest.json").exists()
    content[len(content) // 2] ^= 1
    (broken / "shards" / last.file).write_bytes(content)
    assert [receipt.sha256 for receipt in derive.merge([given["first"], broken], tmp_path / "merged").receipts] == [r.sha256 for r in whole.receipts]


def test_another_tokenizer_in_the_output_or_the_source_is_refused(given: dict[str, Path], tmp_path: Path) -> None:
    makers: list[Callable[[Path, Path], Manifest]] = [
        lambda source, output: derive.take([derive.Source.of(source, [0])], output),
        lambda source, output: rewrite.rows_between(source, 0, 3, output),
    ]
    for number, make in enumerate(makers):
        output = tmp_path / f"part{number}"
        made, tokenizer = make(given["first"], output), output / "tokenizer" / "tokenizer.json"
        tokenizer.write_text(tokenizer.read_text().replace("<|bos|>", "<|BOS|>"))
        with pytest.raises(DatasetError, match=r"tokenizer\.json is not the tokenizer of this dataset.*fetch it again"):
            make(output, tmp_path / "next")
        (output / "manifest.json").unlink()  # as when it was stopped just before
        with pytest.raises(DatasetError, match=r"tokenizer\.json is not the tokenizer of this dataset.*move it away"):
            make(given["first"], output)
        assert not (tmp_path / "next").exists() and not (output / "manifest.json").exists()
        tokenizer.unlink()
        assert make(given["first"], output) == made == verify(output, 1)


def test_resharding_and_choosing_rows_keep_every_row_as_it_was(given: dict[str, Path], tmp_path: Path) -> None:
    derive.merge([given["first"], given["second"]], tmp_path / "merged")
    rows = rows_of(tmp_path / "merged")
    resharded = rewrite.reshard(tmp_path / "merged", 70, tmp_path / "resharded")
    assert verify(tmp_path / "resharded") == resharded and rows_of(tmp_path / "resharded") == rows
    assert {receipt.rows for receipt in resharded.receipts[:1]} == {70}
    rewrite.rows_between(tmp_path / "merged", 3, 12, tmp_path / "range")
    assert rows_of(tmp_path / "range") == rows[3:12] and verify(tmp_path / "range")
    for name in ("sample", "same"):
        rewrite.sample_rows(tmp_path / "merged", 11, 5, tmp_path / name)
    sampled = rows_of(tmp_path / "sample")
    assert len(sampled) == 11 and sampled == [row for row in rows if row in sampled] == rows_of(tmp_path / "same")
    rewrite.sample_rows(tmp_path / "merged", 11, 6, tmp_path / "otherwise")
    assert rows_of(tmp_path / "otherwise") != sampled


def test_conversion_is_lossless_there_and_back(given: dict[str, Path], tmp_path: Path) -> None:
    def hashes(dataset: Path) -> list[str]:
        """Of the shards without what they say of themselves."""
        manifest = Manifest.read(dataset)
        found = []
        for receipt in manifest.receipts:
            digest = hashlib.sha256()
            for batch in manifest.open(dataset, receipt):
                for column in (batch.sequence_id, batch.input_ids, batch.length, batch.log_prob, batch.kept, *batch.entries, batch.offset):
                    digest.update(f"{column.dtype}{column.shape}".encode() + np.ascontiguousarray(column).tobytes())
            found.append(digest.hexdigest())
        return found

    old = rewrite.convert(given["first"], tmp_path / "one", 1, "zstd")
    assert verify(tmp_path / "one") == old and old.identity["format_version"] == 1 and rows_of(tmp_path / "one") == rows_of(given["first"])
    assert hashes(tmp_path / "one") != hashes(given["first"])
    rewrite.convert(tmp_path / "one", tmp_path / "two", 2, "none")
    assert hashes(tmp_path / "two") == hashes(given["first"]) and verify(tmp_path / "two")
    for ours, theirs in zip(Manifest.read(tmp_path / "two").receipts, Manifest.read(given["first"]).receipts, strict=True):
        assert (ours.nll_sum, ours.kept, ours.tokens, ours.characters_in) == (theirs.nll_sum, theirs.kept, theirs.tokens, theirs.characters_in)
    with pytest.raises(DatasetError, match="already"):
        rewrite.convert(given["first"], tmp_path / "no", 2, "none")


@pytest.mark.parametrize("suffix", [".safetensors", ".npy"])
def test_exported_noise_is_what_the_decoder_makes(given: dict[str, Path], tmp_path: Path, suffix: str) -> None:
    output = tmp_path / f"noise{suffix}"
    assert main(["export", str(given["first"]), "--rows", "2:5", "--output", str(output)]) == 0
    if suffix == ".npy":
        g_BLV, ids_BL = np.load(output), np.load(tmp_path / "noise.input_ids.npy")
    else:
        g_BLV, ids_BL = load_file(output)["g"], load_file(output)["input_ids"]
    manifest = Manifest.read(given["first"])
    reader = manifest.open(given["first"], manifest.receipts[0])
    rows = reader.batch(0)[2:5]
    noisy_BL = rows.has_noise("parallel")
    row_N, position_N = (torch.from_numpy(at) for at in np.nonzero(noisy_BL))
    sequence_N = torch.from_numpy(rows.sequence_id.view(np.int64).copy())[row_N]
    kept_N = torch.from_numpy(rows.kept.astype(np.int64))[row_N, position_N]
    sketch = Sketch(torch.from_numpy(rows.log_prob.copy())[row_N, position_N], kept_N, *(torch.from_numpy(c.astype(np.int64)) for c in rows.entries))
    token_N = torch.from_numpy(rows.input_ids.astype(np.int64))[row_N, position_N]
    wanted_NV = decode(sketch, token_N, philox.rows(int(reader.metadata.seed), sequence_N, position_N), reader.metadata.codec)
    assert np.array_equal(g_BLV[noisy_BL], wanted_NV.numpy()) and np.isnan(g_BLV[~noisy_BL]).all() and np.array_equal(ids_BL, rows.input_ids)
    before = sha256_file(output)
    assert main(["export", str(given["first"]), "--rows", "2:5", "--output", str(output)]) == 2 and sha256_file(output) == before
    with pytest.raises(DatasetError, match="draw is 1"):
        dense.export_dense(given["first"], 0, 1, tmp_path / "x.npy", draw=1)


def test_a_lineage_that_makes_no_sense_is_refused(given: dict[str, Path], tmp_path: Path) -> None:
    derive.merge([given["first"], given["second"]], tmp_path / "merged")
    plan = Plan.read(tmp_path / "merged")
    for sources in (
        [{"parent": 7, "shards": [[0, 1]]}],
        [{"parent": 0, "shards": [[0]]}],
        [{"parent": 0}],
        "all",
        [{"parent": 0, "shards": [[0, 1]]}],
    ):
        identity = plan.identity | {"sources": sources}
        Plan(identity, plan.environment, plan.shards).rewrite(tmp_path / "merged")
        with pytest.raises(DatasetError):
            Plan.read(tmp_path / "merged").metadata(1)
