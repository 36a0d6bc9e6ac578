"""The commands without Ray: recipes, tokenizer, plan, token-only datasets, and what they say to bad input."""

import errno
import json
import os
from pathlib import Path

import pytest
import yaml

from noise.dataset import Manifest, open_shard
from noise.storage import sha256_file
from pipeline.__main__ import main, parse
from pipeline.corpus import Corpus
from pipeline.inspect import summary
from pipeline.tokenizer import EOS, Tokenizer
from tests.pipeline.world import BLOCK, VOCAB, World, texts

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def world(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> World:
    made = World(tmp_path, capsys)
    assert made.run("tokenizer") == 0
    return made


@pytest.fixture
def finished(world: World) -> World:
    assert world.run("extract", noise__extraction="none") == 0
    return world


@pytest.mark.parametrize(
    "path", [path for path in sorted(RECIPES.glob("*.yaml")) if "corpus" in yaml.safe_load(path.read_text())], ids=lambda path: path.name
)
def test_every_recipe_of_the_pipeline_parses(path: Path) -> None:
    recipe = parse(["extract", "--config", str(path), "--packing.block_length", "19"])[1]
    assert recipe.packing.block_length == 19 and recipe.output == yaml.safe_load(path.read_text())["output"]


def test_naming_a_teacher_takes_its_own_tokenizer_unless_one_is_named() -> None:
    demo = ["extract", "--config", str(RECIPES / "demo.yaml")]
    assert parse(demo)[1].tokenizer.path is not None
    assert parse([*demo, "--teacher.model", "someone/some-model"])[1].tokenizer.path is None
    assert parse([*demo, "--teacher.model", "someone/some-model", "--tokenizer.path", "mine"])[1].tokenizer.path == "mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus.splitt": "train"}, "corpus.splitt"),
        ({"corpus.split": "test"}, "corpus.split is 'test'; it must be one of train, held_out, all"),
        ({"packing.block_length": "long"}, "packing.block_length"),
        ({"noise.extraction": "sequential"}, "noise.extraction is 'sequential'"),
        ({"noise.extraction": "none", "noise.epsilon": 0.7}, "epsilon is 0.7; it must be in [2^-10, ln 2)"),
        ({"noise.extraction": "none", "noise.draws": 0}, "draws is 0"),
        ({"noise.compression": "lz4"}, "noise.compression is 'lz4'; it must be one of none, zstd"),
        ({"teacher.model": None}, "there is no teacher"),
        ({"teacher.model": "/no/such/folder"}, "neither a folder"),
        ({"noise.extraction": "none", "tokenizer.path": "/no/such/folder"}, "python -m pipeline tokenizer"),
        ({"noise.extraction": "none", "corpus.files": "/no/such/*.txt"}, "'/no/such/*.txt' matches no file"),
        ({"noise.extraction": "none", "corpus.held_out": 0, "corpus.split": "held_out"}, "there is nothing to read"),
        ({"noise.extraction": "none", "corpus.held_out": 1e-9, "corpus.split": "held_out"}, "the held_out split of the corpus is empty"),
    ],
)
def test_a_recipe_that_cannot_be_used_gets_one_line_and_exit_code_2(world: World, changes: dict[str, object], message: str) -> None:
    code, line = world.refusal("extract", **changes)
    assert code == 2 and message in line
    assert not world.output.exists()


def test_an_empty_corpus_is_refused(world: World) -> None:
    (world.root / "empty.jsonl").write_text("\n")
    code, line = world.refusal("extract", corpus__files=world.root / "empty.jsonl", corpus__split="all", noise__extraction="none")
    assert code == 2 and "the corpus is empty" in line


def test_a_text_field_that_is_not_there_is_refused_with_those_that_are(world: World) -> None:
    (world.root / "c.jsonl").write_text('{"body": "text", "id": 1}\n')
    code, line = world.refusal("plan", corpus__files=world.root / "c.jsonl", noise__extraction="none")
    assert code == 2 and "no field 'text'; it has 'body', 'id': set corpus.text_field" in line


