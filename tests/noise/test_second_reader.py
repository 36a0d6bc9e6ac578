"""The specification alone is enough to read a dataset: another reader finds the same noise and every promised bound."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from noise import philox, sketch
from noise.dataset import Manifest, open_shard
from noise.decode import decode
from tests.noise import second_reader
from tests.noise.teachers import BigramTeacher, write_dataset


@pytest.fixture(scope="module", params=[(97, 0.125, 1), (70_000, 0.1, 2), (70_000, 0.125, 1)], ids=["narrow", "wide", "packed"])
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, sketch.Codec]:
    """Three shards for narrow codes and ids; one short one for wide ones."""
    codec = sketch.Codec(*request.param)
    folder = tmp_path_factory.mktemp("dataset")
    narrow = codec.vocab_size < 1000
    write_dataset(folder, teacher_of(codec), codec, [130, 64, 3] if narrow else [2], block_length=12 if narrow else 5)
    return folder, codec


class WideTeacher(BigramTeacher):
    """A bigram teacher whose V x V table would be too large: the last token only shifts one distribution."""

    def log_probs(self, ids_BL: torch.Tensor) -> torch.Tensor:
        before_BL = ids_BL.roll(1, dims=1)
        before_BL[:, 0] = 0
        log_probs_V = torch.log_softmax(-1.2 * torch.log(torch.arange(self.vocab_size) + 2.0), -1)
        return torch.stack([torch.stack([log_probs_V.roll(-int(last)) for last in row]) for row in before_BL])

    def texts(self, count: int, block_length: int, seed: int) -> torch.Tensor:
        ids_BL = torch.randint(self.vocab_size, (count, block_length), generator=torch.Generator().manual_seed(seed))
        ids_BL[:, 0] = 0
        return ids_BL


def teacher_of(codec: sketch.Codec) -> BigramTeacher:
    return BigramTeacher(codec.vocab_size) if codec.vocab_size < 1000 else WideTeacher(codec.vocab_size)


def test_it_knows_nothing_of_ours() -> None:
    tree = ast.parse(Path(second_reader.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported <= {"__future__", "hashlib", "json", "math", "dataclasses", "pathlib", "typing", "numpy", "pyarrow"}


def test_it_rebuilds_every_shard_within_every_bound(dataset: tuple[Path, sketch.Codec]) -> None:
    folder, codec = dataset
    manifest = Manifest.read(folder)
    for receipt, theirs in zip(manifest.receipts, second_reader.read_dataset(folder), strict=True):
        ours = open_shard(folder, receipt, manifest.identity)
        ids_BL = torch.from_numpy(theirs.columns["input_ids"]).long()
        log_probs_BLV = teacher_of(codec).log_probs(ids_BL).numpy()
        for draw in range(codec.draws):
            decoded = np.concatenate(second_reader.rebuild(theirs, draw, log_probs_BLV))
            assert np.abs(np.concatenate([our_noise(rows, ours.metadata.seed, codec, draw) for rows in ours]) - decoded).max() <= 1e-5


def our_noise(rows, seed: str, codec: sketch.Codec, draw: int) -> np.ndarray:  # type: ignore[no-untyped-def]
    """Noise of a record batch by this project's own decoder, at all positions that have any; words are compared on the way."""
    has_noise_BL = (np.arange(rows.input_ids.shape[1]) >= 1) & (np.arange(rows.input_ids.shape[1]) < rows.length[:, None])
    row_N, position_N = has_noise_BL.nonzero()
    places_N5 = philox.rows(int(seed), torch.from_numpy(rows.sequence_id.astype(np.int64))[row_N], torch.from_numpy(position_N), draw)
    theirs_NV = np.concatenate([
        second_reader.words(int(seed), int(rows.sequence_id[row]), np.array([position]), draw, codec.vocab_size)[0]
        for row, position in zip(row_N[:20], position_N[:20], strict=True)
    ])  # fmt: skip
    assert np.array_equal(philox.words(places_N5[:20], codec.vocab_size).numpy(), theirs_NV)
    tensors = (torch.from_numpy(array.astype(kind)) for array, kind in [
        (rows.log_prob[has_noise_BL], np.float32), (rows.kept[has_noise_BL], np.int64), (rows.index, np.int64), (rows.code, np.int64),
    ])  # fmt: skip
    token_N = torch.from_numpy(rows.input_ids[has_noise_BL].astype(np.int64))
    return decode(sketch.Sketch(*tensors), token_N, places_N5, codec).numpy()


def test_it_rejects_the_noise_of_another_teacher(dataset: tuple[Path, sketch.Codec]) -> None:
    folder, codec = dataset
    shard = second_reader.read_dataset(folder)[-1]
    ids_BL = torch.from_numpy(shard.columns["input_ids"]).long()
    log_probs_BLV = teacher_of(codec).log_probs(ids_BL).roll(1, dims=-1).numpy()
    with pytest.raises(AssertionError, match="the token's log-prob"):
        second_reader.rebuild(shard, 0, log_probs_BLV)


def test_it_rejects_one_flipped_bit(dataset: tuple[Path, sketch.Codec], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(dataset[0], folder)
    path = folder / "shards" / "00000.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(AssertionError, match="sha256"):
        second_reader.read_dataset(folder)
