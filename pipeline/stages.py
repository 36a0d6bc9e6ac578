"""The commands: what each does, from a recipe to its artefact."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from noise.dataset import Manifest
from noise.folder import Folder, Where
from noise.identity import differences
from noise.lineage import grows_from
from noise.receipt import Receipt, listed
from noise.storage import DatasetError
from pipeline.card import write_card
from pipeline.config import DamageError, GenerateRecipe, Recipe, Work, WorkError
from pipeline.corpus import Corpus
from pipeline.divide import ShardInput
from pipeline.extract import Job
from pipeline.inspect import is_finished
from pipeline.lease import driving
from pipeline.making import Making
from pipeline.plan import check_plan, make_plan, write_plan
from pipeline.progress import Progress, printable, say
from pipeline.run_log import RunLog
from pipeline.standing import find_plan
from pipeline.tokenizer import check_tokenizer, copy_tokenizer


def save_recipe(recipe: Work, where: Where) -> None:
    """The resolved recipe, beside its artefact."""
    import yaml

    Folder.of(where).put("recipe.yaml", yaml.safe_dump(asdict(recipe), sort_keys=False).encode())


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


def plan(recipe: Recipe, dry_run: bool = False, pilot: int | None = None) -> None:
    """Write plan.json, or find the same plan there, extended by files that it does not know; then try the teacher on `pilot` rows."""
    job = find_job(recipe, True, not dry_run)
    if dry_run:
        say_estimate(job)
    if pilot is not None:
        from pipeline.pilot import run

        print(run(recipe, job, pilot).in_words())


def find_job(recipe: Recipe, grow: bool, write: bool = True) -> Job:
    """The plan in the recipe's output, or a new one; what is new is written unless it is a dry run."""
    folder = Folder.of(recipe.output)
    if folder.exists("plan.json"):
        standing, corpus, tokenizer = find_plan(recipe, grow, write)
    else:
        standing, corpus, tokenizer = make_plan(recipe)
        if write:
            standing = write_plan(recipe, standing, tokenizer)
        else:
            check_plan(recipe, standing)
    if not write:
        check_tokenizer(folder, standing.identity)
    if write and not is_finished(folder, standing):  # a finished dataset's manifest has the hash of its recipe
        copy_tokenizer(tokenizer.folder, folder, standing.identity)  # stopped after plan.json, it is not there yet
        save_recipe(recipe, folder)
    sources = [ShardInput.from_json(shard) for shard in standing.shards]
    documents, characters = sum(source.documents for source in sources), sum(source.characters for source in sources)
    identity = standing.identity
    say(
        f"plan: {folder}: {documents:,} documents, {characters:,} characters -> {len(sources):,} shards; "
        f"V {identity['vocab_size']:,}, blocks of {identity['block_length']}, extraction {identity['extraction']}"
    )
    return Job(folder, standing, corpus, tokenizer, None)


def say_estimate(job: Job) -> None:
    """What the plan will make; nothing is written."""
    from pipeline.estimate import of_job

    there = len(listed(job.folder))
    print(f"dry run: {job.folder}: {of_job(job).in_words()}, {len(job.plan.shards):,} shards, {there:,} of them committed; nothing was written")


def extract(recipe: Recipe, quarantine: bool = False, dry_run: bool = False) -> None:
    job = find_job(recipe, False, not dry_run)
    if dry_run:
        say_estimate(job)
    else:
        complete("extract", recipe, job, quarantine)


def generate(recipe: GenerateRecipe, quarantine: bool = False, dry_run: bool = False) -> None:
    """Plan, or find the same plan there, then write what is not committed yet."""
    from pipeline import prompts
    from pipeline.generate import Generation

    standing, corpus, tokenizer = prompts.make_plan(recipe)
    folder = Folder.of(recipe.output)
    if dry_run:
        check_plan(recipe, standing)
    else:
        standing = write_plan(recipe, standing, tokenizer)
        if not is_finished(folder, standing):
            save_recipe(recipe, folder)
    identity = standing.identity
    masked, stop = identity["generation"]["masked_ids"]["count"], identity["generation"]["stop"]
    say(
        f"plan: {folder}: {identity['shards']['rows']:,} rows from {'BOS' if not corpus.files else 'prompts'} -> {len(standing.shards):,} shards; "
        f"V {identity['vocab_size']:,}, {masked:,} ids masked, blocks of {identity['block_length']}, stop {stop}"
    )
    job = Generation(folder, standing, corpus, tokenizer, None)
    if dry_run:
        say_estimate(job)
    else:
        complete("generate", recipe, job, quarantine)


def complete(stage: str, recipe: Work, job: Job, quarantine: bool = False) -> None:
    """Everything that is not committed yet, then the manifest and the card. Raises WorkError when shards failed."""
    folder, standing = Folder.of(job.folder), job.plan
    if folder.exists("manifest.json") and listed(folder) >= set(range(len(standing.shards))):
        manifest = Manifest.read(folder)
        if not differences(standing.identity, manifest.identity):
            say(f"{stage}: {folder} is complete: {manifest.totals['rows']:,} rows, root hash {manifest.root_hash[:16]}")
            return
        if not grows_from(standing.identity, manifest.identity):
            raise DatasetError(f"{folder}: manifest.json belongs to another plan; delete the manifest and run again")
    with driving(folder), RunLog(folder) as log:
        folder.remove_leftovers(time.time())
        _complete(stage, recipe, job, folder, log, quarantine)
        folder.remove_leftovers(time.time())  # of workers that were killed meanwhile


