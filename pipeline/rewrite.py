"""The rows of a dataset in new files: other shards, fewer rows, another format version or compression. No teacher, and not a number changes.

    reshard     the same rows, so many a shard
    subset      some rows: a range, or so many drawn evenly
    convert     the same shards in another format version or compression

A row keeps its tokens, sequence id and seed, so its noise is the one it had; a shard holds rows of one seed. The identity holds the
parent's and what was done to it (`noise.lineage`). Stopped at any moment, the same command continues.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from noise import philox
from noise.commit import commit_shard
from noise.dataset import Manifest, Plan
from noise.folder import Folder, Where
from noise.identity import Identity
from noise.lineage import Span, spans
from noise.receipt import listed
from noise.shard import COMPRESSIONS, FORMAT_VERSIONS, ROWS_PER_BATCH, Array, Rows, ShardMetadata
from noise.storage import DatasetError
from pipeline.derive import SEVERAL, begin, finish, makers
from pipeline.progress import Progress

_ORDER_DRAW = 195


@dataclass(frozen=True)
class RowSource:
    """The rows of a finished dataset, by number."""

    folder: Folder
    manifest: Manifest

    @classmethod
    def of(cls, where: Where) -> RowSource:
        folder = Folder.of(where)
        return cls(folder, Manifest.read(folder))

    @property
    def starts(self) -> Array:
        """int64 [shards + 1]: the first row of each shard."""
        return np.cumsum([0] + [receipt.rows for receipt in self.manifest.receipts])

    def seed_of(self, shard: int) -> str:
        """A shard's own seed; of a dataset that has several and no record of whose is whose, it is asked."""
        known = next(part["seed"] for span, part in self.makers if span.first <= shard < span.stop)
        return known if known != SEVERAL else self.manifest.open(self.folder, self.manifest.receipts[shard], check_hash=False).metadata.seed

    @functools.cached_property
    def makers(self) -> list[tuple[Span, Identity]]:
        identity = self.manifest.identity
        return list(zip(spans(identity), makers(identity), strict=True))

    def rows(self, wanted: Array) -> Iterator[Rows]:
        """The rows with these numbers, int64 ascending, in pieces."""
        return (rows for _, rows in self.pieces(wanted))

    def pieces(self, wanted: Array) -> Iterator[tuple[ShardMetadata, Rows]]:
        """As `rows`, each with what its shard says of itself."""
        starts = self.starts
        for shard in np.unique(np.searchsorted(starts, wanted, side="right") - 1):
            reader = self.manifest.open(self.folder, self.manifest.receipts[shard])
            within = wanted[(wanted >= starts[shard]) & (wanted < starts[shard + 1])] - starts[shard]
            for batch in np.unique(within // ROWS_PER_BATCH):
                rows = reader.batch(int(batch))
                chosen = within[within // ROWS_PER_BATCH == batch] - batch * ROWS_PER_BATCH
                for run in np.split(chosen, np.nonzero(np.diff(chosen) > 1)[0] + 1):
                    yield reader.metadata, rows[int(run[0]) : int(run[-1]) + 1]


@dataclass(frozen=True)
class _Cut:
    """One new shard."""

    rows: Array
    """int64: their numbers in the source, ascending"""
    seed: str
    characters_in: int = 0
    """Known where the shard is one of the source's, whole."""


def reshard(dataset: Where, rows_per_shard: int, output: Where) -> Manifest:
    """The same rows in shards of `rows_per_shard`, the last of each seed perhaps shorter."""
    if rows_per_shard < 1:
        raise DatasetError(f"rows per shard is {rows_per_shard}; it must be at least 1")
    source = RowSource.of(dataset)
    whole = np.arange(source.starts[-1])
    return _rewrite(source, {"operation": "reshard", "rows_per_shard": rows_per_shard}, _cuts(source, whole, rows_per_shard), output)


def rows_between(dataset: Where, first: int, stop: int, output: Where) -> Manifest:
    """Rows first..stop-1 of the dataset."""
    source = RowSource.of(dataset)
    if not 0 <= first < stop <= source.starts[-1]:
        raise DatasetError(f"rows are {first}:{stop}; {source.folder} has the rows 0:{source.starts[-1]}")
    return _rewrite(source, {"operation": "subset", "rows": [first, stop]}, _cuts(source, np.arange(first, stop)), output)


def sample_rows(dataset: Where, count: int, seed: int, output: Where) -> Manifest:
    """So many rows, each as likely as any other, in their order; a function of the seed."""
    source = RowSource.of(dataset)
    total = int(source.starts[-1])
    if not 1 <= count <= total or not 0 <= seed < 2**64:
        raise DatasetError(f"{count} rows with seed {seed} were asked for; {source.folder} has {total} rows, and a seed is in [0, 2^64)")
    number = torch.arange(total)
    word = philox.words_at(philox.rows(seed, number, torch.zeros_like(number), _ORDER_DRAW), torch.zeros_like(number))
    chosen = np.sort(np.argsort(word.numpy(), kind="stable")[:count])
    return _rewrite(source, {"operation": "subset", "sample": count, "seed": str(seed)}, _cuts(source, chosen), output)


def convert(dataset: Where, output: Where, format_version: int | None = None, compression: str | None = None) -> Manifest:
    """The same shards in another format version or compression; what is not given stays."""
    source = RowSource.of(dataset)
    ours = source.manifest.identity
    version, packed = format_version or ours["format_version"], compression or ours.get("compression", "none")
    if version not in FORMAT_VERSIONS or packed not in COMPRESSIONS:
        raise DatasetError(
            f"format version {version} with compression {packed} cannot be written; versions {FORMAT_VERSIONS}, compressions {COMPRESSIONS}"
        )
    if (version, packed) == (ours["format_version"], ours.get("compression", "none")):
        raise DatasetError(f"{source.folder} has format version {version} and compression {packed} already; name what to change")
    starts = source.starts
    cuts = [
        _Cut(np.arange(starts[receipt.shard], starts[receipt.shard + 1]), source.seed_of(receipt.shard), receipt.characters_in)
        for receipt in source.manifest.receipts
    ]
    return _rewrite(source, {"operation": "convert"}, cuts, output, {"format_version": version, "compression": packed})


def _cuts(source: RowSource, wanted: Array, rows_per_shard: int = 0) -> list[_Cut]:
    """Rows cut where the seed changes, and after so many; without a number, where the source is cut."""
    starts = source.starts
    shard_of = np.searchsorted(starts, wanted, side="right") - 1
    seeds = {shard: source.seed_of(shard) for shard in np.unique(shard_of).tolist()}
    group_of: Any = shard_of if not rows_per_shard else np.array([seeds[shard] for shard in shard_of.tolist()])
    groups = np.split(wanted, np.nonzero(group_of[1:] != group_of[:-1])[0] + 1)
    cuts = []
    for group in groups:
        seed = seeds[int(np.searchsorted(starts, group[0], side="right") - 1)]
        size = rows_per_shard or len(group)
        cuts += [_Cut(group[at : at + size], seed) for at in range(0, len(group), size)]
    return cuts


def _rewrite(source: RowSource, done: dict[str, Any], cuts: list[_Cut], output: Where, changed: dict[str, Any] | None = None) -> Manifest:
    folder, parent = Folder.of(output), source.manifest.identity
    kept = {name: value for name, value in parent.items() if name not in ("parents", "sources", "rewritten")}
    kept["corpus"] = {name: value for name, value in kept.get("corpus", {}).items() if name != "files"}
    done = done | {"root_hash": source.manifest.root_hash}
    identity = {**kept, **(changed or {}), "shards": {"count": len(cuts)}, "parents": [parent], "rewritten": done}
    environment = Plan.read(source.folder).environment | {"sources": [str(source.folder)]}
    plan = Plan(identity, environment, [{"first": int(cut.rows[0]), "rows": len(cut.rows)} for cut in cuts])
    begin(source.folder, folder, plan)
    there = listed(folder)
    with Progress("rewrite", "shards", len(cuts), sum(len(cut.rows) for cut in cuts)) as progress:
        for number, cut in enumerate(cuts):
            if number not in there:
                commit_shard(folder, replace(plan.metadata(number), seed=cut.seed), source.rows(cut.rows), cut.characters_in)
            progress.advance(work=len(cut.rows), tokens=0)
    return finish(folder, plan)
