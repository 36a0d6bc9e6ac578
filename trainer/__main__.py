"""Train a student from shards.

    python -m trainer --config recipes/demo_mdlm_gumbel.yaml
    torchrun --standalone --nproc-per-node 2 -m trainer --config recipes/demo_mdlm_gumbel.yaml --optim.steps 500

The same command continues a run that was stopped, and does nothing when it is done. What is trained is handed on by

    python -m trainer export runs/demo/students/mdlm-gumbel --output exported      (its own --help says more)

and what a run will cost, before it starts, is said by

    python -m trainer estimate --config recipes/paper/owt_mdlm.yaml --vocab_size 50257 --block_length 1024      (likewise)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from noise.secrets import redacted
from trainer import estimate_command, export
from trainer.config import PARTS, NoiseConfig, TrainConfig
from trainer.loop import train


def parse(arguments: list[str] | None = None) -> TrainConfig:
    """A recipe with dotted overrides; unknown keys end with a message and status 2."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog="python -m trainer", description=__doc__)
    parser.add_argument("--config", action="config", help="A recipe: YAML with the settings below.")
    parser.add_class_arguments(TrainConfig)
    parsed = parser.parse_args(arguments)
    parsed.pop("config", None)
    config: TrainConfig = TrainConfig(**parser.instantiate(parsed).as_dict())
    _refuse_parts_that_are_off(config, parser.parse_args(arguments, defaults=False))
    return config


def _refuse_parts_that_are_off(config: TrainConfig, given: Any) -> None:
    """ValueError where a recipe names parts of the noise, none of which is on: once parsed they look like a kind alone, which is all parts."""
    off = asdict(NoiseConfig())
    named = {name: given.get(f"student.noise.{name}") for name in PARTS}
    named = {name: value for name, value in named.items() if value is not None}
    if config.student.noise.kind != "none" and named and all(value == off[name] for name, value in named.items()):
        said = ", ".join(f"student.noise.{name} ({value})" for name, value in named.items())
        raise ValueError(
            f"{said} switch parts of the noise off, and no part is named that is on (student.noise.kind {config.student.noise.kind}): "
            "name the parts that the student should have, or the kind alone for all"
        )


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 a refusal or failure with its one line, 2 bad settings, 130 stopped with a checkpoint."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["export"]:
        return _command(lambda: export.run(arguments[1:]))
    if arguments[:1] == ["estimate"]:
        return _command(lambda: estimate_command.run(arguments[1:], parse))
    try:
        config = parse(arguments)
    except ValueError as error:
        print(redacted(f"error: {error}"), file=sys.stderr)
        return 2
    try:
        train(config)
    except ValueError as error:
        print(redacted(f"error: {error}"), file=sys.stderr)
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else f"{config.output}: "
        reason = redacted(f"{where}{error.strerror or error}")
        print(f"error: {reason}; the last checkpoint stands, run the same command once that is settled", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _command(run: Callable[[], int]) -> int:
    try:
        return run()
    except (ValueError, OSError) as error:
        print(redacted(f"error: {error}"), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
