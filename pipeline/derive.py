"""Datasets from datasets: whole shards of one or several, byte for byte, as a dataset of their own.

    merge     all shards of several datasets, one after another
    subset    some shards of one
    split     disjoint subsets that together are all of it, each shard drawn by its hash

No teacher, no noise made again: a shard keeps its bytes, and with them its hash, its seed and the identity it names. The new identity holds
those of its parents and says which of their shards it took (`noise.lineage`), so what is new is the order and the root hash.
Stopped at any moment, the same command continues.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from noise.commit import adopt_shard
from noise.dataset import Manifest, Plan
from noise.folder import Folder, Where
from noise.identity import Identity, differences
from noise.lineage import parts, roots, spans
from noise.receipt import listed, shard_name
from noise.storage import DatasetError, sha256_text
from pipeline.card import write_card
from pipeline.claim import claim
from pipeline.progress import Progress, say
from pipeline.tokenizer import check_tokenizer, copy_tokenizer

SAME = ("format_version", "compression", "extraction", "vocab_size", "block_length", "epsilon", "draws", "tokenizer", "teacher")
SEVERAL = "0"
"""The seed of a dataset whose shards have several: no dataset has this one of its own."""


@dataclass(frozen=True)
class Source:
    """Shards of a finished dataset."""

    folder: Folder
    manifest: Manifest
    shards: list[int]

    @classmethod
    def of(cls, where: Where, shards: Sequence[int] | None = None) -> Source:
        """All shards, or those with these numbers. Raises DatasetError for a number that is not there."""
        folder = Folder.of(where)
        manifest = Manifest.read(folder)
        count = len(manifest.receipts)
        chosen = list(range(count)) if shards is None else sorted(set(shards))
        if not chosen or chosen[-1] >= count:
            raise DatasetError(f"{folder} has the shards 0..{count - 1}; asked for {chosen[-1] if chosen else 'none'}")
        return cls(folder, manifest, chosen)

    def describe(self, parent: int) -> dict[str, Any]:
        """What the identity says of it; numbers as ranges."""
        ranges: list[list[int]] = []
        for shard in self.shards:
            if ranges and ranges[-1][1] == shard:
                ranges[-1][1] = shard + 1
            else:
                ranges.append([shard, shard + 1])
        return {"parent": parent, "root_hash": self.manifest.root_hash, "shards": ranges}


def merge(datasets: Sequence[Where], output: Where) -> Manifest:
    """All shards of several datasets. Raises DatasetError by field where they do not fit together, or hold the same rows."""
    if len(datasets) < 2:
        raise DatasetError(f"merge takes two datasets or more; given {len(datasets)}")
    return take([Source.of(dataset) for dataset in datasets], output)


def split(dataset: Where, shares: dict[str, float], output: str) -> dict[str, Manifest]:
    """A dataset as several, `output`/NAME for each name: the shards in the order of their hashes, cut at the shares.

    Raises DatasetError for shares that are not positive, do not add up to 1, or leave one of them without a shard.
    """
    if len(shares) < 2 or min(shares.values()) <= 0 or abs(sum(shares.values()) - 1) > 1e-9:
        raise DatasetError(f"shares are {shares}; name at least two, positive, that add up to 1")
    whole = Source.of(dataset)
    by_hash = sorted(whole.shards, key=lambda shard: sha256_text(f"split {whole.manifest.receipts[shard].sha256}"))
    cuts, reached = [0], 0.0
    for share in shares.values():
        reached += share
        cuts.append(round(reached * len(by_hash)))
    chosen = {name: sorted(by_hash[first:stop]) for name, first, stop in zip(shares, cuts, cuts[1:], strict=False)}
    empty = [name for name, shards in chosen.items() if not shards]
    if empty:
        raise DatasetError(
            f"{dataset} has {len(by_hash)} shards, too few for a share of {shares[empty[0]]}: {empty[0]} would be empty; reshard it first"
        )
    return {name: take([replace(whole, shards=shards)], f"{output.rstrip('/')}/{name}") for name, shards in chosen.items()}


def take(sources: list[Source], output: Where) -> Manifest:
    """The sources' shards as one dataset. Raises DatasetError where they do not fit, or `output` holds another dataset."""
    folder = Folder.of(output)
    identity = identity_of(sources)
    of_shards = [(source, shard) for source in sources for shard in source.shards]
    plan = Plan(
        identity,
        {"sources": [str(source.folder) for source in sources], **_shared([Plan.read(source.folder).environment for source in sources])},
        [{"root_hash": source.manifest.root_hash, "shard": shard} for source, shard in of_shards],
    )
    begin(sources[0].folder, folder, plan)
    there = listed(folder)
    with Progress("take", "shards", len(of_shards), sum(source.manifest.receipts[shard].bytes for source, shard in of_shards)) as progress:
        for number, (source, shard) in enumerate(of_shards):
            receipt = source.manifest.receipts[shard]
            if number not in there:
                adopt_shard(folder, source.folder, f"shards/{receipt.file}", replace(receipt, shard=number, file=shard_name(number)))
            progress.advance(work=receipt.bytes, tokens=receipt.tokens)
    return finish(folder, plan)


