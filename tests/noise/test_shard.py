"""A shard gives back what was written, byte for byte the same file however it was written, and damage is an error, never a crash."""

from __future__ import annotations

import io
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from noise.commit import commit_shard
from noise.dataset import Plan, open_shard
from noise.shard import Rows, ShardMetadata, ShardReader, ShardWriter
from noise.sketch import Codec
from noise.storage import DatasetError
from tests.noise.teachers import BigramTeacher, identity_of, rows_of, shard_rows

ROOT = Path(__file__).parents[2]
COLUMNS = ("sequence_id", "input_ids", "length", "log_prob", "kept", "index", "code", "offset")


def metadata_of(codec: Codec, extraction: str = "parallel", block_length: int = 12, compression: str = "none") -> ShardMetadata:
    return Plan(identity_of(codec, block_length, extraction) | {"compression": compression}, {}, []).metadata(3)


def rows(count: int, codec: Codec | None = None, extraction: str = "parallel") -> tuple[ShardMetadata, Rows]:
    metadata = metadata_of(codec or Codec(97), extraction)
    return metadata, Rows.concatenate(list(shard_rows(BigramTeacher(metadata.vocab_size), metadata, count)))


def file_of(metadata: ShardMetadata, parts: list[Rows]) -> bytes:
    target = io.BytesIO()
    writer = ShardWriter(target, metadata)
    for part in parts:
        writer.add(part)
    writer.close()
    return target.getvalue()


def assert_same(ours: Rows, theirs: Rows) -> None:
    for column in COLUMNS:
        assert np.array_equal(getattr(ours, column), getattr(theirs, column)), column


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A committed shard of 130 rows: its dataset's folder, receipt and identity."""
    folder, identity = tmp_path_factory.mktemp("whole"), identity_of(Codec(97), 12)
    metadata = Plan(identity, {}, []).metadata(0)
    return folder, commit_shard(folder, metadata, shard_rows(BigramTeacher(97), metadata, 130), 0), identity


