"""A finished dataset is sound, or every damaged file is named: bytes flipped everywhere, forged rows, the teacher run again. No Ray."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from noise import philox
from noise.dataset import Manifest, Plan, open_shard
from noise.decode import decode
from noise.folder import Folder
from noise.receipt import committed
from noise.shard import Rows, ShardMetadata
from noise.sketch import Codec, Sketch, encode
from noise.storage import DatasetError, readable_json
from pipeline import deep, verify
from pipeline.__main__ import main
from pipeline.card import write_card
from pipeline.config import DamageError
from pipeline.lease import Holder, Lease
from pipeline.run_log import RunLog
from pipeline.soundness import beaten
from pipeline.stages import save_recipe
from tests.noise.teachers import SHAPES, log_probs, sample
from tests.pipeline.world import World, make_here, save_teacher


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A dataset of a few shards with card, recipe and tokenizer, made in this process, and its teacher."""
    made = World(tmp_path_factory.mktemp("verify"))
    assert made.run("tokenizer") == 0
    save_teacher(made.root / "teacher")
    settings = {"teacher__model": made.root / "teacher", "packing__shard_characters": 4000}
    make_here(["extract", *made.options(**settings)])
    save_recipe(made.recipe(**settings), made.output)
    Lease(Folder.of(made.output))  # of a driver that died at the very end
    seal(made.output)
    with RunLog(made.output) as log:
        log.write("begin", shards=3)
        log.write("end", root_hash="0" * 64)
    return made


def seal(folder: Path) -> Manifest:
    plan = Plan.read(folder)
    return Manifest.write(folder, plan, before=lambda manifest: write_card(folder, plan, manifest))


@pytest.fixture
def copy(world: World, tmp_path: Path) -> Path:
    shutil.copytree(world.output, tmp_path / "dataset")
    return tmp_path / "dataset"


def damage_of(folder: Path, processes: int | None = None) -> list[str]:
    try:
        return verify.examine(folder, processes).damage
    except DamageError as error:
        return error.lines


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def offsets(content: bytes, count: int, seed: int) -> Iterator[int]:
    """The first and last bytes, and some between."""
    chance = random.Random(seed)
    yield from (0, len(content) - 1)
    yield from (chance.randrange(len(content)) for _ in range(count - 2))


def test_a_sound_dataset_has_no_damage_and_no_file_without_a_hash(world: World) -> None:
    found = verify.examine(world.output)
    assert (found.damage, found.uncovered, found.sealed, found.receipts) == ([], [], True, True)
    assert verify.verify(world.output) == Manifest.read(world.output)
    assert {path.relative_to(world.output).parts[0] for path in files_of(world.output)} == {
        "README.md", "driver.json", "manifest.json", "plan.json", "recipe.yaml", "run.jsonl", "seal.json", "shards", "tokenizer",
    }  # fmt: skip


def test_one_changed_byte_in_any_file_is_found_and_the_file_named(copy: Path) -> None:
    """In every file one byte at a time, in all files at once: each must be named on its own."""
    paths = [path for path in files_of(copy) if path.name not in ("manifest.json", "seal.json")]
    whole = {path: path.read_bytes() for path in paths}
    places = {path: list(offsets(content, 14, seed)) for seed, (path, content) in enumerate(whole.items())}
    for trial in range(14):
        for path, content in whole.items():
            changed = bytearray(content)
            changed[places[path][trial]] ^= 1 << trial % 8
            path.write_bytes(changed)
        lines = damage_of(copy)
        missed = [str(path) for path in paths if not any(str(path) in line for line in lines)]
        assert not missed, f"trial {trial}: {missed}"
    for path, content in whole.items():
        path.write_bytes(content)
    assert damage_of(copy) == []


@pytest.mark.parametrize(("name", "count"), [("manifest.json", 300), ("seal.json", 40), ("run.jsonl", 40), ("driver.json", 100)])
def test_one_changed_byte_in_what_holds_its_own_hashes_is_found(copy: Path, name: str, count: int) -> None:
    path = copy / name
    whole = path.read_bytes()
    for number, at in enumerate(offsets(whole, count, 1)):
        changed = bytearray(whole)
        changed[at] ^= 1 << number % 8
        path.write_bytes(changed)
        (line,) = damage_of(copy)
        assert str(path) in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "README.md").unlink(), "README.md is missing, and seal.json names it"),
        (lambda folder: (folder / "shards" / "00001.json").unlink(), "00001.json is missing, though other receipts are there"),
        (lambda folder: (folder / "shards" / "00001.arrow").unlink(), "00001.arrow is missing"),
        (lambda folder: shutil.copy(folder / "shards" / "00001.arrow", folder / "shards" / "99999.arrow"), "99999.arrow is no shard of this dataset"),
        (lambda folder: (folder / "tokenizer" / "tokenizer.json").write_text("{}"), "tokenizer.json has sha256"),
    ],
)
def test_what_is_missing_or_does_not_belong_is_named(copy: Path, change: Any, message: str) -> None:
    change(copy)
    (line,) = damage_of(copy)
    assert message in line