def test_the_tokenizer_spells_every_text_and_reads_no_special_token_in_it(world: World) -> None:
    tokenizer = Tokenizer(world.root / "tokenizer")
    strange = [f"{EOS} 東京 \x00 tab\t", *texts(3)]
    ids = list(tokenizer.encode(strange))
    assert len(tokenizer) == VOCAB and all(tokenizer.eos not in document and tokenizer.bos not in document for document in ids)
    assert [tokenizer._tokenizer.decode(document, clean_up_tokenization_spaces=False) for document in ids] == strange


def test_training_the_tokenizer_again_changes_nothing_and_another_is_refused(world: World) -> None:
    before = sha256_file(world.root / "tokenizer" / "tokenizer.json")
    assert world.run("tokenizer") == 0
    code, line = world.refusal("tokenizer", tokenizer__vocab_size=VOCAB + 1)
    assert code == 2 and f"vocab_size: {VOCAB + 1} here, {VOCAB} there" in line
    assert sha256_file(world.root / "tokenizer" / "tokenizer.json") == before


def test_a_token_only_dataset_holds_every_token_of_the_training_documents(finished: World) -> None:
    manifest = Manifest.read(finished.output)
    tokenizer = Tokenizer(finished.output / "tokenizer")
    rows = [rows for receipt in manifest.receipts for rows in open_shard(finished.output, receipt, manifest.identity)]
    stream = [int(token) for part in rows for row, length in zip(part.input_ids, part.length, strict=True) for token in row[1:length]]
    chosen = {document.text for document in Corpus.open(finished.recipe().corpus).documents()}
    documents = [text for text in texts(40) if text in chosen]
    assert stream == [token for ids in tokenizer.encode(documents) for token in [*ids, tokenizer.eos]]
    assert manifest.totals["characters_in"] == sum(map(len, documents)) and manifest.totals["kept"] == manifest.totals["tokens"] == 0


