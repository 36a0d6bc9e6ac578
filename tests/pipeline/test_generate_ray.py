"""Generation on real Ray processes: the number of workers, a killed worker and a killed driver change no byte."""

import os
import signal
from pathlib import Path

import pytest
import yaml

from noise.dataset import Manifest
from pipeline.__main__ import main, parse
from pipeline.verify import verify
from tests.pipeline.driver import driver
from tests.pipeline.world import World, make_here, save_teacher, shard_hashes

RECIPE = Path(__file__).parents[2] / "recipes" / "demo_generate.yaml"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = World(tmp_path_factory.mktemp("ray"))
    assert made.run("tokenizer") == 0
    save_teacher(made.root / "teacher", vocab_size=325)
    return made


def options(world: World, name: str, workers: int) -> list[str]:
    values = {
        "output": world.root / name, "corpus.files": world.files, "tokenizer.path": world.root / "tokenizer", "teacher.model": world.root / "teacher",
        "teacher.micro_batch": 4, "generate.prompts": "corpus", "generate.prompt_tokens": 6, "generate.samples": 3, "generate.shard_rows": 5,
        "generate.block_length": 16, "ray.workers": workers,
    }  # fmt: skip
    return [f"--{option}={value}" for option, value in values.items()]


def test_killed_worker_and_killed_driver_change_no_byte_and_two_workers_write_what_one_process_writes(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    undisturbed, dataset = world.root / "undisturbed", world.root / "disturbed"
    make_here(["generate", *options(world, "undisturbed", 1)])
    with driver(dataset, ["generate", *options(world, "disturbed", 2)]) as running:
        os.kill(running.next("shard")["pid"], signal.SIGKILL)
        running.next("worker died")
        running.next("shard")
        running.process.kill()
        running.process.wait()
    before = {name: digest for name, digest in shard_hashes(dataset).items() if name.endswith(".json")}
    assert 0 < len(before) < len(Manifest.read(undisturbed).receipts) and not (dataset / "manifest.json").exists()
    assert main(["generate", *options(world, "disturbed", 2)]) == 0
    assert before.items() <= shard_hashes(dataset).items()
    assert shard_hashes(dataset) == shard_hashes(undisturbed)
    assert (dataset / "manifest.json").read_bytes() == (undisturbed / "manifest.json").read_bytes()
    verify(dataset)
    assert main(["replay", str(dataset)]) == 0
    assert "replay: " in capsys.readouterr().err.splitlines()[-1]
    assert main(["replay", str(dataset), "--dtype", "float64", "--rows", "20"]) == 0
    assert main(["replay", str(dataset), "--teacher.model", str(world.root / "tokenizer")]) == 2


def test_the_recipe_parses_and_its_fields_can_be_overridden() -> None:
    recipe = parse(["generate", "--config", str(RECIPE), "--generate.rows", "19"])[1]
    assert recipe.generate.rows == 19 and recipe.output == yaml.safe_load(RECIPE.read_text())["output"]
    prompts = ["--generate.prompts", "corpus", "--generate.rows", "null", "--generate.prompt_tokens", "8", "--corpus.files", "prompts/*.jsonl"]
    assert parse(["generate", "--config", str(RECIPE), *prompts])[1].generate.prompt_tokens == 8