def begin(source: Folder, folder: Folder, plan: Plan) -> None:
    """plan.json and tokenizer/ of a dataset made of another. Raises DatasetError where the source's tokenizer is not its own, or the folder
    holds something else."""
    check_tokenizer(source, plan.identity, "fetch it again")
    claim(folder, plan)
    copy_tokenizer(source.fetched("tokenizer"), folder, plan.identity)


def finish(folder: Folder, plan: Plan) -> Manifest:
    """The card and the manifest of a dataset whose shards are all there."""
    manifest = Manifest.write(folder, plan, before=lambda made: write_card(folder, plan, made))
    say(f"{folder}: {len(manifest.receipts):,} shards, {manifest.totals['rows']:,} rows, root hash {manifest.root_hash}")
    return manifest


def identity_of(sources: list[Source]) -> Identity:
    """What all have in common, the parents whole, and which shards came from which."""
    identities = [source.manifest.identity for source in sources]
    ours = _alike(identities[0])
    for source in sources[1:]:
        changed = differences(ours, _alike(source.manifest.identity))
        if changed:
            raise DatasetError(
                f"{source.folder} does not fit {sources[0].folder}:\n  " + "\n  ".join(changed) + "\nmake them alike (convert) or apart"
            )
    _refuse_twice(sources)
    seeds = {part["seed"] for identity in identities for part in parts(identity)}
    common = _shared(
        [{name: value for name, value in identity.items() if name not in ("parents", "sources", "rewritten")} for identity in identities]
    )
    common["corpus"] = {name: value for name, value in common.get("corpus", {}).items() if name != "files"}
    return {
        **common,
        "seed": seeds.pop() if len(seeds) == 1 else SEVERAL,
        "shards": {"count": sum(len(source.shards) for source in sources)},
        "parents": identities,
        "sources": [source.describe(parent) for parent, source in enumerate(sources)],
    }


def _alike(identity: Identity) -> dict[str, Any]:
    """What shards of one dataset must have in common."""
    return {name: identity.get(name) for name in SAME} | {"stop": identity.get("generation", {}).get("stop")}


def _shared(values: list[dict[str, Any]]) -> dict[str, Any]:
    """The fields in which all agree, also within fields."""
    first, *others = values
    shared: dict[str, Any] = {}
    for name, value in first.items():
        if all(other.get(name) == value for other in others):
            shared[name] = value
        elif isinstance(value, dict) and all(isinstance(other.get(name), dict) for other in others):
            shared[name] = _shared([value, *(other[name] for other in others)])
    return shared


def _refuse_twice(sources: list[Source]) -> None:
    """Raises DatasetError where two of the sources' shards hold the same rows: one shard twice, one seed twice, or one dataset in different cuts."""
    seen: dict[tuple[str, int], Folder] = {}
    cuts: dict[str, tuple[str, Folder]] = {}
    for source in sources:
        identity = source.manifest.identity
        for span, part in zip(spans(identity), makers(identity), strict=True):
            cut = span.made_by if "rewritten" in part else ""
            for root in roots(part):
                standing, where = cuts.setdefault(root["seed"], (cut, source.folder))
                if standing != cut:
                    raise DatasetError(
                        f"{source.folder} and {where} have rows of one dataset, seed {root['seed']}, in different shards; take them once"
                    )
            for shard in source.shards[bisect_left(source.shards, span.first) : bisect_left(source.shards, span.stop)]:
                key = (cut or part["seed"], shard - span.shift)
                if key in seen:
                    raise DatasetError(f"{source.folder} and {seen[key]} hold the same noise: seed {part['seed']}, shard {key[1]}; take it once")
                seen[key] = source.folder


def makers(identity: Identity) -> list[Identity]:
    """The identity behind each span."""
    if "sources" not in identity:
        return parts(identity)
    made = []
    for source in identity["sources"]:
        parent = identity["parents"][source["parent"]]
        for first, stop in source["shards"]:
            made += [part for span, part in zip(spans(parent), makers(parent), strict=True) if max(first, span.first) < min(stop, span.stop)]
    return made