def test_extract_is_idempotent_and_verify_and_inspect_agree_with_it(finished: World, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (finished.output / "shards").iterdir()} | {
        "manifest": sha256_file(finished.output / "manifest.json")
    }
    assert finished.run("extract", noise__extraction="none") == 0
    after = {path: path.stat().st_mtime_ns for path in (finished.output / "shards").iterdir()} | {
        "manifest": sha256_file(finished.output / "manifest.json")
    }
    assert before == after
    assert main(["verify", str(finished.output)]) == 0
    capsys.readouterr()
    assert main(["inspect", str(finished.output), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value == summary(finished.output) and value["root_hash"] == Manifest.read(finished.output).root_hash
    assert main(["inspect", str(finished.output)]) == 0
    assert value["root_hash"] in capsys.readouterr().out


def test_zstd_makes_the_same_rows_in_fewer_bytes_and_is_part_of_the_identity(finished: World) -> None:
    plain, compressed = finished.output, finished.root / "compressed"
    assert finished.run("extract", noise__extraction="none", noise__compression="zstd", output=compressed) == 0
    assert main(["verify", str(compressed)]) == 0
    ours, theirs = Manifest.read(plain), Manifest.read(compressed)
    assert (ours.identity["compression"], theirs.identity["compression"]) == ("none", "zstd")
    assert theirs.totals["bytes"] < 0.8 * ours.totals["bytes"]
    for a, b in zip(ours.receipts, theirs.receipts, strict=True):
        batches = zip(open_shard(plain, a, ours.identity), open_shard(compressed, b, theirs.identity), strict=True)
        assert all((x.input_ids == y.input_ids).all() and (x.length == y.length).all() for x, y in batches)
    assert "format version, compression | 2, zstd" in (compressed / "README.md").read_text()


def test_held_out_and_training_data_have_their_own_seeds(finished: World) -> None:
    held_out = finished.root / "held_out"
    assert finished.run("extract", noise__extraction="none", corpus__split="held_out", output=held_out) == 0
    assert Manifest.read(held_out).identity["seed"] != Manifest.read(finished.output).identity["seed"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packing.block_length": BLOCK + 1}, f"block_length: {BLOCK + 1} here, {BLOCK} there"),
        ({"noise.seed": 5}, "seed: '5' here"),
        ({"corpus.split": "all"}, "corpus.split: 'all' here, 'train' there"),
        ({"packing.shard_characters": 999}, "shards.characters: 999 here, 1000 there"),
    ],
)
def test_another_identity_in_the_same_folder_is_refused_by_field(finished: World, changes: dict[str, object], message: str) -> None:
    before = finished.hashes()
    code, line = finished.refusal("extract", **{"noise.extraction": "none", **changes})
    assert code == 2 and message in line and finished.hashes() == before


def test_a_changed_corpus_file_is_refused_by_field(finished: World) -> None:
    (finished.root / "corpus" / "003.txt").write_text("something else, longer than it was before")
    _, line = finished.refusal("extract", noise__extraction="none")
    assert "003.txt has 41 bytes, the plan saw" in line


def test_a_full_disk_leaves_what_is_committed_and_the_next_run_finishes_the_same_bytes(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert world.run("plan", noise__extraction="none") == 0
    sync = os.fsync

    def full(descriptor: int) -> None:
        if len(list((world.output / "shards").glob("*.json"))) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    code, line = world.refusal("extract", noise__extraction="none")
    assert code == 1 and "No space left on device" in line
    committed = {name: digest for name, digest in world.hashes().items() if name.endswith(".json")}
    assert committed and not any(name.endswith(".tmp") for name in world.hashes())
    monkeypatch.setattr(os, "fsync", sync)
    assert world.run("extract", noise__extraction="none") == 0
    assert committed.items() <= world.hashes().items()
    undisturbed = World(world.root)
    undisturbed.output = world.root / "undisturbed"
    assert undisturbed.run("extract", noise__extraction="none") == 0
    assert undisturbed.hashes() == world.hashes()


def damage(world: World, kind: str) -> None:
    shard = world.output / "shards" / "00001.arrow"
    content = bytearray(shard.read_bytes())
    if kind == "truncated":
        shard.write_bytes(content[:-100])
    elif kind == "edited":
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    elif kind == "missing":
        shard.unlink()
    elif kind == "unfinished":
        (world.output / "manifest.json").unlink()
    elif kind == "tokenizer":
        (world.output / "tokenizer" / "tokenizer.json").write_text("{}")
    elif kind == "version":
        plan = json.loads((world.output / "manifest.json").read_text())
        plan["identity"]["format_version"] = 3
        (world.output / "manifest.json").write_text(json.dumps(plan))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "00001.arrow has"),
        ("edited", "00001.arrow has sha256"),
        ("missing", "00001.arrow is missing"),
        ("unfinished", "is unfinished"),
        ("tokenizer", "tokenizer.json has sha256"),
        ("version", "format version 3; this code reads versions 1 and 2"),
    ],
)
def test_verify_names_the_damage(finished: World, kind: str, message: str) -> None:
    damage(finished, kind)
    code, line = finished.refusal("verify")
    assert code == (2 if kind == "unfinished" else 1) and message in line


def test_load_dataset_reads_the_folder(finished: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from datasets import load_dataset

    rows = load_dataset(str(finished.output), cache_dir=str(tmp_path / "cache"))["train"]
    assert len(rows) == Manifest.read(finished.output).totals["rows"]
    assert set(rows.column_names) == {"sequence_id", "input_ids", "length", "log_prob", "kept", "index", "code"}
    assert len(rows[0]["input_ids"]) == BLOCK


def test_ray_accepts_the_cluster_file() -> None:
    import ray
    from ray.autoscaler._private.util import prepare_config, validate_config

    cluster = yaml.safe_load((RECIPES.parent / "ray_cluster.yaml").read_text())
    validate_config(prepare_config(cluster))
    assert f":{ray.__version__}-" in cluster["docker"]["image"]
