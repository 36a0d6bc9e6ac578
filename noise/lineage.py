"""Where a dataset's shards come from: made by itself, by the parts that it grew from, or taken whole from other datasets.

    parents                     the identities of the datasets before this one, whole
    parents and shards.first    a grown dataset: each part made the shards behind those of the part before
    parents and sources         a dataset of whole shards of others, under new numbers: [{"parent", "root_hash", "shards": [[first, stop], ...]}, ...]
    parents and rewritten       rows of one other dataset in new files, under the dataset's own identity

A shard says in its own metadata which identity made it and under which number. `origin` says what that must be, so that a shard can
change its place and not its bytes.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from dataclasses import dataclass

from noise.identity import Identity, identity_hash
from noise.storage import DatasetError

LAST = 2**62
"""Behind any number of a shard."""
MOST_SPANS = 2**20
"""Runs of shards with one maker; a stranger's identity could claim more than memory holds."""


@dataclass(frozen=True)
class Span:
    """Consecutive shards of a dataset that one identity made."""

    first: int
    stop: int
    made_by: str
    """identity hash"""
    shift: int
    """A shard's number here minus the one that it was made under."""


def parts(identity: Identity) -> list[Identity]:
    """The identities that made a dataset's shards, in order: a grown dataset's parts, those of its parents, or its own."""
    if "rewritten" in identity or not identity.get("parents"):
        return [identity]
    return [part for parent in identity["parents"] for part in parts(parent)]


def roots(identity: Identity) -> list[Identity]:
    """The identities behind those: of whatever read a corpus or wrote a text."""
    return [root for parent in identity["parents"] for root in roots(parent)] if identity.get("parents") else [identity]


def grows_from(identity: Identity, older: Identity) -> bool:
    """Whether the shards of an older state of the dataset are the first of this one's."""
    ours, theirs = parts(identity), parts(older)
    return len(ours) > len(theirs) and ours[: len(theirs)] == theirs


def spans(identity: Identity) -> list[Span]:
    """Whose each shard is, in order. Raises DatasetError for a lineage that makes no sense."""
    try:
        if "sources" in identity:
            return _taken(identity)
        if "rewritten" in identity or "parents" not in identity:
            return [Span(0, LAST, identity_hash(identity), 0)]
        found: list[Span] = []
        for part in parts(identity):
            first = found[-1].stop if found else 0
            found.append(Span(first, first + part["shards"]["count"], identity_hash(part), 0))
        return found
    except (KeyError, TypeError, IndexError, ValueError, RecursionError) as error:
        raise DatasetError(f"the identity's parents and sources do not fit together ({error!r}); the dataset was edited") from None


def _taken(identity: Identity) -> list[Span]:
    of_parents = [spans(parent) for parent in identity["parents"]]
    found: list[Span] = []
    for source in identity["sources"]:
        of = of_parents[source["parent"]]
        for first, stop in source["shards"]:
            begin = max(0, bisect_right(of, first, key=lambda span: span.first) - 1)
            for span in itertools.takewhile(lambda span, stop=stop: span.first < stop, of[begin:]):  # type: ignore[misc]
                low, high = max(first, span.first), min(stop, span.stop)
                if low < high:
                    place = found[-1].stop if found else 0
                    found.append(Span(place, place + high - low, span.made_by, place - low + span.shift))
            if len(found) > MOST_SPANS:
                raise ValueError(f"more than {MOST_SPANS:,} runs of shards")
    return found


def origin(of: list[Span], shard: int) -> tuple[str, int]:
    """(identity hash, number) that this shard carries in its own metadata. Raises DatasetError for a shard that the dataset has not."""
    at = bisect_right(of, shard, key=lambda span: span.first) - 1
    if at < 0 or shard >= of[at].stop:
        raise DatasetError(f"shard {shard} is not among those that the identity accounts for, 0..{of[-1].stop - 1 if of else -1}")
    return of[at].made_by, shard - of[at].shift


def in_words(identity: Identity) -> str:
    """What was done to other datasets to make this one; "" where nothing was."""
    parents = len(identity.get("parents", []))
    if "sources" in identity:
        taken = sum(stop - first for source in identity["sources"] for first, stop in source["shards"])
        return f"{taken:,} shards, byte for byte, of {parents} dataset{'s' * (parents > 1)}"
    if "rewritten" in identity:
        what = ", ".join(f"{name} {value}" for name, value in identity["rewritten"].items() if name not in ("operation", "root_hash"))
        return f"rows of another dataset in new shards ({identity['rewritten']['operation']}{': ' * bool(what)}{what})"
    return f"grown {parents - 1} times" if parents else ""
