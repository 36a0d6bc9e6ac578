"""Teacher, corpus or prompts that changed between plan and run are refused, by name, and what is committed stays."""

from pathlib import Path

import pytest

from noise.dataset import Plan
from pipeline import prompts
from pipeline.__main__ import main, parse
from pipeline.plan import write_plan
from pipeline.worker import Worker
from tests.pipeline.world import World, save_teacher


@pytest.fixture
def world(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> World:
    made = World(tmp_path, capsys)
    assert made.run("tokenizer") == 0
    save_teacher(made.root / "teacher", vocab_size=325)
    return made


def retrain(world: World) -> None:
    """Other weights in the same folder: as many, under the same name."""
    save_teacher(world.root / "teacher", vocab_size=325, poison=" river", tokenizer=world.root / "tokenizer")


def assert_refused(world: World, arguments: list[str], *reasons: str) -> None:
    """One line with the reasons, exit code 2, and nothing in the dataset's folder has changed."""
    assert world.capsys is not None
    before = contents(world.output)
    world.capsys.readouterr()
    assert main(arguments) == 2 and contents(world.output) == before
    line = world.capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and all(reason in line for reason in reasons)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_teacher_that_changed_since_the_plan_is_refused_by_its_weights(world: World) -> None:
    options = world.options(teacher__model=world.root / "teacher")
    assert main(["plan", *options]) == 0
    retrain(world)
    for command in ("plan", "extract"):
        assert_refused(world, [command, *options], "teacher.weights_sha256: ")


def test_a_worker_that_starts_later_refuses_a_teacher_that_changed_meanwhile(world: World) -> None:
    assert world.run("plan", teacher__model=world.root / "teacher") == 0
    worker = Worker(world.recipe(teacher__model=world.root / "teacher"), Plan.read(world.output).environment["corpus_roots"])
    assert not worker.load().failure
    retrain(world)
    outcome = worker.load()
    assert outcome.fatal and f"the teacher {world.root / 'teacher'} was changed since the plan: teacher.weights_sha256: " in outcome.failure


def test_prompts_that_changed_are_refused_by_their_file_and_so_is_another_teacher(world: World) -> None:
    options = {
        "output": world.output, "corpus.files": world.files, "tokenizer.path": world.root / "tokenizer", "teacher.model": world.root / "teacher",
        "generate.prompts": "corpus", "generate.prompt_tokens": 4, "generate.block_length": 16,
    }  # fmt: skip
    arguments = ["generate", *(f"--{name}={value}" for name, value in options.items())]
    recipe = parse(arguments)[1]
    plan, _, tokenizer = prompts.make_plan(recipe)
    write_plan(recipe, plan, tokenizer)
    for change, message in (
        ("--teacher.threads=3", "teacher.threads: 3 here, 1 there"),
        ("--teacher.packed=true", "teacher.packed: True here, None there"),
    ):
        assert_refused(world, [*arguments, change], message)
        assert_refused(world, [*arguments, change, "--dry-run"], message)
    own = world.output / "tokenizer" / "tokenizer.json"
    before = own.read_text()
    own.write_text("{}")
    for dry in ([], ["--dry-run"]):
        assert_refused(world, [*arguments, *dry], "is not the tokenizer of this dataset")
    own.write_text(before)
    path = world.root / "corpus" / "003.txt"
    text = path.read_text()
    path.write_text(text.replace("Document", "document"))
    assert_refused(world, arguments, "corpus.files[003.txt].sha256: ")
    path.write_text(text)
    retrain(world)
    assert_refused(world, arguments, "teacher.weights_sha256: ")
