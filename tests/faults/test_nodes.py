"""Ray nodes as separate processes; workers, nodes and drivers are killed at random moments, and not a byte, a row or a finished shard is lost."""

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from noise.dataset import Manifest
from pipeline.__main__ import main
from pipeline.verify import verify
from pipeline.worker import THREADS
from tests.faults.nodes import Nodes, nodes
from tests.pipeline.driver import Driver, driver
from tests.pipeline.world import World, make_here, save_teacher, shard_hashes, texts

pytestmark = pytest.mark.faults
WORKERS = 2
Making = Callable[[World, str], list[str]]
"""(world, name of the dataset) -> the command that makes it"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    with nodes(WORKERS) as running:
        yield running


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = World(tmp_path_factory.mktemp("faults"))
    assert made.run("tokenizer") == 0
    save_teacher(made.root / "teacher", vocab_size=325)
    for number in range(4):
        (made.root / "corpus" / f"{number}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts(250, seed=number)))
    return made


def extraction(world: World, name: str) -> list[str]:
    changes = {"corpus__files": world.root / "corpus" / "*.jsonl", "teacher__model": world.root / "teacher", "packing__shard_characters": 3000}
    return ["extract", *world.options(output=world.root / name, **changes)]


def generation(world: World, name: str) -> list[str]:
    values = {
        "output": world.root / name, "corpus.files": world.root / "corpus" / "0.jsonl", "tokenizer.path": world.root / "tokenizer",
        "teacher.model": world.root / "teacher", "teacher.micro_batch": 4, "generate.prompts": "corpus", "generate.prompt_tokens": 6,
        "generate.samples": 2, "generate.shard_rows": 12, "generate.block_length": 16,
    }  # fmt: skip
    return ["generate", *(f"--{option}={value}" for option, value in values.items())]


class Run:
    """A run of a driver on the cluster, and how things are killed in it."""

    def __init__(self, cluster: Nodes, running: Driver, chance: random.Random):
        self._cluster, self._running, self._chance = cluster, running, chance

    def at_work(self) -> int:
        """The worker that has made the last of the next few shards."""
        for _ in range(self._chance.randint(1, 4)):
            pid = self._running.next("shard")["pid"]
        return int(pid)

    def kill_worker(self) -> None:
        os.kill(self.at_work(), signal.SIGKILL)
        self._died("worker")

    def kill_node(self) -> None:
        self._cluster.of(self.at_work()).kill()
        self._died("node")

    def _died(self, what: str) -> None:
        """Wait until all that the dead worker had in its hands is made elsewhere."""
        killed = time.time()
        died = self._running.next("worker died")
        while died["shards"] == [None]:  # a worker that started on a node that is gone
            died = self._running.next("worker died")
        lost = set(died["shards"])
        assert 0 < len(lost) <= THREADS
        noticed = died["time"]
        event = died
        while lost:
            event = self._running.next("shard")
            lost.discard(event["shard"])
        print(
            f"SIGKILL of {what}: noticed after {noticed - killed:.1f} s, its {len(died['shards'])} shards made after {event['time'] - killed:.1f} s"
        )


def standing(dataset: Path) -> dict[str, tuple[int, int]]:
    """(inode, time of the last change) of every shard that is committed, and of its receipt."""
    committed = [path.with_suffix(suffix) for path in (dataset / "shards").glob("*.json") for suffix in (".json", ".arrow")]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in committed}


def assert_same(dataset: Path, undisturbed: Path) -> None:
    assert shard_hashes(dataset) == shard_hashes(undisturbed)
    assert (dataset / "manifest.json").read_bytes() == (undisturbed / "manifest.json").read_bytes()
    assert Manifest.read(dataset).root_hash == Manifest.read(undisturbed).root_hash
    assert not list(dataset.rglob("*.tmp"))
    verify(dataset)


def undisturbed(world: World, make: Making) -> Path:
    """The dataset as one process makes it."""
    dataset = world.root / f"{make.__name__}-undisturbed"
    if not dataset.exists():
        make_here(make(world, dataset.name))
    return dataset


def on(cluster: Nodes, arguments: list[str]) -> list[str]:
    return [*arguments, f"--ray.address={cluster.address}", f"--ray.workers={WORKERS}"]


@pytest.mark.parametrize(("make", "seed"), [(extraction, 1), (generation, 2)], ids=["extract", "generate"])
def test_killed_workers_nodes_and_driver_lose_and_double_no_row_and_only_work_in_flight_is_redone(
    cluster: Nodes, world: World, make: Making, seed: int
) -> None:
    expected, dataset = undisturbed(world, make), world.root / make.__name__
    arguments, chance = on(cluster, make(world, dataset.name)), random.Random(seed)
    with driver(dataset, arguments, **cluster.variables) as first:
        run = Run(cluster, first, chance)
        run.kill_worker()
        run.kill_node()  # the work goes on with the node that is left
        cluster.start()
        run.kill_node()
        run.kill_worker()
        run.at_work()
        first.kill()
    before = standing(dataset)
    assert before and not (dataset / "manifest.json").exists()

    cluster.start()
    with driver(dataset, arguments, **cluster.variables) as second:
        Run(cluster, second, chance).kill_worker()
        assert second.finish() == 0
    assert_same(dataset, expected)

    assert before.items() <= standing(dataset).items()
    made = [[event["shard"] for event in running.seen if event["event"] == "shard"] for running in (first, second)]
    assert len(set(made[0] + made[1])) == len(made[0]) + len(made[1])
    pending = next(event["pending"] for event in second.seen if event["event"] == "begin")
    unreported = len(Manifest.read(dataset).receipts) - len(made[0]) - pending  # committed by workers that outlived their driver
    assert len(made[1]) == pending and 0 <= unreported <= THREADS * WORKERS
    died = [event["shards"] for event in first.seen + second.seen if event["event"] == "worker died"]
    assert sum(shards != [None] for shards in died) == 5


def test_a_corpus_file_that_changed_after_the_plan_is_named_and_all_but_its_shards_are_made(cluster: Nodes, world: World) -> None:
    dataset = world.root / "edited"
    arguments = on(cluster, extraction(world, dataset.name))
    assert main(["plan", *extraction(world, dataset.name)[1:]]) == 0
    path = world.root / "corpus" / "2.jsonl"
    text = path.read_text()
    path.write_text(text.replace("river", "raver"))
    with driver(dataset, arguments, **cluster.variables) as running:
        assert running.finish() == 1
        failed = next(event["shards"] for event in running.seen if event["event"] == "failed")
        assert all(f"{path} was changed since; restore it" in reason for reason in failed.values())
    assert 0 < len(failed) < len(standing(dataset)) and not (dataset / "manifest.json").exists()
    path.write_text(text)
    with driver(dataset, arguments, **cluster.variables) as running:
        assert running.finish() == 0
        assert next(event["pending"] for event in running.seen if event["event"] == "begin") == len(failed)
    assert_same(dataset, undisturbed(world, extraction))
