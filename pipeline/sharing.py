"""The commands that make datasets of datasets. No recipe: a few options each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from noise.storage import DatasetError

COMMANDS = {
    "merge": "All shards of several datasets as one, byte for byte.",
    "subset": "Some shards of a dataset, byte for byte, or some of its rows in new shards.",
    "split": "A dataset as several, each shard byte for byte in one of them.",
    "reshard": "The same rows in shards of another size.",
    "convert": "The same shards in another format version or compression.",
    "card": "Say on a dataset's card what only its makers know: its name, and licences.",
    "push": "Publish a dataset: to hf://datasets/OWNER/NAME, s3://, gs://, or a folder; hash-checked, and the same command continues; "
    "of shards that are there already, a folder's are hashed, elsewhere only sizes are compared (`verify` hashes them).",
    "pull": "Fetch a published dataset, hash-checked, also what is there already; some of its shards with --shards.",
    "export": "Noise as numbers, for people without a decoder of the format.",
}


def add_arguments(name: str, parser: Any) -> None:
    """The options of one of COMMANDS."""
    from jsonargparse.typing import NonNegativeInt, PositiveInt

    many = name == "merge"
    parser.add_argument(
        "datasets" if many else "dataset", type=str, nargs="+" if many else None, help="Finished datasets." if many else "A finished dataset."
    )
    if name == "subset":
        parser.add_argument("--shards", type=str | None, help="Numbers and ranges, as 0-9,12: these shards, as they are.")
        parser.add_argument("--rows", type=str | None, help="FIRST:STOP, these rows in new shards.")
        parser.add_argument("--sample", type=PositiveInt | None, help="So many rows, drawn evenly, in new shards.")
        parser.add_argument("--seed", type=NonNegativeInt, default=1, help="Of --sample.")
    elif name == "split":
        parser.add_argument("--shares", type=dict[str, float], required=True, help="As '{train: 0.9, heldout: 0.1}': each becomes OUTPUT/NAME.")
    elif name == "reshard":
        parser.add_argument("--rows-per-shard", type=PositiveInt, required=True, help="Rows of each new shard; the last may have fewer.")
    elif name == "convert":
        parser.add_argument("--format-version", type=int | None, help="1 or 2; where it is left out, as it is.")
        parser.add_argument("--compression", type=str | None, help="none or zstd; where it is left out, as it is.")
    elif name in ("push", "pull"):
        parser.add_argument("--dry-run", action="store_true", help="Say what would be moved; move nothing.")
        if name == "push":
            parser.add_argument("--private", action="store_true", help="On the hub: only you, or your team, may see it.")
        else:
            parser.add_argument("--shards", type=str | None, help="Numbers and ranges, as 0-9,12: these alone, as a dataset of their own.")
    elif name == "export":
        parser.add_argument("--rows", type=str, required=True, help="FIRST:STOP.")
        parser.add_argument("--draw", type=NonNegativeInt, default=0, help="Which draw of the noise.")
        parser.add_argument("--dtype", type=str, default="float32", help="float32 or float16.")
    elif name == "card":
        parser.add_argument("--title", type=str, default="", help="Name of the dataset.")
        parser.add_argument("--corpus_license", type=str, default="", help="Licence of the text, as the hub spells it: cc-by-4.0, mit, other.")
        parser.add_argument("--teacher_license", type=str, default="", help="Licence of the teacher.")
        return
    where = "A .safetensors or .npy file that is not there yet." if name == "export" else "Folder or URI of the new dataset."
    parser.add_argument("--output", type=str, required=True, help=where)


def run(name: str, given: Any) -> None:
    """Raises DatasetError for options that do not name one thing to do."""
    from pipeline import dense, derive, rewrite, transfer

    if name == "merge":
        derive.merge(given["datasets"], given["output"])
    elif name == "split":
        derive.split(given["dataset"], given["shares"], given["output"])
    elif name == "reshard":
        rewrite.reshard(given["dataset"], given["rows_per_shard"], given["output"])
    elif name == "card":
        transfer.describe(given["dataset"], **{field: given[field] for field in ("title", "corpus_license", "teacher_license")})
    elif name == "convert":
        rewrite.convert(given["dataset"], given["output"], given["format_version"], given["compression"])
    elif name == "pull" and given["shards"] is not None:
        if given["dry_run"]:
            raise DatasetError("--dry-run is of a whole dataset; leave out --shards")
        subset(given["dataset"], given["output"], given["shards"], None, None, 0)
    elif name in ("push", "pull"):
        transfer.transfer(given["dataset"], given["output"], given["dry_run"], bool(given.get("private")))
    elif name == "subset":
        subset(given["dataset"], given["output"], given["shards"], given["rows"], given["sample"], given["seed"])
    else:
        if given["dtype"] not in dense.DTYPES:
            raise DatasetError(f"dtype is {given['dtype']!r}; expected one of {', '.join(dense.DTYPES)}")
        dense.export_dense(given["dataset"], *_range(given["rows"]), Path(given["output"]), given["draw"], given["dtype"])


def subset(dataset: str, output: str, shards: str | None, rows: str | None, sample: int | None, seed: int) -> None:
    """By exactly one of shards, rows and sample."""
    from pipeline import derive, rewrite

    if sum(choice is not None for choice in (shards, rows, sample)) != 1:
        raise DatasetError("subset takes one of --shards, --rows and --sample")
    if shards is not None:
        derive.take([derive.Source.of(dataset, numbers(shards))], output)
    elif rows is not None:
        rewrite.rows_between(dataset, *_range(rows), output)
    else:
        rewrite.sample_rows(dataset, sample or 0, seed, output)


def numbers(text: str) -> list[int]:
    """0-3,7 -> 0, 1, 2, 3, 7."""
    found: list[int] = []
    try:
        for piece in text.split(","):
            first, _, last = piece.partition("-")
            found += range(int(first), int(last or first) + 1)
    except ValueError:
        raise DatasetError(f"shards are {text!r}; expected numbers and ranges, as 0-9,12") from None
    return found


def _range(text: str) -> tuple[int, int]:
    first, colon, stop = text.partition(":")
    if not colon or not first.strip().isdigit() or not stop.strip().isdigit():
        raise DatasetError(f"rows are {text!r}; expected FIRST:STOP, as 0:100")
    return int(first), int(stop)
