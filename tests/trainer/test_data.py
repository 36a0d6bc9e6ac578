"""The loader: order is a function of (seed, epoch), exact for any number of processes and across a resume."""

from itertools import islice

import numpy as np
import pytest
import torch

from noise import philox
from noise.posterior import posterior_gumbel
from noise.storage import DatasetError
from tests.trainer.chain import transition, write_chain
from trainer.data import Batch, NoiseDataset, Place, batches, epoch_order


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return NoiseDataset(write_chain(tmp_path_factory.mktemp("chain") / "dataset", rows=150, shards=3, draws=2, ragged=True))


def equal(a: Batch, b: Batch) -> bool:
    tensors = [(getattr(a, name), getattr(b, name)) for name in vars(a) if isinstance(getattr(a, name), torch.Tensor)]
    return all(torch.equal(x, y) for x, y in tensors + list(zip(vars(a.sketch).values(), vars(b.sketch).values(), strict=True)))


def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch_alone():
    first = epoch_order(1000, seed=3, epoch=0)
    assert sorted(first) == list(range(1000))
    assert np.array_equal(first, epoch_order(1000, seed=3, epoch=0))
    assert not np.array_equal(first, epoch_order(1000, seed=3, epoch=1))
    assert not np.array_equal(first, epoch_order(1000, seed=4, epoch=0))


@pytest.mark.parametrize("world", [2, 4])
def test_global_batches_are_the_same_on_any_number_of_processes(dataset, world):
    alone = list(islice(batches(dataset, 5, 40, Place()), 9))  # 150 rows: epochs end inside batches 3 and 7
    for step, parts in enumerate(zip(*(islice(batches(dataset, 5, 40, Place(), rank, world), 9) for rank in range(world)), strict=True)):
        for rank, (part, place) in enumerate(parts):
            assert equal(part, alone[step][0].split(40 // world)[rank])
            assert place == alone[step][1]


def test_a_resume_across_an_epoch_boundary_sees_the_batches_it_would_have_seen(dataset):
    alone = list(islice(batches(dataset, 5, 40, Place()), 9))
    for stopped in (2, 3, 4, 7):
        resumed = islice(batches(dataset, 5, 40, alone[stopped][1], rank=1, world=2), 9 - stopped - 1)
        for (part, _), (whole, _) in zip(resumed, alone[stopped + 1 :], strict=True):
            assert equal(part, whole.split(20)[1])


def test_every_row_is_seen_once_in_each_epoch_and_the_draw_changes_with_it(dataset):
    seen: dict[int, list[int]] = {0: [], 1: []}
    for batch, _ in islice(batches(dataset, 9, 50, Place()), 6):
        for draw in (0, 1):
            seen[draw] += batch.sequence_id_B[batch.draw_B == draw].tolist()
    assert sorted(seen[0]) == sorted(seen[1]) and len(set(seen[0])) == 150


def test_noise_of_a_batch_is_the_posterior_within_the_sketch_bound(dataset):
    batch = dataset.batch(np.array([3, 149, 77, 3]), draw_B=np.array([0, 1, 1, 1]))
    where = batch.valid_BL.flatten().nonzero()[:, 0]
    g = batch.noise_at(where)
    row, position = where // 8, where % 8
    token = batch.input_ids_BL[row, position]
    log_p = transition(13)[batch.input_ids_BL[row, position - 1]]
    exact = posterior_gumbel(log_p, token, philox.rows(77, batch.sequence_id_B[row], position, batch.draw_B[row]))
    assert ((log_p + g).argmax(-1) == token).all()
    assert (g - exact).min() > -0.125 - 1e-5 and (g - exact).max() <= 0.125 + 1e-5
    assert torch.equal(g[::3], batch.noise_at(where[::3]))


def test_rows_come_back_as_they_were_written_with_few_shards_open(tmp_path):
    folder = write_chain(tmp_path / "dataset", rows=90, shards=3)
    wide, narrow = NoiseDataset(folder), NoiseDataset(folder, open_shards=1)
    rows = np.array([0, 89, 31, 60, 2, 45])
    assert equal(wide.batch(rows), narrow.batch(rows))
    assert wide.batch(rows).sequence_id_B.tolist() == [0, (2 << 32) + 29, (1 << 32) + 1, 2 << 32, 2, (1 << 32) + 15]


def test_damaged_and_unfinished_datasets_are_refused_by_name(tmp_path):
    folder = write_chain(tmp_path / "dataset")
    shard = folder / "shards" / "00001.arrow"
    good = shard.read_bytes()
    shard.write_bytes(good[:-100])
    with pytest.raises(DatasetError, match=r"00001\.arrow has .* bytes, its receipt says"):
        NoiseDataset(folder).batch(np.array([150]))
    edited = bytearray(good)
    edited[len(good) // 2] ^= 1
    shard.write_bytes(bytes(edited))
    with pytest.raises(DatasetError, match=r"00001\.arrow has sha256"):
        NoiseDataset(folder).batch(np.array([150]))
    (folder / "manifest.json").unlink()
    with pytest.raises(DatasetError, match="unfinished"):
        NoiseDataset(folder)


def test_a_dataset_of_tokens_alone_has_no_noise_to_give(tmp_path):
    batch = NoiseDataset(write_chain(tmp_path / "dataset", extraction="none")).batch(np.arange(4))
    with pytest.raises(DatasetError, match="no noise"):
        batch.noise_at(torch.tensor([1]))
