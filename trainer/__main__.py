"""Train a student from shards.

    python -m trainer --config recipes/demo_mdlm_gumbel.yaml
    torchrun --standalone --nproc-per-node 2 -m trainer --config recipes/demo_mdlm_gumbel.yaml --optim.steps 500

The same command continues a run that was stopped, and does nothing when it is done.
"""

from __future__ import annotations

import sys

from trainer.config import TrainConfig
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
    return config


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 a refusal or failure with its one line, 2 bad settings, 130 stopped with a checkpoint."""
    try:
        config = parse(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        train(config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else f"{config.output}: "
        print(f"error: {where}{error.strerror or error}; the last checkpoint stands, run the same command once that is settled", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