@pytest.mark.parametrize("count", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("codec", [Codec(97), Codec(300, 0.1, 4)], ids=["one-byte codes", "two-byte codes"])
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_rows_come_back_as_they_went_in(tmp_path: Path, count: int, codec: Codec, compression: str) -> None:
    metadata, written = rows(count, codec)
    metadata = replace(metadata, compression=compression)
    (tmp_path / "x.arrow").write_bytes(file_of(metadata, [written]))
    reader = ShardReader(tmp_path / "x.arrow")
    batches = list(reader)
    assert reader.metadata == metadata
    assert [len(batch) for batch in batches] == [64] * (count // 64) + [count % 64] * (count % 64 > 0)
    assert_same(Rows.concatenate(batches), written)


@pytest.mark.parametrize("extraction", ["none", "sequential"])
def test_datasets_without_a_sketch_keep_nothing(tmp_path: Path, extraction: str) -> None:
    metadata, written = rows(70, extraction=extraction)
    (tmp_path / "x.arrow").write_bytes(file_of(metadata, [written]))
    found = Rows.concatenate(list(ShardReader(tmp_path / "x.arrow")))
    assert_same(found, written)
    assert not found.kept.any() and not found.log_prob.any() and len(found.index) == 0


@given(cuts=st.lists(st.integers(0, 150), max_size=12))
def test_bytes_do_not_depend_on_the_pieces_rows_were_added_in(cuts: list[int]) -> None:
    metadata, written = rows(150)
    edges = [0, *sorted(cuts), 150]
    assert file_of(metadata, [written[a:b] for a, b in itertools.pairwise(edges)]) == file_of(metadata, [written])


@given(start=st.integers(-5, 75), stop=st.integers(-5, 75))
def test_a_slice_of_rows_holds_their_entries(start: int, stop: int) -> None:
    _, written = rows(70)
    ids_BL, ours = written.input_ids.astype(np.int64), written[start:stop]
    picked = range(70)[start:stop]
    assert len(ours) == len(picked) and ours.offset[0] == 0 and ours.offset[-1] == len(ours.index) == ours.kept.sum()
    for at, row in enumerate(picked):
        assert np.array_equal(ours.index[ours.offset[at] : ours.offset[at + 1]], written.index[written.offset[row] : written.offset[row + 1]])
        assert np.array_equal(ours.input_ids[at], ids_BL[row])


def test_schema_is_the_documented_one() -> None:
    metadata, written = rows(3)
    schema = pa.ipc.open_file(file_of(metadata, [written])).schema
    assert [(field.name, str(field.type), field.nullable) for field in schema] == [
        ("sequence_id", "uint64", False),
        ("input_ids", "fixed_size_list<item: uint16 not null>[12]", False),
        ("length", "int32", False),
        ("log_prob", "fixed_size_list<item: float not null>[12]", False),
        ("kept", "fixed_size_list<item: uint8 not null>[12]", False),
        ("index", "large_list<item: uint16 not null>", False),
        ("code", "large_list<item: uint8 not null>", False),
    ]
    said = json.loads(schema.metadata[b"gumbel"])
    assert sorted(said) == sorted(
        ["format_version", "seed", "epsilon", "step", "draws", "vocab_size", "block_length", "extraction", "shard", "identity_hash", "compression"]
    )
    assert said["format_version"] == 2 and isinstance(said["seed"], str) and said["step"] == 0.125
    wide = [str(field.type) for field in ShardWriter(io.BytesIO(), metadata_of(Codec(65_537, 0.1))).schema][-2:]
    assert wide == ["large_list<item: uint32 not null>", "large_list<item: uint16 not null>"]
    packed = ShardWriter(io.BytesIO(), metadata_of(Codec(65_537))).schema
    assert (packed.names[-1], str(packed.types[-1])) == ("entry", "large_list<item: uint32 not null>")


def test_reading_copies_nothing(whole: tuple[Path, Any, Any]) -> None:
    folder, receipt, identity = whole
    before = pa.total_allocated_bytes()
    batches = list(open_shard(folder, receipt, identity))
    assert pa.total_allocated_bytes() - before < 4096, "columns are views into the mapped file"
    assert all(not getattr(batch, column).flags.owndata for batch in batches for column in COLUMNS if column != "offset")


def test_packed_entries_are_views_until_they_are_asked_for(tmp_path: Path) -> None:
    metadata = metadata_of(Codec(70_000))
    index, code = np.array([0, 65_536, 69_999, 5], np.uint32), np.array([255, 0, 7, 31], np.uint8)
    kept = np.zeros((2, 12), np.uint16)
    kept[0, 1], kept[1, 3] = 3, 1
    ids, length = np.full((2, 12), 69_999, np.int32), np.full(2, 12, np.int32)
    written = Rows(np.arange(2, dtype=np.uint64), ids, length, np.zeros((2, 12), np.float32), kept, (index, code), np.array([0, 3, 4]))
    (tmp_path / "x.arrow").write_bytes(file_of(metadata, [written]))
    found = ShardReader(tmp_path / "x.arrow").batch(0)
    assert len(found.entries) == 1 and not found.entries[0].flags.owndata
    assert_same(found, written)
    assert_same(found[1:2], written[1:2])
    assert file_of(metadata, [found]) == file_of(metadata, [written]) == file_of(metadata, [found[:1], found[1:]])
    (tmp_path / "x.arrow").write_bytes(file_of(metadata, [replace(written, entries=(index + 1, code))]))
    with pytest.raises(DatasetError, match="a kept entry is not below vocab_size 70000"):
        ShardReader(tmp_path / "x.arrow").batch(0)


def test_compression_is_smaller_and_says_so_in_the_file_itself(tmp_path: Path) -> None:
    _, written = rows(200)
    plain, compressed = (file_of(metadata_of(Codec(97), compression=kind), [written]) for kind in ("none", "zstd"))
    assert len(compressed) < 0.8 * len(plain)
    assert pa.ipc.open_file(compressed).read_all().equals(pa.ipc.open_file(plain).read_all())


def test_values_that_do_not_fit_their_column_are_refused() -> None:
    metadata, written = rows(3)
    with pytest.raises(pa.ArrowInvalid):
        file_of(metadata, [replace(written, kept=written.kept.astype(np.int64) + 2**8)])
    with pytest.raises(pa.ArrowInvalid):
        file_of(metadata_of(Codec(70_000)), [replace(written, entries=(written.index, written.code.astype(np.uint16) + 2**8))])


@given(size=st.integers(0, 10**6))
def test_a_truncated_shard_is_named_as_such(whole: tuple[Path, Any, Any], size: int) -> None:
    folder, receipt, identity = whole
    content = (folder / "shards" / receipt.file).read_bytes()
    size %= len(content)
    with copied(folder, content[:size]) as damaged:
        with pytest.raises(DatasetError, match=f"has {size} bytes, its receipt says {len(content)}: truncated or edited"):
            open_shard(damaged, receipt, identity)
        with pytest.raises(DatasetError, match=r"00000\.arrow"):
            list(ShardReader(damaged / "shards" / receipt.file))


@given(at=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_one_flipped_bit_is_found_by_its_hash(whole: tuple[Path, Any, Any], at: int, bit: int) -> None:
    folder, receipt, identity = whole
    content = bytearray((folder / "shards" / receipt.file).read_bytes())
    content[at % len(content)] ^= 1 << bit
    with copied(folder, bytes(content)) as damaged, pytest.raises(DatasetError, match="sha256"):
        open_shard(damaged, receipt, identity)


class copied:  # noqa: N801
    """A folder whose only shard has these bytes, removed afterwards (hypothesis repeats a test many times in one tmp_path)."""

    def __init__(self, beside: Path, content: bytes):
        self.folder, self.content = beside.parent / "damaged", content

    def __enter__(self) -> Path:
        (self.folder / "shards").mkdir(parents=True, exist_ok=True)
        (self.folder / "shards" / "00000.arrow").write_bytes(self.content)
        return self.folder

    def __exit__(self, *_: object) -> None:
        (self.folder / "shards" / "00000.arrow").unlink()


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_without_a_hash_damage_gives_rows_or_one_kind_of_error_and_never_a_crash(tmp_path: Path, compression: str) -> None:
    metadata, written = rows(130)
    (tmp_path / "x.arrow").write_bytes(file_of(replace(metadata, compression=compression), [written]))
    arguments = ["-m", "tests.noise.flip_bytes", str(tmp_path / "x.arrow"), "1000", "1"]
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"the reader died of {done.returncode}: {done.stderr}"
    assert set(json.loads(done.stdout)) == {"rows", "DatasetError"}, done.stdout


def arrow_of(metadata: ShardMetadata, change: dict[str, pa.Array], rows_per_batch: int = 64) -> bytes:
    """A valid Arrow file of 70 rows with some columns exchanged, as a careless writer might leave it."""
    table = pa.ipc.open_file(file_of(metadata, [rows(70)[1]])).read_all()
    columns = {name: change.get(name, table.column(name).combine_chunks()) for name in table.column_names}
    schema = pa.schema([table.schema.field(name).with_type(column.type) for name, column in columns.items()], metadata=table.schema.metadata)
    target = io.BytesIO()
    with pa.ipc.new_file(target, schema) as writer:
        for batch in pa.table(list(columns.values()), schema=schema).to_batches(rows_per_batch):
            writer.write_batch(batch)
    return target.getvalue()


def changes() -> Iterator[tuple[str, dict[str, Any], str]]:
    _, written = rows(70)

    def lists(values: np.ndarray, offset: np.ndarray, kind: pa.DataType) -> pa.Array:
        return pa.LargeListArray.from_arrays(pa.array(offset), pa.array(values, kind), type=pa.large_list(pa.field("item", kind, nullable=False)))

    def fixed(values: np.ndarray, kind: pa.DataType) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1), kind), type=pa.list_(pa.field("item", kind, nullable=False), 12))

    yield "length", {"length": pa.array(written.length * 0, pa.int32())}, "a length is outside 1..12"
    yield "token", {"input_ids": fixed(written.input_ids + 97, pa.uint16())}, "a token id is not below vocab_size 97"
    yield "wide ids", {"input_ids": fixed(written.input_ids, pa.int32())}, r"format version 2 has .*input_ids: fixed_size_list<item: uint16"
    yield "counts", {"kept": fixed(written.kept * 0, pa.uint8())}, "counts in 'kept' do not add up"
    yield "entry", {"index": lists(written.index + 97, written.offset, pa.uint16())}, "a kept entry is not below vocab_size 97"
    moved = written.offset.copy()
    moved[1:-1] = moved[-1] // 2
    yield "offsets", {"code": lists(written.code, moved, pa.uint8())}, "differ in length"
    yield "type", {"sequence_id": pa.array(written.sequence_id, pa.int64())}, "has columns sequence_id: int64"