def test_what_no_hash_covers_is_said(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "notes.txt").write_text("mine")
    (copy / "run.jsonl").write_text('{"event": "begin"}\n{"event": "end"}\n')  # as it was written before its lines had hashes
    (copy / "driver.json").write_text(json.dumps(Holder.here(0.0).__dict__))
    verify.verify(copy)
    assert "no hash covers driver.json, notes.txt, run.jsonl" in capsys.readouterr().err
    value = json.loads((copy / "manifest.json").read_text())
    value.pop("manifest_hash")
    (copy / "seal.json").unlink()
    (copy / "manifest.json").write_text(json.dumps(value))
    verify.verify(copy)
    assert "the manifest is of an older form" in capsys.readouterr().err


def test_several_processes_find_what_one_finds(copy: Path) -> None:
    for name in ("00000.json", "00002.arrow"):
        path = copy / "shards" / name
        path.write_bytes(path.read_bytes()[:-2])
    alone = damage_of(copy, 1)
    assert len(alone) == 2 and damage_of(copy, 2) == alone


def test_exit_codes_tell_sound_damaged_not_to_be_verified_and_not_read(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["verify", str(copy)]) == 0
    assert main(["verify", str(tmp_path / "nothing")]) == 2
    assert main(["verify", str(copy), "--processes", "none"]) == 2
    assert main(["verify", str(copy), "--deep", "2", "--teacher.model", str(tmp_path / "nothing")]) == 2
    value = json.loads((copy / "manifest.json").read_text())
    value["identity"]["format_version"] = 9
    from noise.seal import sealed

    (copy / "plan.json").rename(tmp_path / "plan.json")
    assert main(["verify", str(copy)]) == 1
    (copy / "manifest.json").write_text(readable_json(sealed(value)))
    assert main(["verify", str(copy)]) == 2

    def fails(*_: object) -> bytes:
        raise OSError(5, "Input/output error", "some disk")

    monkeypatch.setattr(Folder.of(copy).__class__, "read", fails)
    assert main(["verify", str(copy)]) == 3


# what only the rows can tell: shards whose hashes, receipts and manifest agree with each other


def rows_of(folder: Path, shard: int) -> Rows:
    manifest = Manifest.read(folder)
    return Rows.concatenate(list(open_shard(folder, manifest.receipts[shard], manifest.identity)))


def forge(folder: Path, shard: int, **changes: Any) -> list[str]:
    """Columns of a shard exchanged, everything hashed anew; returns what verification says."""
    from noise.commit import commit_shard

    rows, receipt = rows_of(folder, shard), committed(folder)[shard]
    (folder / "shards" / f"{shard:05d}.json").unlink()
    commit_shard(folder, Plan.read(folder).metadata(shard), [replace(rows, **changes)], receipt.characters_in)
    seal(folder)
    return damage_of(folder)


def forgeries(rows: Rows) -> dict[str, tuple[dict[str, Any], str]]:
    index, code = (entries.copy() for entries in rows.entries)
    position = np.repeat(np.arange(rows.kept.size), rows.kept.reshape(-1))
    at = int(np.flatnonzero(np.diff(position) == 0)[0])  # two entries of one position
    swapped = index.copy()
    swapped[[at, at + 1]] = swapped[[at + 1, at]]
    token = index.copy()
    token[at] = rows.input_ids.reshape(-1)[position[at]]
    other = index.copy()
    other[at] = next(i for i in range(int(index[at]) - 1, -1, -1) if i != token[at] and (not at or position[at - 1] != position[at]))
    rare = code.copy()
    rare[:] = 221
    certain = code.copy()
    certain[:] = 0
    positive = rows.log_prob.copy()
    positive[0, 1] = 0.5
    bos = rows.input_ids.copy()
    bos[0, 0] = 7
    twice = rows.sequence_id.copy()
    twice[1] = twice[0]
    return {
        "order": ({"entries": (swapped, code)}, "not ascending"),
        "token": ({"entries": (np.sort(token), code)}, "the realised token is among the kept entries|not ascending|no draw"),
        "entry": ({"entries": (other, code)}, "no draw of the noise stream explains"),
        "rare": ({"entries": (index, rare)}, "no draw of the noise stream explains"),
        "certain": ({"entries": (index, certain)}, "add up to more than 1"),
        "log_prob": ({"log_prob": positive}, "log_prob is above 0"),
        "bos": ({"input_ids": bos}, "does not begin with BOS"),
        "twice": ({"sequence_id": twice}, "no draw of the noise stream explains|a sequence_id occurs twice"),
        "noise of another row": ({"sequence_id": rows.sequence_id + np.uint64(1000)}, "no draw of the noise stream explains"),
    }


