"""The commands: what each does, from a recipe to its artefact."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from noise.dataset import Manifest, Plan, Receipt, committed, differences, open_shard
from noise.storage import DatasetError, write_text
from pipeline.card import write_card
from pipeline.config import Recipe, WorkError
from pipeline.corpus import Corpus
from pipeline.extract import Job
from pipeline.plan import ShardInput, make_plan, write_plan
from pipeline.progress import Progress, RunLog, say


def save_recipe(recipe: Recipe, folder: Path) -> None:
    """The resolved recipe, beside its artefact."""
    import yaml

    write_text(folder / "recipe.yaml", yaml.safe_dump(asdict(recipe), sort_keys=False))


def make_tokenizer(recipe: Recipe) -> None:
    """Train the tokenizer; nothing to do where the teacher brings its own."""
    if recipe.tokenizer.path is None:
        if recipe.teacher.model is None:
            raise DatasetError("tokenizer.path is null and there is no teacher: name the folder that the tokenizer goes to")
        say(f"the teacher {recipe.teacher.model} brings its own tokenizer: nothing to train")
        return
    from pipeline import tokenizer

    folder = tokenizer.train(recipe, Corpus.open(recipe.corpus), lambda line: say(f"tokenizer: {line}"))
    save_recipe(recipe, folder)


def plan(recipe: Recipe) -> tuple[Plan, Job]:
    """Write plan.json, or find the same plan there."""
    fresh, corpus, tokenizer = make_plan(recipe)
    standing = write_plan(recipe, fresh, tokenizer)
    folder = Path(recipe.output)
    save_recipe(recipe, folder)
    sources = [ShardInput.from_json(shard) for shard in standing.shards]
    documents, characters = sum(source.documents for source in sources), sum(source.characters for source in sources)
    identity = standing.identity
    say(
        f"plan: {folder}: {documents:,} documents, {characters:,} characters -> {len(sources):,} shards; "
        f"V {identity['vocab_size']:,}, blocks of {identity['block_length']}, extraction {identity['extraction']}"
    )
    return standing, Job(folder, standing, corpus, tokenizer, None)


def extract(recipe: Recipe) -> None:
    """Everything that is not committed yet, then the manifest and the card. Raises WorkError when shards failed."""
    folder = Path(recipe.output)
    standing, job = plan(recipe)
    done = committed(folder)
    pending = [shard for shard in range(len(standing.shards)) if shard not in done]
    if not pending and (folder / "manifest.json").exists():
        manifest = Manifest.read(folder)
        if differences(standing.identity, manifest.identity):
            raise DatasetError(f"{folder}: manifest.json belongs to another plan; delete the manifest and run again")
        say(f"extract: {folder} is complete: {manifest.totals['rows']:,} rows, root hash {manifest.root_hash[:16]}")
        return
    log = RunLog(folder)
    log.write("begin", shards=len(standing.shards), pending=len(pending), extraction=recipe.noise.extraction)
    failures = _make(recipe, job, done, pending, log) if pending else {}
    if failures:
        first = min(failures)
        log.write("failed", shards={str(shard): reason for shard, reason in failures.items()})
        raise WorkError(
            f"{len(failures)} of {len(standing.shards)} shards failed, everything else is committed; first: {failures[first]} "
            "(run again for just these once the cause is gone)"
        )
    manifest = Manifest.write(folder, standing, _per_token([*committed(folder).values()]))
    for leftover in (folder / "shards").glob("*.tmp"):  # of workers that were killed
        leftover.unlink(missing_ok=True)
    write_card(folder, standing, manifest)
    log.write("end", totals=manifest.totals, root_hash=manifest.root_hash)
    totals, tokens = manifest.totals, count_tokens(folder, manifest)
    say(
        f"extract: {folder}: {totals['characters_in']:,} characters -> {tokens:,} tokens in {totals['rows']:,} rows, "
        f"{totals['tokens']:,} with noise, "
        f"{totals['bytes']:,} bytes, root hash {manifest.root_hash[:16]}"
    )


def _per_token(receipts: list[Receipt]) -> dict[str, float]:
    """What a position with noise costs, for the manifest."""
    tokens = sum(receipt.tokens for receipt in receipts)
    if not tokens:
        return {}
    return {
        "bytes_per_token": sum(receipt.bytes for receipt in receipts) / tokens,
        "kept_per_token": sum(receipt.kept for receipt in receipts) / tokens,
    }


def count_tokens(folder: Path, manifest: Manifest) -> int:
    """Tokens of the corpus, each document's EOS with it, BOS and padding without."""
    readers = (open_shard(folder, receipt, manifest.identity, check_hash=False) for receipt in manifest.receipts)
    return sum(int(rows.length.sum(dtype="int64")) - len(rows) for reader in readers for rows in reader)


def _make(recipe: Recipe, job: Job, done: dict[int, Receipt], pending: list[int], log: RunLog) -> dict[int, str]:
    """Extract the pending shards; returns the reason of each that failed."""
    characters = [shard["characters"] for shard in job.plan.shards]
    already = sum(characters[shard] for shard in done if shard < len(characters))
    with Progress("extract", "shards", len(characters), sum(characters), len(done), already) as progress:
        if recipe.noise.extraction != "none":
            from pipeline import workers

            return workers.extract(recipe, job, pending, progress, log)
        for shard in pending:
            receipt = job.extract(shard)
            progress.advance(work=characters[shard], tokens=receipt.rows * (job.plan.identity["block_length"] - 1))
            log.write("shard", shard=shard, rows=receipt.rows)
    return {}


def verify(dataset: str) -> None:
    from pipeline.verify import verify as check

    check(Path(dataset))


def show(dataset: str, as_json: bool) -> None:
    from pipeline.inspect import describe, in_words

    print(describe(Path(dataset)) if as_json else in_words(Path(dataset)))
