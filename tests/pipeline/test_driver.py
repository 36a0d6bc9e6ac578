"""Who makes which shard, and what becomes of failures, by a Ray that is played by this file: everything happens when it is waited for."""

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from noise.receipt import Quarantined, Receipt, shard_name
from pipeline import cluster, config, workers
from pipeline.config import WorkError
from pipeline.progress import Progress
from pipeline.worker import Outcome

Act = Callable[["Actor", int, bool], Outcome]
Load = Callable[[int], Outcome]
"""What loading gives the worker that starts after so many others."""


class RayError(Exception):
    pass


class RayTaskError(RayError):
    cause = RuntimeError("CUDA error: device-side assert triggered")


class Actor:
    """What a shard's call gives is decided by the test's `act`."""

    numbers = itertools.count()

    def __init__(self, stage: "Stage"):
        self.number, self.held, self.dead = next(self.numbers), [], False  # type: ignore[var-annotated]
        order, stage.started = stage.started, stage.started + 1
        self.load = SimpleNamespace(remote=lambda: stage.task(self, lambda: stage.load(order)))
        self.extract = SimpleNamespace(remote=lambda shard, quarantine: stage.give(self, shard, quarantine))


class Stage:
    """Tasks end in the order in which they were given. Time passes only while the driver sleeps."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self, act: Act, load: Load):
        self.load, self.started, self.now = load, 0, 0.0
        self.act, self.results, self.given, self.most = act, {}, [], {}  # type: ignore[var-annotated]

    def task(self, actor: Actor, result: Callable[[], Outcome]) -> object:
        task = object()
        self.results[task] = (actor, result)
        return task

    def give(self, actor: Actor, shard: int, quarantine: bool) -> object:
        self.given.append(shard)
        actor.held.append(shard)
        self.most[shard] = max(self.most.get(shard, 0), len(actor.held))

        def result() -> Outcome:
            actor.held.remove(shard)
            return self.act(actor, shard, quarantine)

        return self.task(actor, result)

    def remote(self, _: type) -> Any:
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda *_: Actor(self)))

    def wait(self, tasks: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        return tasks[:1], tasks[1:]

    def get(self, task: object) -> Outcome:
        return self.results[task][1]()  # type: ignore[no-any-return]

    def kill(self, actor: Actor) -> None:
        actor.dead = True

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 8.0}

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def made(shard: int, *quarantined: Quarantined) -> Outcome:
    return Outcome(Receipt(shard, shard_name(shard), "0" * 64, 1, 1, 10, 0, 0, 0.0, 0, quarantined=quarantined), host="here")


class Log:
    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def write(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))


def drive(
    monkeypatch: pytest.MonkeyPatch, act: Act, shards: int = 6, count: int = 2, load: Load = lambda started: Outcome(), **settings: Any
) -> tuple[dict[int, str], Stage, Log]:
    stage, log = Stage(act, load), Log()
    monkeypatch.setattr(workers, "ray_module", lambda: stage)
    monkeypatch.setattr(workers, "time", stage)
    recipe = config.Recipe(ray=config.Ray(**settings.pop("ray", {})))
    plan = SimpleNamespace(environment={"numerics": {"micro_batch": 4}})
    job: Any = SimpleNamespace(plan=plan, corpus=SimpleNamespace(roots=[]), work=lambda shard: 1)
    driver = workers.Driver(recipe, job, Progress("extract", "shards", shards, shards), log, **settings)  # type: ignore[arg-type]
    return driver.run(list(range(shards)), count), stage, log


def test_every_shard_is_given_once_and_the_last_ones_to_empty_hands(monkeypatch: pytest.MonkeyPatch) -> None:
    failures, stage, _ = drive(monkeypatch, lambda actor, shard, quarantine: made(shard), shards=8)
    assert failures == {} and sorted(stage.given) == list(range(8))
    assert max(stage.most[shard] for shard in range(4)) == 2 and stage.most[7] == 1


def test_a_failure_that_may_pass_is_tried_again_so_often_and_no_oftener(monkeypatch: pytest.MonkeyPatch) -> None:
    def act(actor: Actor, shard: int, quarantine: bool) -> Outcome:
        if shard == 2:
            return Outcome(failure="shard 2, row 0: NaN", again=True, row=True)
        return Outcome(failure="shard 3: the corpus changed") if shard == 3 else made(shard)

    failures, stage, log = drive(monkeypatch, act, ray={"retries": 2})
    assert failures == {2: "shard 2, row 0: NaN", 3: "shard 3: the corpus changed"}
    assert stage.given.count(2) == 3 and stage.given.count(3) == 1
    assert [event for event, _ in log.events].count("shard retried") == 2


def test_quarantine_comes_after_the_retries_and_is_for_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, bool]] = []

    def act(actor: Actor, shard: int, quarantine: bool) -> Outcome:
        asked.append((shard, quarantine))
        if shard == 2 and not quarantine:
            return Outcome(failure="shard 2, row 0: NaN", again=True, row=True)
        if shard == 3:
            return Outcome(failure="shard 3: the corpus changed")
        return made(shard, *[Quarantined(0, 9, "NaN")] * (shard == 2))

    failures, _, _ = drive(monkeypatch, act, ray={"retries": 1}, quarantine=True)
    assert failures == {3: "shard 3: the corpus changed"}
    assert [quarantine for shard, quarantine in asked if shard == 2] == [False, False, True]


def test_shards_of_a_dead_worker_are_made_one_by_one_so_that_the_one_that_kills_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def act(actor: Actor, shard: int, quarantine: bool) -> Outcome:
        if shard == 1 or (shard == 0 and 1 in actor.held):  # 1 kills while it is read beside 0
            raise RayError
        return made(shard)

    failures, _, log = drive(monkeypatch, act, shards=5, count=1, ray={"retries": 2})
    assert list(failures) == [1] and "its worker died 3 times" in failures[1]
    assert [fields["shards"] for event, fields in log.events if event == "worker died"] == [[0, 1], [1], [1], [1]]


def test_an_error_that_nobody_foresaw_costs_the_worker_and_not_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    broken: set[int] = set()

    def act(actor: Actor, shard: int, quarantine: bool) -> Outcome:
        if (shard == 4 and not broken) or actor.number in broken:
            broken.add(actor.number)  # its GPU answers nothing any more
            raise RayTaskError
        return made(shard)

    failures, _, log = drive(monkeypatch, act, shards=8)
    assert failures == {} and len(broken) == 1
    assert any(event == "worker died" and "device-side assert" in fields["reason"] for event, fields in log.events)


def test_workers_that_only_die_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def act(actor: Actor, shard: int, quarantine: bool) -> Outcome:
        raise RayError

    with pytest.raises(WorkError, match="workers died one after another and no shard was made"):
        drive(monkeypatch, act, shards=100, count=1)


def test_a_teacher_that_no_worker_can_load_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(started: int) -> Outcome:
        raise RayError

    with pytest.raises(WorkError, match="no worker starts: its worker died 4 times"):
        drive(monkeypatch, lambda actor, shard, quarantine: made(shard), load=load)


def test_a_vanished_node_that_is_still_offered_to_new_workers_costs_pauses_and_not_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first worker dies with its node, and so do the next eight, until the cluster knows that the node is gone."""
    first: list[int] = []

    def act(actor: Actor, shard: int, quarantine: bool) -> Outcome:
        first.append(actor.number)
        if shard == 2 and actor.number == first[0]:
            raise RayError
        return made(shard)

    def load(started: int) -> Outcome:
        if 0 < started < 9:
            raise RayError
        return Outcome()

    failures, stage, _ = drive(monkeypatch, act, count=1, load=load)
    assert failures == {} and set(stage.given) == set(range(6)) and stage.started == 10
    assert 2 + 4 + 8 + 16 + 32 + 3 * workers.LONGEST_PAUSE <= stage.now < 260


