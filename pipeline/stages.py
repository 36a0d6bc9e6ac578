"""The commands: what each does, from a recipe to its artefact."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from noise.dataset import Manifest, Plan, Receipt, committed, differences, grows_from
from noise.storage import DatasetError, write_text
from pipeline.card import write_card
from pipeline.config import GenerateRecipe, Recipe, Work, WorkError
from pipeline.corpus import Corpus
from pipeline.divide import ShardInput
from pipeline.extract import Job
from pipeline.plan import make_plan, write_plan
from pipeline.progress import Progress, RunLog, say
from pipeline.standing import find_plan


def save_recipe(recipe: Work, folder: Path) -> None:
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


def plan(recipe: Recipe, grow: bool = True) -> tuple[Plan, Job]:
    """Write plan.json, or find the same plan there, extended by files that it does not know if `grow`."""
    folder = Path(recipe.output)
    if (folder / "plan.json").exists():
        standing, corpus, tokenizer = find_plan(recipe, grow)
    else:
        fresh, corpus, tokenizer = make_plan(recipe)
        standing = write_plan(recipe, fresh, tokenizer)
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
    complete("extract", recipe, plan(recipe, grow=False)[1])


def generate(recipe: GenerateRecipe) -> None:
    """Plan, or find the same plan there, then write what is not committed yet."""
    from pipeline import prompts
    from pipeline.generate import Generation

    fresh, corpus, tokenizer = prompts.make_plan(recipe)
    standing = write_plan(recipe, fresh, tokenizer)
    folder = Path(recipe.output)
    save_recipe(recipe, folder)
    identity = standing.identity
    masked, stop = identity["generation"]["masked_ids"]["count"], identity["generation"]["stop"]
    say(
        f"plan: {folder}: {identity['shards']['rows']:,} rows from {'BOS' if not corpus.files else 'prompts'} -> {len(standing.shards):,} shards; "
        f"V {identity['vocab_size']:,}, {masked:,} ids masked, blocks of {identity['block_length']}, stop {stop}"
    )
    complete("generate", recipe, Generation(folder, standing, corpus, tokenizer, None))


def complete(stage: str, recipe: Work, job: Job) -> None:
    """Everything that is not committed yet, then the manifest and the card. Raises WorkError when shards failed."""
    folder, standing = job.folder, job.plan
    done = committed(folder)
    pending = [shard for shard in range(len(standing.shards)) if shard not in done]
    if not pending and (folder / "manifest.json").exists():
        manifest = Manifest.read(folder)
        if not differences(standing.identity, manifest.identity):
            say(f"{stage}: {folder} is complete: {manifest.totals['rows']:,} rows, root hash {manifest.root_hash[:16]}")
            return
        if not grows_from(standing.identity, manifest.identity):
            raise DatasetError(f"{folder}: manifest.json belongs to another plan; delete the manifest and run again")
    log = RunLog(folder)
    log.write("begin", shards=len(standing.shards), pending=len(pending), extraction=standing.identity["extraction"])
    failures = _make(stage, recipe, job, done, pending, log) if pending else {}
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
    source = f"{totals['characters_in']:,} characters -> " if totals["characters_in"] else ""
    dropped = f" ({totals['tokens_dropped']:,} more left out by packing)" if "tokens_dropped" in totals else ""
    say(
        f"{stage}: {folder}: {source}{tokens:,} tokens{dropped} in {totals['rows']:,} rows, "
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
    readers = (manifest.open(folder, receipt, check_hash=False) for receipt in manifest.receipts)
    return sum(int(rows.length.sum(dtype="int64")) - len(rows) for reader in readers for rows in reader)


def _make(stage: str, recipe: Work, job: Job, done: dict[int, Receipt], pending: list[int], log: RunLog) -> dict[int, str]:
    """Make the pending shards; returns the reason of each that failed."""
    work = [job.work(shard) for shard in range(len(job.plan.shards))]
    already = sum(work[shard] for shard in done if shard < len(work))
    with Progress(stage, "shards", len(work), sum(work), len(done), already) as progress:
        if job.plan.identity["extraction"] != "none":
            from pipeline import workers

            return workers.extract(recipe, job, pending, progress, log)
        for shard in pending:
            receipt = job.extract(shard)
            progress.advance(work=work[shard], tokens=receipt.rows * (job.plan.identity["block_length"] - 1))
            log.write("shard", shard=shard, rows=receipt.rows)
    return {}


def replay(dataset: str, model: str | None, dtype: str | None, rows: int | None) -> None:
    """Raises WorkError when the teacher would have written something else."""
    from pipeline.replay import replay as again

    report = again(Path(dataset), model, dtype, rows)
    for line in report.near_ties:
        print(line)
    say(f"replay: {report.in_words()}")
    if report.failures:
        raise WorkError(
            f"{report.failures:,} positions of {dataset} are not what the teacher chooses there; first: {report.first_failure}; "
            "the dataset is damaged, or this is not its teacher"
        )


def verify(dataset: str) -> None:
    from pipeline.verify import verify as check

    check(Path(dataset))


def show(dataset: str, as_json: bool) -> None:
    from pipeline.inspect import describe, in_words

    print(describe(Path(dataset)) if as_json else in_words(Path(dataset)))
