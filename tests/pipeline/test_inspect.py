"""What a person is told of a dataset: in words, as JSON, as a picture, and what of it can be trusted. No Ray."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from noise.dataset import Manifest, Plan, open_shard, root_hash
from noise.local import LocalFolder
from noise.receipt import shard_name
from noise.storage import DatasetError
from pipeline import glimpse, trust
from pipeline.__main__ import main
from pipeline.inspect import in_words, plot, summary
from pipeline.uses import uses
from tests.pipeline.test_verify import seal
from tests.pipeline.world import World, make_here, save_teacher
from tests.trainer.chain import write_chain
from trainer.config import TrainConfig
from trainer.loop import train


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = World(tmp_path_factory.mktemp("inspect"))
    assert made.run("tokenizer") == 0
    save_teacher(made.root / "teacher")
    make_here(["extract", *made.options(teacher__model=made.root / "teacher", packing__shard_characters=4000)])
    seal(made.output)
    return made


@pytest.fixture
def copy(world: World, tmp_path: Path) -> Path:
    shutil.copytree(world.output, tmp_path / "dataset")
    return tmp_path / "dataset"


def test_a_screen_says_what_it_holds_what_it_costs_and_shows_its_text(world: World) -> None:
    said = in_words(world.output, rows=3)
    totals = Manifest.read(world.output).totals
    assert f"{totals['bytes'] / totals['tokens']:.1f} bytes (dense fp16: 640, {640 * totals['tokens'] / totals['bytes']:.0f} times as much)" in said
    assert f"teacher's NLL {totals['nll_sum'] / totals['tokens']:.3f} nats" in said and "Document " in said
    assert "good for    token-level distillation" in said and "not for     sequence-level distillation" in said
    assert len([line for line in said.splitlines() if line.startswith("  shard ")]) == 3


def test_kept_entries_by_position_are_those_of_the_rows_seen(world: World, tmp_path: Path) -> None:
    value, manifest = summary(world.output), Manifest.read(world.output)
    parts = []
    for shard in value["looked_at_shards"]:
        reader = open_shard(world.output, manifest.receipts[shard], manifest.identity)
        parts += [reader.batch(number) for number in sorted({0, reader.batches // 2})]
    kept, noisy = (
        np.sum([get(rows) for rows in parts], axis=0) for get in (lambda r: r.kept.sum(0, dtype=int), lambda r: r.has_noise("parallel").sum(0))
    )
    assert value["kept_by_position"][0] is None
    assert np.allclose(value["kept_by_position"][1:], kept[1:] / noisy[1:])
    assert glimpse.bars([0.0, 4.0, 8.0]) == " ▄█" and glimpse.bars([None] * 200) == " " * 64
    plot(world.output, tmp_path / "new" / "kept.png")
    assert (tmp_path / "new" / "kept.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(("extraction", "possible"), [("parallel", "yy?yny"), ("sequential", "yynnyy"), ("none", "ynnnnn")])
def test_uses_follow_from_the_extraction_and_say_why(extraction: str, possible: str) -> None:
    for draws in (1, 3):
        found = uses({"extraction": extraction, "draws": draws, "epsilon": 0.125})
        expected = possible.replace("?", "y" if draws > 1 else "n")
        assert "".join("ny"[use.possible] for use in found) == expected and all(use.why for use in found)


def test_many_shards_are_inspected_in_seconds_and_at_most_three_are_opened(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of them here; reading receipts is all that grows with their number."""
    count = 5_000
    manifest, plan = Manifest.read(copy), Plan.read(copy)
    receipts = [replace(manifest.receipts[shard % 2], shard=shard, file=shard_name(shard)) for shard in range(count)]
    Plan(plan.identity, plan.environment, [plan.shards[0]] * count).rewrite(copy)
    Manifest(plan.identity, receipts, root_hash(plan.identity, receipts)).save(copy, {})
    content = [(copy / "shards" / shard_name(shard)).read_bytes() for shard in (0, 1)]
    for shard in (0, (count - 1) // 2, count - 1):
        (copy / "shards" / shard_name(shard)).write_bytes(content[shard % 2])
    opened: list[str] = []
    mapped = LocalFolder.map
    monkeypatch.setattr(LocalFolder, "map", lambda self, name: opened.append(name) or mapped(self, name))
    monkeypatch.setattr(glimpse, "look", lambda folder, manifest, rows: look(folder, replace_open(manifest), rows))
    began = time.process_time()
    said = summary(copy, rows=2)
    assert time.process_time() - began < 6 and said["shards"] == count and 0 < len(opened) <= glimpse.SHARDS


look = glimpse.look


def replace_open(manifest: Manifest) -> Any:
    """A shard under another's number is refused, as it must be; here they are told from their own."""

    class Lenient:
        identity, receipts = manifest.identity, manifest.receipts

        def open(self, folder: Any, receipt: Any, check_hash: bool = True) -> Any:
            from noise.shard import ShardReader

            return ShardReader(folder.path(f"shards/{receipt.file}"), folder.map(f"shards/{receipt.file}"))

    return Lenient()


def test_what_strangers_wrote_is_shown_harmlessly(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan.read(copy)
    replace(plan, environment=plan.environment | {"teacher": "evil\x1b[2J\x1b]0;\u202e\n  root hash   forged"}).rewrite(copy)
    (copy / "tokenizer" / "tokenizer.json").write_text('{"model": {"type": "Pickle"}}')
    assert main(["inspect", str(copy)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\u202e" not in shown and "evil\\x1b[2J" in shown and "\n  root hash   forged" not in shown
    assert "no text:" in shown


def test_an_identity_that_says_nothing_of_itself_is_said_to(tmp_path: Path) -> None:
    folder = write_chain(tmp_path / "chain", rows=6, shards=1)
    with pytest.raises(DatasetError, match="--json prints what there is"):
        in_words(folder)
    assert summary(folder)["totals"]["rows"] == 6


# trust


def test_the_verdict_tells_proven_measured_and_claimed_apart(world: World) -> None:
    verdict = trust.judge(world.output, rows=6, model=str(world.root / "teacher"), seed=1)
    assert "SOUND, measured on 6 rows" in verdict.verdict and not verdict.damage
    proven, measured, claimed = (" ".join(lines) for lines in (verdict.proven, verdict.measured, verdict.claimed))
    assert Manifest.read(world.output).root_hash in proven and "noise stream" in proven
    assert "outside its bound" in measured and "fit of teacher and corpus: +" in measured
    assert "licence: not stated" in claimed and "corpus files" in claimed and "no entry that should have been kept is missing" not in claimed
    alone = trust.judge(world.output)
    assert "without its teacher" in alone.verdict and alone.measured[0].startswith("nothing:")
    assert any("no entry that should have been kept is missing" in line for line in alone.claimed)


def test_damage_is_the_verdict_and_the_exit_code(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy / "shards" / "00001.arrow"
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["inspect", str(copy), "--trust", "--json"]) == 1
    value = json.loads(capsys.readouterr().out)
    assert "DAMAGED" in value["verdict"] and "00001.arrow" in value["damage"][0] and value["proven"] == []


def test_a_run_that_pins_a_root_hash_refuses_any_other_dataset_with_both_values(tmp_path: Path) -> None:
    folder = write_chain(tmp_path / "chain", rows=8, shards=1)
    config = TrainConfig(output=str(tmp_path / "student"), device="cpu", threads=1)
    config.data.path, config.data.root_hash = str(folder), "0" * 64
    with pytest.raises(DatasetError, match=f"data.root_hash is {'0' * 64}, but .* has root hash {Manifest.read(folder).root_hash}"):
        train(config)
    assert not (tmp_path / "student").exists()
    config.data.check_hashes = False
    with pytest.raises(ValueError, match=r"data\.check_hashes is false"):
        train(config)
    config.data.check_hashes, config.data.root_hash = True, Manifest.read(folder).root_hash
    config.student.layers, config.student.hidden, config.student.heads, config.optim.steps, config.optim.global_batch = 1, 16, 2, 1, 4
    train(config)
    assert (tmp_path / "student" / "student.json").exists()
