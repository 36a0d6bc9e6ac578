"""A dataset of format version 1 reads, verifies and trains as the same dataset of the version that is written now."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from noise.commit import commit_shard
from noise.dataset import Manifest, Plan, open_shard
from noise.shard import FORMAT_VERSION, Layout, Rows
from noise.sketch import Codec
from pipeline.verify import verify_shard
from tests.noise import second_reader, version_one
from tests.noise.teachers import shard_rows
from tests.noise.test_second_reader import teacher_of
from trainer.data import NoiseDataset

CODECS = [Codec(97), Codec(97, 0.1, 3), Codec(70_000), Codec(70_000, 0.1)]


@pytest.fixture(scope="module", params=CODECS, ids=lambda codec: f"V {codec.vocab_size}, epsilon {codec.epsilon}, draws {codec.draws}")
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Codec]:
    """(a dataset of version 1, the same noise in the current version, their codec)."""
    codec, folder = request.param, tmp_path_factory.mktemp("versions")
    teacher = teacher_of(codec)
    count, block_length = ([70, 3], 12) if codec.vocab_size < 1000 else ([2], 5)
    version_one.write_dataset(folder / "old", teacher, codec, count, block_length)
    identity = Manifest.read(folder / "old").identity
    plan = Plan(identity | {"format_version": FORMAT_VERSION}, {}, count)
    plan.write(folder / "new")
    for shard, rows in enumerate(count):
        commit_shard(folder / "new", plan.metadata(shard), shard_rows(teacher, plan.metadata(shard), rows), rows)
    Manifest.write(folder / "new", plan)
    return folder / "old", folder / "new", codec


def rows_of(folder: Path) -> Rows:
    manifest = Manifest.read(folder)
    return Rows.concatenate([rows for receipt in manifest.receipts for rows in open_shard(folder, receipt, manifest.identity)])


def test_versions_differ_in_width_and_agree_in_content(both: tuple[Path, Path, Codec]) -> None:
    old, new = rows_of(both[0]), rows_of(both[1])
    for column in ("sequence_id", "input_ids", "length", "log_prob", "kept", "index", "code", "offset"):
        assert np.array_equal(getattr(old, column), getattr(new, column)), column
    assert (old.input_ids.dtype, old.kept.dtype, len(old.entries)) == (np.int32, np.uint16, 2)
    sizes = [Manifest.read(folder).totals["bytes"] for folder in both[:2]]
    assert both[2] == Codec(70_000, 0.1) or sizes[1] < sizes[0], "wide entries with two-byte codes stay as they were"


def test_version_one_passes_verification(both: tuple[Path, Path, Codec]) -> None:
    manifest = Manifest.read(both[0])
    for receipt in manifest.receipts:
        reader = open_shard(both[0], receipt, manifest.identity)
        assert reader.metadata.format_version == 1
        verify_shard(reader, receipt, manifest.identity | {"tokenizer": {"bos": 0}})


def test_training_batches_and_their_noise_are_the_same(both: tuple[Path, Path, Codec]) -> None:
    ours, theirs = (NoiseDataset(folder) for folder in both[:2])
    row_B = np.array([len(ours) - 1, 0, len(ours) // 2])
    a, b = ours.batch(row_B, both[2].draws - 1), theirs.batch(row_B, both[2].draws - 1)
    assert torch.equal(a.input_ids_BL, b.input_ids_BL)
    where_N = a.valid_BL.flatten().nonzero()[:, 0]
    assert torch.equal(a.noise_at(where_N), b.noise_at(where_N))


def test_the_second_reader_knows_both(both: tuple[Path, Path, Codec]) -> None:
    for old, new in zip(second_reader.read_dataset(both[0]), second_reader.read_dataset(both[1]), strict=True):
        assert (old.metadata["format_version"], new.metadata["format_version"]) == (1, FORMAT_VERSION)
        assert all(np.array_equal(old.columns[name], new.columns[name]) for name in old.columns)


@pytest.mark.parametrize(
    ("codec", "widths"),
    [
        (Codec(256, 0.01), ["uint16", "uint8", "uint16", "uint16"]),
        (Codec(257, 0.1), ["uint16", "uint16", "uint16", "uint16"]),
        (Codec(65_536), ["uint16", "uint8", "uint16", "uint8"]),
        (Codec(65_537), ["int32", "uint8", "uint32"]),
        (Codec(65_537, 0.125, 2), ["int32", "uint16", "uint32"]),
        (Codec(2**24, 0.5, 5), ["int32", "uint8", "uint32"]),
        (Codec(2**24 + 1), ["int32", "uint8", "uint32", "uint8"]),
        (Codec(65_537, 0.1), ["int32", "uint16", "uint32", "uint16"]),
    ],
    ids=str,
)
def test_columns_are_as_narrow_as_the_codec_allows(codec: Codec, widths: list[str]) -> None:
    identity = {"format_version": 2, "vocab_size": codec.vocab_size, "block_length": 8, "extraction": "parallel"}
    metadata = Plan(identity | {"seed": "1", "epsilon": codec.epsilon, "draws": codec.draws}, {}, []).metadata(0)
    layout = Layout.of(metadata)
    assert [str(kind) for kind in (layout.input_ids, layout.kept, *layout.entries.values())] == widths


def test_one_byte_counts_overflow_with_a_chance_below_e_to_the_minus_forty() -> None:
    """Chernoff's bound for a sum of independent trials, at the largest E_0 of the stream in every draw and the largest R / c that has them."""
    expected = 8 * 24 * np.log(2)
    assert 256 * np.log(256 / expected) - 256 + expected > 40