def _complete(stage: str, recipe: Work, job: Job, folder: Folder, log: RunLog, quarantine: bool) -> None:
    standing, done = job.plan, listed(folder)
    pending = [shard for shard in range(len(standing.shards)) if shard not in done]
    log.write("begin", shards=len(standing.shards), pending=len(pending), extraction=standing.identity["extraction"])
    failures = _make(stage, recipe, job, done, pending, log, quarantine) if pending else {}
    if failures:
        first = min(failures)
        log.write("failed", shards={str(shard): reason for shard, reason in failures.items()})
        raise WorkError(
            f"{len(failures)} of {len(standing.shards)} shards failed, everything else is committed; first: {failures[first]} "
            "(run again for just these once the cause is gone; --quarantine leaves out rows that cannot be encoded)"
        )
    save_recipe(recipe, folder)
    manifest = Manifest.write(folder, standing, _per_token, lambda made: write_card(folder, standing, made))
    log.write("end", totals=manifest.totals, root_hash=manifest.root_hash)
    totals, tokens = manifest.totals, count_tokens(folder, manifest)
    left_out = f", {totals['rows_quarantined']:,} more quarantined ({totals['tokens_quarantined']:,} tokens)" if "rows_quarantined" in totals else ""
    source = f"{totals['characters_in']:,} characters -> " if totals["characters_in"] else ""
    dropped = f" ({totals['tokens_dropped']:,} more left out by packing)" if "tokens_dropped" in totals else ""
    say(
        f"{stage}: {folder}: {source}{tokens:,} tokens{dropped} in {totals['rows']:,} rows{left_out}, "
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


def count_tokens(folder: Where, manifest: Manifest) -> int:
    """Tokens of the corpus, each document's EOS with it, BOS and padding without. Only text without noise has to be read for it."""
    if manifest.identity["extraction"] == "parallel":
        return int(manifest.totals["tokens"])
    readers = (manifest.open(folder, receipt, check_hash=False) for receipt in manifest.receipts)
    return sum(int(rows.length.sum(dtype="int64")) - len(rows) for reader in readers for rows in reader)


def _make(stage: str, recipe: Work, job: Job, done: set[int], pending: list[int], log: RunLog, quarantine: bool) -> dict[int, str]:
    """Make the pending shards; returns the reason of each that failed."""
    work = [job.work(shard) for shard in range(len(job.plan.shards))]
    already = sum(work[shard] for shard in done if shard < len(work))
    failures: dict[int, str] = {}
    with Progress(stage, "shards", len(work), sum(work), len(done), already) as progress:
        if job.plan.identity["extraction"] != "none":
            from pipeline import workers

            return workers.extract(recipe, job, pending, progress, log, quarantine)
        for shard in pending:
            try:
                receipt = job.extract(shard, Making(shard, quarantine))
            except ValueError as error:
                log.write("shard failed", shard=shard, reason=str(error))
                failures[shard] = str(error)
                continue
            progress.advance(work=work[shard], tokens=receipt.rows * (job.plan.identity["block_length"] - 1))
            log.write("shard", shard=shard, receipt=receipt.to_json())
    return failures


def replay(dataset: str, model: str | None, dtype: str | None, rows: int | None) -> None:
    """Raises WorkError when the teacher would have written something else."""
    from pipeline.replay import replay as again

    report = again(Folder.of(dataset), model, dtype, rows)
    for line in report.near_ties:
        print(line)
    say(f"replay: {report.in_words()}")
    if report.failures:
        raise WorkError(
            f"{report.failures:,} positions of {dataset} are not what the teacher chooses there; first: {report.first_failure}; "
            "the dataset is damaged, or this is not its teacher"
        )


def verify(dataset: str, model: str | None, options: dict[str, Any]) -> None:
    """Raises DamageError that names every damaged file."""
    from pipeline.verify import verify as check

    check(Folder.of(dataset), options["processes"])
    if options["deep"]:
        from pipeline.deep import again

        report = again(Folder.of(dataset), options["deep"], model, options["deep_seed"])
        say(f"verify: {report.in_words()}")
        if report.failures:
            raise DamageError([f"{dataset}: the teacher's own noise is another at {report.failures:,} positions, first: {report.first_failure}"])


def show(dataset: str, model: str | None, options: dict[str, Any]) -> None:
    """What a dataset is; with `trust`, raises DamageError after the verdict where something is damaged."""
    from pipeline import inspect, trust

    folder = Folder.of(dataset)
    if options["plot"]:
        inspect.plot(folder, Path(options["plot"]))
    if options["trust"]:
        verdict = trust.judge(folder, options["processes"], options["deep"], model, options["deep_seed"])
        print(json.dumps(verdict.to_json(), indent=1, sort_keys=True) if options["json"] else printable(verdict.in_words()))
        if verdict.damage:
            raise DamageError(verdict.damage)
        return
    print(inspect.describe(folder) if options["json"] else printable(inspect.in_words(folder, options["rows"])))


def status(dataset: str) -> None:
    from pipeline.status import in_words

    print(in_words(Folder.of(dataset)))