@pytest.mark.parametrize(("change", "message"), [pytest.param(change, message, id=name) for name, change, message in changes()])
def test_what_does_not_add_up_is_refused(tmp_path: Path, change: dict[str, pa.Array], message: str) -> None:
    metadata = metadata_of(Codec(97))
    (tmp_path / "x.arrow").write_bytes(arrow_of(metadata, change))
    with pytest.raises(DatasetError, match=message):
        list(ShardReader(tmp_path / "x.arrow"))


def test_record_batches_of_other_sizes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.arrow").write_bytes(arrow_of(metadata_of(Codec(97)), {}, rows_per_batch=30))
    with pytest.raises(DatasetError, match="record batch 0 is damaged \\(it has 30 rows, expected 64\\)"):
        list(ShardReader(tmp_path / "x.arrow"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 3}, "has format version 3; this code reads versions 1 and 2"),
        ({"seed": 5}, "field seed is 5, expected str"),
        ({"seed": "x"}, "invalid literal"),
        ({"seed": str(2**64)}, "out of range"),
        ({"epsilon": 0.8}, "epsilon is 0.8"),
        ({"step": 0.1}, "out of range: step 0.1"),
        ({"compression": "lz4"}, "compression is 'lz4'"),
        ({"extraction": "guessed"}, "extraction is 'guessed'"),
        ({"draws": True}, "field draws is True"),
        ({"vocab_size": None}, "field vocab_size is None"),
        ({"block_length": 2**25}, "block_length 33554432"),
    ],
)
def test_metadata_that_is_not_allowed_is_refused_by_field(change: dict[str, Any], message: str) -> None:
    said = vars(metadata_of(Codec(97))) | change
    with pytest.raises(DatasetError, match=message):
        ShardMetadata.from_json(said, "x.arrow")


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "truncated or damaged"), (b"ARROW1\0\0", "truncated or damaged"), (b"text" * 99, "truncated or damaged")]
)
def test_a_file_that_is_no_shard_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.arrow").write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        ShardReader(tmp_path / "x.arrow")
    with pytest.raises(DatasetError, match="does not exist"):
        ShardReader(tmp_path / "y.arrow")


def test_an_arrow_file_of_something_else_is_refused(tmp_path: Path) -> None:
    with pa.ipc.new_file(tmp_path / "x.arrow", pa.schema([("a", pa.int32())])):
        pass
    with pytest.raises(DatasetError, match="not a noise shard"):
        ShardReader(tmp_path / "x.arrow")


def test_an_empty_shard_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "x.arrow").write_bytes(file_of(metadata_of(Codec(97)), []))
    assert list(ShardReader(tmp_path / "x.arrow")) == []


def test_padding_and_the_first_token_have_no_noise() -> None:
    metadata = metadata_of(Codec(97))
    teacher = BigramTeacher(97)
    written = rows_of(teacher, metadata, teacher.texts(4, 12, 0), torch.tensor([1, 2, 7, 12]))
    has_noise_BL = (np.arange(12) >= 1) & (np.arange(12) < written.length[:, None])
    assert not written.kept[~has_noise_BL].any() and not written.log_prob[~has_noise_BL].any()
    assert (written.log_prob[has_noise_BL] < 0).all()