def test_workers_that_die_while_they_load_far_apart_do_not_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every third worker dies while it loads, the others after two shards."""
    lives: dict[int, int] = {}

    def act(actor: Actor, shard: int, quarantine: bool) -> Outcome:
        lives[actor.number] = lives.get(actor.number, 0) + 1
        if lives[actor.number] > 2:
            raise RayError
        return made(shard)

    def load(started: int) -> Outcome:
        if started % 3 == 1:
            raise RayError
        return Outcome()

    failures, stage, _ = drive(monkeypatch, act, shards=60, count=1, load=load)
    assert failures == {} and set(stage.given) == set(range(60)) and stage.started > 30


@pytest.mark.parametrize(
    ("settings", "cpus", "gpus", "expected"),
    [
        ({}, 16, 8, 8),
        ({"gpus": 0.5}, 16, 8, 16),
        ({"gpus": 0.3}, 16, 8, 24),  # three on each: what is left of one GPU is no part of another
        ({"gpus": 2}, 16, 8, 4),
        ({"gpus": 0}, 16, 8, 16),
        ({}, 16, 0, 16),
        ({"cpus": 4}, 16, 0, 4),
        ({"workers": 3, "gpus": 0.5}, 16, 8, 3),
        ({"gpus": 2}, 16, 1, 1),
    ],
)
def test_there_are_as_many_workers_as_have_room(settings: dict[str, Any], cpus: float, gpus: float, expected: int) -> None:
    assert cluster.room(config.Ray(**settings), cpus, gpus) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"gpus": 1.5}, r"ray\.gpus is 1\.5; above 1 it must be a whole number"), ({"pinned": True, "address": "auto"}, r"ray\.pinned needs")],
)
def test_settings_of_ray_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.Ray(**settings)