@pytest.mark.parametrize("name", ["order", "token", "entry", "rare", "certain", "log_prob", "bos", "twice", "noise of another row"])
def test_rows_that_cannot_be_are_found_though_every_hash_agrees(copy: Path, name: str) -> None:
    changes, message = forgeries(rows_of(copy, 1))[name]
    (line,) = forge(copy, 1, **changes)
    assert "00001.arrow" in line and any(part in line for part in message.split("|")), line


def test_the_token_wins_over_the_whole_vocabulary_and_no_kept_entry_can_beat_it() -> None:
    """The invariant by brute force, and what of it verification computes: kept entries alone, whatever their codes."""
    codec, count = Codec(50, 0.6, 3), 40
    metadata = ShardMetadata(2, "5", 0.6, 0.125, 3, 50, count + 1, "parallel", 0, "")
    rows_N5 = philox.rows(5, torch.zeros(count, dtype=torch.int64), torch.arange(1, count + 1))
    for number, shape in enumerate(SHAPES):
        log_probs_NV = log_probs(shape, count, 50, number)
        token_N = sample(log_probs_NV, number)
        sketch = encode(log_probs_NV, token_N, rows_N5, codec)
        for draw in range(codec.draws):
            g_NV = decode(sketch, token_N, philox.with_draw(rows_N5, draw), codec).double()
            scores_NV = log_probs_NV.double() + g_NV
            assert bool((scores_NV.amax(1) - scores_NV.gather(1, token_N[:, None])[:, 0] <= 1e-5).all())
        assert not beaten(sketch, token_N, rows_N5, metadata).any()
        anything = Sketch(sketch.log_prob_N, sketch.kept_N, sketch.index_K, torch.randint(0, 222, sketch.code_K.shape))
        assert not beaten(anything, token_N, rows_N5, metadata).any(), "log(p / (E + p E_0)) < -log E_0 for every p: what is checked is arithmetic"
        wrong = Sketch(torch.full_like(sketch.log_prob_N, torch.nan), *sketch.tensors()[1:])
        assert beaten(wrong, token_N, rows_N5, metadata).all()


# the teacher itself


def test_deep_verification_finds_every_entry_within_its_bound(world: World) -> None:
    report = deep.again(world.output, 12, str(world.root / "teacher"), seed=3)
    assert isinstance(report, deep.Report)
    assert (report.rows, report.failures, report.entries) == (12, 0, report.positions * 320)
    assert report.worst < 1e-4 and report.unkept[0] > -1e-5 and 0.05 < report.unkept[1] < 0.12501 and -0.125 < report.kept[0] < -0.05
    assert (
        report == deep.again(world.output, 12, None, seed=3)
        and deep.again(world.output, 10**6, None).rows == Manifest.read(world.output).totals["rows"]
    )
    difference, error = report.fit()
    assert difference > 1 and 0 < error < 0.5, "an untrained teacher is surprised by English"


def test_deep_verification_misses_an_entry_that_was_taken_away(copy: Path) -> None:
    """Nothing without the teacher can know of it; at the first position that keeps two, the most probable one goes."""
    rows = rows_of(copy, 0)
    index, code = rows.entries
    gone = int(np.argmin(code))
    kept = rows.kept.copy()
    kept.reshape(-1)[np.repeat(np.arange(kept.size), rows.kept.reshape(-1))[gone]] -= 1
    offset = np.concatenate([[0], np.cumsum(kept.sum(1, dtype=np.int64))])
    assert forge(copy, 0, entries=(np.delete(index, gone), np.delete(code, gone)), kept=kept, offset=offset) == []
    report = deep.again(copy, 10**6)
    assert isinstance(report, deep.Report)
    assert report.failures == 1 and report.first_failure.startswith("shard 0, row ") and report.worst > 0.05
    assert main(["verify", str(copy), "--deep", "1000000"]) == 1


def test_another_teacher_is_refused_and_so_is_a_dataset_without_one(world: World, tmp_path: Path) -> None:
    save_teacher(tmp_path / "teacher", poison="Z", tokenizer=world.root / "tokenizer")
    with pytest.raises(DatasetError, match=r"is not the teacher that wrote this dataset: teacher\.weights_sha256"):
        deep.again(world.output, 2, str(tmp_path / "teacher"))
    assert world.run("extract", noise__extraction="none", output=tmp_path / "tokens") == 0
    with pytest.raises(DatasetError, match="there is no teacher to run again"):
        deep.again(tmp_path / "tokens", 2)
