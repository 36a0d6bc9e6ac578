"""A plan that stands: the same recipe finds it again by listing its corpus, and a longer corpus extends it.

Files are known again by path and size; their content is checked shard by shard when shards are made. A file that the plan
does not know makes the dataset grow, where that is asked for: what is there keeps its bytes, hashes and ids, the new
files become shards behind the others, with the dataset's seed and an identity of their own, and the grown dataset's
identity lists the identities of its parts in `parents`. Its old manifest stays until the new one is written.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from noise.dataset import Plan
from noise.folder import Folder
from noise.identity import Identity, default_seed, differences
from noise.lineage import parts
from noise.storage import DatasetError
from pipeline import config, files
from pipeline.corpus import EMBEDDED, Corpus, CorpusFile
from pipeline.divide import divide
from pipeline.plan import boundaries_hash, check_numerics, corpus_of, numerics, settings
from pipeline.tokenizer import Tokenizer, find_tokenizer


def find_plan(recipe: config.Recipe, grow: bool, write: bool = True) -> tuple[Plan, Corpus, Tokenizer]:
    """The plan in the recipe's output, extended by new files if `grow`; the extended plan is written if `write`.

    Raises DatasetError by field or file when the recipe or the corpus is not what the plan was made from.
    """
    folder = Folder.of(recipe.output)
    standing, tokenizer = Plan.read(folder), Tokenizer(find_tokenizer(recipe))
    ours = settings(recipe, tokenizer)
    _check_settings(recipe, ours, standing, folder)
    check_numerics(numerics(recipe.teacher), standing, folder)
    listed = Corpus.open(recipe.corpus)
    if listed.locations == [EMBEDDED]:
        _refuse(folder, differences(listed.identity(), standing.identity["corpus"], "corpus"))
        return standing, listed, tokenizer
    sizes = dict(zip(listed.locations, (file.bytes for file in listed.listed()), strict=True))
    roots = [
        _root(part["corpus"]["files"], sizes, root) for part, root in zip(parts(standing.identity), standing.environment["corpus_roots"], strict=True)
    ]
    corpus = corpus_of(recipe, standing, roots)
    known = set(corpus.locations)
    fresh = [location for location in listed.locations if location not in known]
    if not fresh:
        return standing, corpus, tokenizer
    if not grow:
        raise DatasetError(
            f"corpus.files: {len(fresh)} files are new to the plan of {folder}, first {fresh[0]}; to grow the dataset by them run "
            "`python -m pipeline plan` first, else leave them out"
        )
    plan, corpus = _grown(recipe, standing, ours, corpus, {location: sizes[location] for location in fresh})
    if write:
        plan.write(folder)
    return plan, corpus, tokenizer


def _check_settings(recipe: config.Recipe, ours: Identity, standing: Plan, folder: Folder) -> None:
    first, last = parts(standing.identity)[0], parts(standing.identity)[-1]
    theirs = {name: value for name, value in last.items() if name != "seed"}
    theirs["corpus"] = {name: value for name, value in last["corpus"].items() if name != "files"}
    theirs["shards"] = {name: value for name, value in last["shards"].items() if name in ours["shards"]}
    seed = str(recipe.noise.seed if recipe.noise.seed is not None else default_seed(first))
    _refuse(folder, differences(ours | {"seed": seed}, theirs | {"seed": last["seed"]}))


def _refuse(folder: Folder, changed: list[str]) -> None:
    if changed:
        lines = "\n  ".join(changed)
        raise DatasetError(f"{folder} already holds a dataset of another identity:\n  {lines}\nchoose another output folder, or restore what changed")


def _root(expected: list[dict[str, Any]], sizes: dict[str, int], planned: str) -> str:
    """The root under which all expected files are listed with their sizes; where it was when it was planned, or elsewhere now."""
    elsewhere = (root for location in sizes if (root := files.root_of(location, expected[0]["path"])) is not None)
    for root in (planned, *elsewhere):
        if all(sizes.get(files.join(root, file["path"])) == file["bytes"] for file in expected):
            return root
    wrong = [file for file in expected if sizes.get(files.join(planned, file["path"])) != file["bytes"]]
    location = files.join(planned, wrong[0]["path"])
    found = (
        f"has {sizes[location]} bytes, the plan saw {wrong[0]['bytes']}: it was changed"
        if location in sizes
        else "is not among corpus.files any more"
    )
    more = f", and {len(wrong) - 1} more files are not as planned" if len(wrong) > 1 else ""
    raise DatasetError(f"corpus.files: {location} {found}{more}; restore the corpus, or plan into a new output folder")


def _grown(recipe: config.Recipe, standing: Plan, ours: Identity, corpus: Corpus, fresh: dict[str, int]) -> tuple[Plan, Corpus]:
    """The plan of the corpus and the fresh files behind it. Raises DatasetError when they hold nothing for the split."""
    root = files.common_root(list(fresh))
    new = Corpus(recipe.corpus, root, [CorpusFile(files.relative(location, root), size, "") for location, size in fresh.items()])
    whole, first = Corpus.chain([corpus, new]), len(corpus.locations)
    shards = divide(whole, recipe.packing.shard_characters, first)
    if not shards:
        raise DatasetError(
            f"the {len(fresh)} new files, first {next(iter(fresh))}, hold no document of the split {recipe.corpus.split!r}: leave them out"
        )
    seed, made = standing.identity["seed"], len(standing.shards)
    part = ours | {
        "corpus": {"files": [asdict(file) for file in whole.files[first:]], **ours["corpus"]},
        "shards": ours["shards"] | {"first": made, "count": len(shards), "boundaries_sha256": boundaries_hash(shards, first)},
        "seed": seed,
    }
    identity = ours | {"seed": seed, "shards": ours["shards"] | {"count": made + len(shards)}, "parents": [*parts(standing.identity), part]}
    environment = standing.environment | {"corpus_roots": whole.roots}
    return Plan(identity, environment, standing.shards + [asdict(shard) for shard in shards]), whole
