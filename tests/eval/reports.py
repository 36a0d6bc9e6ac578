"""A report of three systems of the small world, and the command that makes it."""

from __future__ import annotations

from pathlib import Path

import yaml

from eval.__main__ import main


def recipe(world: Path, output: Path, **change: object) -> Path:
    settings = {
        "output": str(output),
        "systems": {
            "plain": {"student": str(world / "plain"), "temperatures": [0.5, 1.0, 2.0]},
            "noisy": {"student": str(world / "gumbel"), "noise_temperatures": [0.5, 1.0, 2.0]},
            "blind": {"student": str(world / "independent"), "temperatures": [0.5, 1.0, 2.0], "nucleus": 0.9},
        },
        "baseline": "plain", "control": "blind", "heldout": str(world / "heldout"), "judge": str(world / "judge"), "teacher": str(world / "teacher"),
        "nfe": [1, 3], "sequences": 36, "batch": 16, "reconstruction_rows": 20, "timing_rows": 0, "replicates": 30, "device": "cpu", "shown": 2,
    }  # fmt: skip
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**settings, **change}, sort_keys=False))
    return path


def run(path: Path, *overrides: str) -> int:
    return main(["report", "--config", str(path), *overrides])
