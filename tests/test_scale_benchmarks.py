"""The benchmarks of scale: what they make of a run's events, and the driver's run on a small plan. Nothing timed is looked at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import driver, scale
from noise.dataset import Plan
from noise.receipt import listed


def shard(pid: int, began: float, seconds: float, teacher: float, beside: float = 0.1) -> dict[str, Any]:
    about = {"pid": pid, "began": began, "seconds": seconds, "teacher_seconds": teacher, "teacher_processor_seconds": teacher / 2}
    return {**about, "beside_seconds": beside, "receipt": {"tokens": 1000}}


def test_time_without_the_teacher_is_what_its_shards_leave_of_each_workers_span() -> None:
    # worker 1: from 0 to 10, its teacher runs 9 s, the second shard read while the first has the teacher; worker 2: from 1 to 5, 4 s
    made = [shard(1, 0.0, 5.0, 4.5), shard(1, 1.0, 9.0, 4.5), shard(2, 1.0, 4.0, 4.0)]
    found = scale.of_shards(made)
    assert found["workers"] == 2 and found["seconds"] == 10.0 and found["tokens_a_second"] == 300.0
    assert found["idle"] == pytest.approx(1 / 14) and found["tokens_a_processor_second"] == pytest.approx(3000 / 6.5)
    assert found["beside"] == pytest.approx(0.3 / (0.3 + 6.5))


def test_efficiency_is_taken_within_a_round() -> None:
    one, two = scale.of_shards([shard(1, 0.0, 10.0, 9.0)]), scale.of_shards([shard(1, 0.0, 10.0, 9.0), shard(2, 0.0, 10.0, 9.0)])
    slow = {name: dict(run, tokens_a_second=run["tokens_a_second"] / 7) for name, run in (("one", one), ("two", two))}
    assert scale.summary([{"one": one, "two": two}, slow])["efficiency"] == pytest.approx(1.0)


def test_the_scale_benchmark_extracts_with_one_worker_and_with_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[str] = []

    def pipeline(arguments: list[str]) -> int:
        commands.append(arguments[0])
        given = dict(argument.removeprefix("--").split("=") for argument in arguments[1:])
        if arguments[0] == "extract":
            workers = int(given["ray.workers"])
            events = [shard(pid, 0.0, 10.0, 9.0) | {"event": "shard"} for pid in range(workers)]
            Path(given["output"]).mkdir()
            (Path(given["output"]) / "run.jsonl").write_text("\n".join(map(json.dumps, events)))
        return 0

    monkeypatch.setattr(scale, "pipeline", pipeline)
    small = ["--layers", "1", "--hidden", "16", "--heads", "2", "--vocab_size", "1024", "--shards", "4", "--rounds", "2"]
    assert scale.main([*small, "--output", str(tmp_path / "scale.json")]) == 0
    assert commands == ["tokenizer"] + ["extract"] * 4
    found = json.loads((tmp_path / "scale.json").read_text())
    assert len(found["rounds"]) == 2 and found["summary"]["efficiency"] == pytest.approx(1.0)


def test_a_benchmark_says_which_setting_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert driver.main(["--shards", "5", "--missing", "6"]) == 1
    assert "missing is 6" in capsys.readouterr().err


def test_the_driver_benchmarks_world_is_a_plan_with_all_but_a_few_receipts(tmp_path: Path) -> None:
    options = driver.make_world(tmp_path, driver.Config(shards=60, missing=4))
    dataset = tmp_path / "dataset"
    assert len(Plan.read(dataset).shards) == 60 and set(range(60)) - listed(dataset) == {0, 15, 30, 45}
    found = driver.resume(dataset, options)
    assert set(found["seconds"]) == set(driver.STEPS) and set(range(60)) - listed(dataset) < {0, 15, 30, 45}
