"""`python -m pipeline tokenizer|plan|extract|generate|verify|replay|inspect|status --config recipes/demo.yaml [--dotted.override value]`,
and `merge|subset|split|reshard|convert|export DATASET --output ...`, which need no recipe.

Exit codes: 0 done; 1 work that failed (what is committed stays); 2 a recipe, corpus, teacher or dataset that cannot be used.
Of verify and inspect --trust: 0 sound; 1 damage, each file named; 2 nothing that can be verified; 3 reading failed before the end.
"""

from __future__ import annotations

import os
import sys
from typing import Any, Literal

from noise.storage import DatasetError
from pipeline import sharing
from pipeline.config import DTYPES, DamageError, GenerateRecipe, Recipe, Work, WorkError
from pipeline.progress import printable

COMMANDS = {
    "tokenizer": "Train the tokenizer on the training documents.",
    "plan": "Write down what the dataset will be: identity, and which documents make which shard.",
    "extract": "Make the dataset, or what is missing of it. Plans first where there is no plan.",
    "generate": "Let the teacher write a dataset from the noise, or what is missing of it.",
    "verify": "Check a finished dataset: hashes, schema, counts, ranges, and that every kept entry is explained. Exit codes: 0 sound; "
    "1 damage, each file named; 2 nothing that can be verified (no finished dataset, another teacher, bad options); 3 reading failed before the end.",
    "replay": "Check that a generated dataset is what its teacher writes from its noise: one parallel forward over the rows.",
    "inspect": "Say what a dataset is, what it can be used for and, with --trust, what of that is proven, measured or only claimed.",
    "status": "Say how far a dataset is, while it is made here or elsewhere, or after.",
}


OPTIONS = ("dataset", "json", "rows", "plot", "trust", "processes", "deep", "deep_seed", "dry_run", "quarantine", "pilot")
"""Of the commands, beside the recipe."""


def main(arguments: list[str] | None = None) -> int:
    failed = 1
    try:
        command, recipe, options = parse(sys.argv[1:] if arguments is None else arguments)
        if command == "verify" or options.get("trust"):
            failed = 3
        return run(command, recipe, options)
    except DamageError as error:
        return max(complain(line, 1) for line in error.lines)
    except KeyboardInterrupt:
        return complain("interrupted; run the same command again, it continues where it stopped", 130)
    except WorkError as error:
        return complain(str(error), 1)
    except OSError as error:
        return complain(f"{error.filename or 'writing'}: {error.strerror or error}; what is committed stays, run again once that is settled", failed)
    except ValueError as error:
        return complain(str(error), 2)


def complain(message: str, code: int) -> int:
    print("error: " + printable(" ".join(message.split())), file=sys.stderr)
    return code


def parse(arguments: list[str]) -> tuple[str, Any, dict[str, Any]]:
    """(command, Recipe or GenerateRecipe, the command's own options). Raises ValueError for what the recipe does not have."""
    import jsonargparse
    from jsonargparse.typing import NonNegativeInt, PositiveInt

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(prog="python -m pipeline", description="Corpus -> teacher -> shards of noise.", exit_on_error=False)
    commands = parser.add_subcommands(dest="command")
    for name, text in (COMMANDS | sharing.COMMANDS).items():
        command = jsonargparse.ArgumentParser(description=text, exit_on_error=False)
        if name in sharing.COMMANDS:
            sharing.add_arguments(name, command)
            commands.add_subcommand(name, command, help=text)
            continue
        if name == "replay":
            command.add_argument("dataset", type=str, help="Folder of the dataset.")
            command.add_argument("--teacher.model", type=str | None, help="Folder or hub id of its teacher; null = where the plan saw it.")
            command.add_argument("--dtype", type=Literal[DTYPES] | None, help="Precision of the replay; null = the dataset's own.")
            command.add_argument("--rows", type=PositiveInt | None, help="About how many rows, some of every shard; null = all.")
            commands.add_subcommand(name, command, help=text)
            continue
        command.add_argument("--config", action="config", help="Recipe in YAML; what follows on the command line overrides it.")
        if name in ("verify", "inspect", "status"):
            command.add_argument("dataset", nargs="?", type=str, help="Folder of the dataset; the recipe's output where it is left out.")
        if name == "inspect":
            command.add_argument("--json", action="store_true", help="Print JSON.")
            command.add_argument("--rows", type=NonNegativeInt, default=3, help="How many rows to show with their text; 0: none.")
            command.add_argument("--plot", type=str | None, help="Write the kept entries by position to this picture (needs matplotlib).")
            command.add_argument("--trust", action="store_true", help="Verify everything, and say what is proven, measured, and only claimed.")
        if name in ("verify", "inspect"):
            command.add_argument("--processes", type=PositiveInt | None, help="That check shards at once; null = one for each CPU.")
            command.add_argument("--deep", type=PositiveInt | None, help="Run the teacher (--teacher.model) on so many random rows again.")
            command.add_argument("--deep_seed", type=NonNegativeInt | None, help="Of that choice of rows; null = another one every time.")
        if name in ("plan", "extract", "generate"):
            command.add_argument("--dry-run", action="store_true", help="Print the plan with estimates of rows, tokens and bytes; write nothing.")
        if name in ("extract", "generate"):
            command.add_argument("--quarantine", action="store_true", help="Leave out rows that cannot be encoded, and record them.")
        if name == "plan":
            command.add_argument("--pilot", type=PositiveInt | None, help="Try the teacher on so many rows: speed, bytes, fit of the corpus.")
        command.add_class_arguments(GenerateRecipe if name == "generate" else Recipe)
        commands.add_subcommand(name, command, help=text)
    try:
        parsed = parser.parse_args(arguments)
        values = parser.instantiate(parsed) if hasattr(parser, "instantiate") else parser.instantiate_classes(parsed)
    except jsonargparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    given = values[values.command]
    if values.command in sharing.COMMANDS:
        return values.command, None, dict(given)
    if values.command == "replay":
        return values.command, None, {"dataset": given["dataset"], "model": given["teacher"]["model"], "dtype": given["dtype"], "rows": given["rows"]}
    kind: type[Work] = GenerateRecipe if values.command == "generate" else Recipe
    recipe = kind(**{name: given[name] for name in kind.__dataclass_fields__})
    named = {argument.split("=")[0] for argument in arguments}
    if "--teacher.model" in named and "--tokenizer.path" not in named and recipe.teacher_brings_tokenizer():
        recipe.tokenizer.path = None
    return values.command, recipe, {name: given.get(name) for name in OPTIONS}


def run(command: str, recipe: Any, options: dict[str, Any]) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if command in sharing.COMMANDS:
        sharing.run(command, options)
        return 0
    from pipeline import stages

    if command == "replay":
        stages.replay(**options)
        return 0
    dataset = options["dataset"] or recipe.output
    if command == "tokenizer":
        stages.make_tokenizer(recipe)
    elif command == "plan":
        stages.plan(recipe, options["dry_run"], options["pilot"])
    elif command == "extract":
        stages.extract(recipe, options["quarantine"], options["dry_run"])
    elif command == "generate":
        stages.generate(recipe, options["quarantine"], options["dry_run"])
    elif command == "verify":
        stages.verify(dataset, recipe.teacher.model, options)
    elif command == "status":
        stages.status(dataset)
    else:
        stages.show(dataset, recipe.teacher.model, options)
    return 0


__all__ = ["DatasetError", "main", "parse"]

if __name__ == "__main__":
    sys.exit(main())
