"""The loader: order is a function of the seed, exact for any number of processes and across a resume; batches are rows as they were written."""

import json
import shutil
import subprocess
import sys
import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from noise import philox
from noise.commit import commit_shard
from noise.dataset import Manifest, Plan
from noise.posterior import posterior_gumbel
from noise.shard import Rows
from noise.sketch import Codec
from noise.storage import DatasetError
from tests.noise import version_one
from tests.noise.teachers import BigramTeacher, identity_of
from tests.trainer.chain import transition, write_chain
from trainer import data, gather
from trainer.__main__ import parse
from trainer.data import Batch, Mixture, NoiseDataset, Place, batches, open_data, unigram


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two datasets of one teacher, with seeds of their own."""
    folder = tmp_path_factory.mktemp("chain")
    common = {"draws": 2, "ragged": True}
    return [write_chain(folder / "one", rows=150, shards=3, **common), write_chain(folder / "two", rows=60, shards=5, seed=78, text_seed=2, **common)]


@pytest.fixture(scope="module")
def dataset(folders):
    return NoiseDataset(folders[0])


@pytest.fixture(scope="module", params=["global", "windows", "mixture", "mixture of extracted and written text"])
def source(folders, request, tmp_path_factory):
    """What the contract holds for."""
    if request.param == "mixture of extracted and written text":
        written = write_chain(tmp_path_factory.mktemp("chain") / "written", rows=60, shards=3, extraction="sequential", seed=79, ragged=True)
        return Mixture([NoiseDataset(folders[0], window=2), NoiseDataset(written)], [0.7, 0.3])
    if request.param == "mixture":
        return Mixture([NoiseDataset(folders[0], window=2), NoiseDataset(folders[1])], [3, 1])
    return NoiseDataset(folders[0], window=0 if request.param == "global" else 2)


def equal(a: Batch, b: Batch) -> bool:
    tensors = [(getattr(a, name), getattr(b, name)) for name in vars(a) if isinstance(getattr(a, name), torch.Tensor)]
    return all(torch.equal(x, y) for x, y in tensors + list(zip(vars(a.sketch).values(), vars(b.sketch).values(), strict=True)))


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("ordered", [1, 100, 2048], ids=["each batch by itself", "two at once", "many at once"])
def test_global_batches_are_the_same_on_any_number_of_processes(source, world, ordered, monkeypatch):
    alone = list(islice(batches(source, 5, 40, Place()), 9))  # 150 rows: epochs end inside batches 3 and 7
    monkeypatch.setattr(data, "ORDERED", ordered)
    for step, parts in enumerate(zip(*(islice(batches(source, 5, 40, Place(), rank, world), 9) for rank in range(world)), strict=True)):
        for rank, (part, place) in enumerate(parts):
            assert equal(part, alone[step][0].split(40 // world)[rank])
            assert place == alone[step][1]


def test_a_resume_across_an_epoch_boundary_sees_the_batches_it_would_have_seen(source):
    alone = list(islice(batches(source, 5, 40, Place()), 9))
    for stopped in (2, 3, 4, 7):
        for rank in range(2):
            resumed = islice(batches(source, 5, 40, alone[stopped][1], rank, world=2), 9 - stopped - 1)
            for (part, _), (whole, _) in zip(resumed, alone[stopped + 1 :], strict=True):
                assert equal(part, whole.split(20)[rank])


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


def written(folder: Path) -> Rows:
    """All rows of a dataset, read shard by shard."""
    manifest = Manifest.read(folder)
    return Rows.concatenate([rows for receipt in manifest.receipts for rows in manifest.open(folder, receipt)])


@pytest.mark.parametrize(("vocab_size", "about"), [(40, {}), (40, {"compression": "zstd"}), (70_000, {}), (40, {"format_version": 1})])
@pytest.mark.parametrize("machine_code", [True, False])
def test_batches_are_the_rows_of_the_shards_in_any_width(vocab_size, about, machine_code, tmp_path, monkeypatch):
    folder = write_any(tmp_path / "data", vocab_size, about)
    if machine_code:
        gather.warm().join()
    else:
        monkeypatch.setattr(gather, "_loaded", threading.Event())
    dataset, rows = NoiseDataset(folder), written(folder)
    chosen = np.random.default_rng(0).integers(0, len(dataset), 150)
    wide, narrow = dataset.batch(chosen), dataset.batch(chosen, narrow=True)
    assert np.array_equal(wide.input_ids_BL, rows.input_ids[chosen]) and np.array_equal(wide.length_B, rows.length[chosen])
    assert np.array_equal(wide.sequence_id_B.numpy().view(np.uint64), rows.sequence_id[chosen])
    assert np.array_equal(wide.sketch.log_prob_N, rows.log_prob[chosen].flatten()) and np.array_equal(wide.sketch.kept_N, rows.kept[chosen].flatten())
    assert np.array_equal(wide.sketch.index_K, np.concatenate([rows[at : at + 1].index for at in chosen.tolist()]))
    assert np.array_equal(wide.sketch.code_K, np.concatenate([rows[at : at + 1].code for at in chosen.tolist()]))
    assert narrow.input_ids_BL.dtype != torch.int64 and equal(narrow.to(torch.device("cpu")), wide)
    assert all(equal(a, b.to(torch.device("cpu"))) for a, b in zip(wide.split(40), narrow.split(40), strict=True))


def write_any(folder: Path, vocab_size: int, about: dict) -> Path:
    """A dataset of 70 and 30 rows with that codec and format, of entries at random."""
    codec = Codec(vocab_size)
    if about.get("format_version") == 1:
        version_one.write_dataset(folder, BigramTeacher(vocab_size), codec, [70, 30])
        return folder
    plan = Plan(identity_of(codec, 12) | about, {}, [70, 30])
    plan.write(folder)
    random = np.random.default_rng(3)
    for shard, count in enumerate(plan.shards):
        kept = random.integers(0, 9, (count, 12)).astype(np.uint16)
        total = int(kept.sum())
        entries = random.integers(0, vocab_size, total).astype(np.uint32), random.integers(0, 255, total).astype(np.uint8)
        rows = Rows(
            np.arange(count, dtype=np.uint64) + (shard << 32), random.integers(0, vocab_size, (count, 12)).astype(np.int32),
            random.integers(1, 13, count).astype(np.int32), -random.random((count, 12), np.float32), kept, entries,
            np.concatenate([[0], kept.sum(1, dtype=np.int64).cumsum()]),
        )  # fmt: skip
        commit_shard(folder, plan.metadata(shard), [rows], characters_in=0)
    Manifest.write(folder, plan)
    return folder


@pytest.mark.parametrize("ahead", [1, 3, 4, 7])
def test_batches_are_made_ahead_but_no_more_than_was_asked_for(folders, ahead, monkeypatch):
    dataset, made = NoiseDataset(folders[0]), []
    made_so_far, batch = threading.Condition(), dataset.batch

    def counted(*args, **more):
        with made_so_far:
            made.append(1)
            made_so_far.notify_all()
        return batch(*args, **more)

    monkeypatch.setattr(dataset, "batch", counted)
    source = batches(dataset, 1, 10, Place(), ahead=ahead)
    for taken in range(1, 9):
        next(source)
        with made_so_far:
            assert made_so_far.wait_for(lambda least=taken: len(made) >= least, 60)
        assert len(made) <= taken + ahead
    source.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches ahead")]


def test_no_more_shards_are_open_than_allowed_and_rows_stay_right(folders, tmp_path):
    shutil.copytree(folders[1], tmp_path / "copy")
    wide, narrow = NoiseDataset(folders[1]), NoiseDataset(tmp_path / "copy", open_shards=2)
    for start in (0, 17, 40, 3):
        rows = np.array([start, start + 12])
        assert equal(wide.batch(rows), narrow.batch(rows))
        assert narrow.open_count() <= 2
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if f"{tmp_path}/copy/shards/" in line]
    assert len(maps) == narrow.open_count() == 2


def test_a_shard_in_another_ones_place_needs_no_new_table(folders):
    dataset = NoiseDataset(folders[0], open_shards=1)
    dataset.batch(np.array([0]))
    table = dataset._mapped._address
    dataset.batch(np.array([len(dataset) - 1]))
    assert dataset._mapped._address is table and dataset.open_count() == 1


def test_a_mixture_gives_each_dataset_its_share_and_every_row_once_an_epoch(folders):
    one, two = (NoiseDataset(folder) for folder in folders)
    mixture = Mixture([one, two], [5, 1])
    rows, epochs = mixture.order(3).at(0, 900)
    of_two = rows >= len(one)
    assert abs(of_two.mean() - 1 / 6) < 0.05
    assert np.array_equal(rows[~of_two], one.order(3).at(0, int((~of_two).sum()))[0])
    assert sorted(rows[of_two][: len(two)] - len(one)) == list(range(len(two))) and epochs[of_two].max() == of_two.sum() // 60
    batch = mixture.batch(rows[:64])
    assert set(batch.seed_B[torch.from_numpy(of_two[:64])].tolist()) == {78} and set(batch.seed_B[torch.from_numpy(~of_two[:64])].tolist()) == {77}
    apart = [dataset.batch(at) for dataset, at in ((one, rows[:64][~of_two[:64]]), (two, rows[:64][of_two[:64]] - len(one)))]
    assert torch.equal(batch.input_ids_BL[torch.from_numpy(of_two[:64])], apart[1].input_ids_BL)
    assert torch.isfinite(batch.noise_at(batch.valid_BL.flatten().nonzero()[:, 0])).all()
    assert unigram(mixture).exp().sum() == pytest.approx(1, abs=1e-5)


def test_datasets_that_do_not_fit_are_refused_by_field(folders, tmp_path):
    other = write_chain(tmp_path / "other", draws=1, block_length=9)
    with pytest.raises(DatasetError, match=r"data\.mix .*other does not fit .*one: block_length: 9 here, 8 there$"):
        Mixture([NoiseDataset(folders[0]), NoiseDataset(other)], [1, 1])
    with pytest.raises(ValueError, match=r"weight .* is 0; it must be above 0"):
        Mixture([NoiseDataset(folder) for folder in folders], [1, 0])
    assert len({Mixture([NoiseDataset(folder) for folder in folders], [1, share]).manifest.root_hash for share in (1, 2)}) == 2


def test_a_recipe_names_one_dataset_or_a_mixture(folders):
    mix = json.dumps([{"path": str(folders[0]), "weight": 3}, {"path": str(folders[1])}])
    mixture = open_data(parse(["--output", "x", "--data.mix", mix]).data)
    assert isinstance(mixture, Mixture) and mixture.weights == [0.75, 0.25] and len(mixture) == 210
    with pytest.raises(ValueError, match="name a dataset in one of the two"):
        open_data(parse(["--output", "x", "--data.mix", mix, "--data.path", str(folders[0])]).data)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_batches_become_the_same_batches_on_a_gpu(folders):
    dataset = NoiseDataset(folders[0])
    cpu, pinned = (list(islice(batches(dataset, 5, 40, Place(), narrow=pin, pin=pin), 5)) for pin in (False, True))
    for (ours, _), (theirs, _) in zip(cpu, pinned, strict=True):
        assert theirs.input_ids_BL.is_pinned() and theirs.sketch.index_K.is_pinned() and theirs.seed_B.is_pinned()
        assert equal(theirs.to(torch.device("cuda")).to(torch.device("cpu")), ours)


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


def test_a_script_that_ends_in_the_middle_of_an_epoch_ends_in_silence(folders):
    script = """
import sys
from trainer import gather
from trainer.data import NoiseDataset, Place, batches
read = batches(NoiseDataset(sys.argv[1]), 1, 8, Place())
next(read)
gather.warm().join()  # with numba, a generator outlives the modules that closing it needs
"""
    done = subprocess.run([sys.executable, "-c", script, folders[0]], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
