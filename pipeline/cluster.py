"""Ray, started here or joined, and how many workers there is room for."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.config import Ray, Work, WorkError

STARTS = 3
"""Attempts to start a local Ray."""
OBJECT_STORE_BYTES = 100 * 2**20  # only receipts travel


@contextmanager
def cluster(recipe: Work, shards: int) -> Iterator[int]:
    """Ray, started here or joined; yields the number of workers. Raises WorkError when a cluster cannot be reached."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray's default is 15; on 2 cores with ten other busy processes that is 0.06 of a core, niceness 0 is 0.31 (measured)
    os.environ.setdefault("RAY_worker_niceness", "0")
    import logging

    ray = ray_module()
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    local = recipe.ray.address == "local"
    if local:
        count = min(room(recipe.ray, len(os.sched_getaffinity(0)), _local_gpus()), shards)
        options |= {"address": "local", "num_cpus": max(1, math.ceil(count * recipe.ray.cpus)), "include_dashboard": False}
        options |= {"object_store_memory": OBJECT_STORE_BYTES}
    else:
        options["address"] = recipe.ray.address
        if not _job_brings_code():
            checkout = Path(__file__).resolve().parents[1]
            options["runtime_env"] = {"working_dir": str(checkout), "excludes": ["/runs", "/.venv", "/.git"]}
    _begin(options, STARTS if local else 1)
    try:
        there = ray.cluster_resources()
        yield min(count if local else room(recipe.ray, there.get("CPU", 1.0), there.get("GPU", 0.0)), shards)
    finally:
        ray.shutdown()


def _job_brings_code() -> bool:
    """Whether `ray job submit --working-dir` has sent the checkout; Ray refuses a second one."""
    return "working_dir" in json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}").get("runtime_env", {})


def ray_module() -> Any:
    """Ray, imported where it is needed: it takes a second."""
    import ray

    return ray


def _begin(options: dict[str, Any], attempts: int) -> None:
    """Start or join Ray. Its own limit of 30 seconds for a start cannot be set, and a busy machine needs longer: then once more.

    Raises WorkError when the last attempt fails.
    """
    ray = ray_module()
    for attempt in range(1, attempts + 1):
        try:
            ray.init(**options)
            return
        except Exception as error:  # Ray raises its own and the operating system's errors here
            ray.shutdown()
            if attempt == attempts:
                reason = str(error).strip() or type(error).__name__
                raise WorkError(f"Ray at ray.address {options['address']!r} does not answer after {attempts} attempts: {reason}") from None


def _local_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def gpus_of_a_worker(recipe: Ray, gpus: float) -> float:
    """GPUs that each worker takes where there are `gpus`."""
    return min(1.0, gpus) if recipe.gpus is None else recipe.gpus


def room(recipe: Ray, cpus: float, gpus: float) -> int:
    """Workers as the recipe says, else as many as have room: on the GPUs where there are any and workers take them. A share of a GPU is of one."""
    if recipe.workers is not None:
        return recipe.workers
    each = gpus_of_a_worker(recipe, gpus)
    if each > 0 and gpus > 0:
        return max(1, int(gpus) * int(1 / each + 1e-9) if each < 1 else int(gpus / each))
    return max(1, int(cpus / max(recipe.cpus, 0.01)))
