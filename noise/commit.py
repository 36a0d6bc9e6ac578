"""A shard is made where nobody sees it, and is then there as a whole: the file under its name, then its receipt."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import BinaryIO

from noise import stores
from noise.folder import Folder, Where
from noise.receipt import Quarantined, Receipt, Totals, read_receipt, receipt_name, shard_name
from noise.shard import Rows, ShardMetadata, ShardWriter
from noise.storage import DatasetError, readable_json, sha256_file


def commit_shard(
    where: Where,
    metadata: ShardMetadata,
    rows: Iterable[Rows],
    characters_in: int,
    tokens_dropped: int = 0,
    quarantined: Sequence[Quarantined] = (),
) -> Receipt:
    """Write one shard where nobody sees it, then commit it: the file under its name, then its receipt.

    A receipt that is there already wins, and this writer's own work is discarded. Returns the receipt that stands.
    `quarantined` is read when all rows have been: what makes the rows may add to it.
    """
    folder, name = Folder.of(where), shard_name(metadata.shard)
    totals = Totals(metadata)
    with folder.draft(f"shards/{name}") as draft:
        writer = ShardWriter(draft, metadata)
        for part in rows:
            writer.add(part)
            totals.add(part)
        writer.close()
        draft.flush()
        os.fsync(draft.fileno())
        receipt = totals.receipt(name, sha256_file(draft), os.fstat(draft.fileno()).st_size, characters_in)
        return _commit(folder, draft, replace(receipt, tokens_dropped=tokens_dropped, quarantined=tuple(quarantined)))


PIECE = 8 * 2**20
"""Bytes of a shard that are in memory at a time."""


def adopt_shard(where: Where, shard: Folder, name: str, receipt: Receipt) -> Receipt:
    """Commit a shard that another folder has as `name`, byte for byte, under the receipt's own number.

    Raises DatasetError where its bytes are not those of the receipt; nothing is committed then.
    """
    folder, digest = Folder.of(where), hashlib.sha256()
    with folder.draft(f"shards/{receipt.file}") as draft:
        source = shard.map(name)
        while piece := source.read(PIECE):
            digest.update(piece)
            draft.write(piece)
        if digest.hexdigest() != receipt.sha256:
            raise DatasetError(
                f"{shard.path(name)} has sha256 {digest.hexdigest()[:16]}..., its receipt says {receipt.sha256[:16]}...: fetch it again"
            )
        draft.flush()
        os.fsync(draft.fileno())
        return _commit(folder, draft, receipt)


COMMITS = 8
"""How often a writer looks whether file and receipt belong together when another one writes other bytes of its shard at the same time."""


def _commit(folder: Folder, draft: BinaryIO, receipt: Receipt) -> Receipt:
    """Of several writers of a shard at once, whose bytes may differ, file and receipt of one stay: never one's file under another's receipt.

    On this machine the lock sees to it; where there are no locks, a file that was replaced before its writer looked is found by its inode,
    and its receipt withdrawn. On a store nothing is exclusive, so whoever has put a file or a receipt then reads both back, and puts both again
    unless they belong together: the last to put anything is the last to check. The one with the greater hash waits for the other first, or two
    could undo each other's work for ever. (Killed in between it leaves a mismatch, which every reader refuses by its hash.)
    """
    shard, done = f"shards/{receipt.file}", f"shards/{receipt_name(receipt.shard)}"
    ours = readable_json(receipt.to_json()).encode()
    with folder.lock():
        if folder.exists(done):
            return _standing(folder, done)
        folder.publish(draft, shard)
        folder.put_new(done, ours)
        for attempt in range(COMMITS):
            standing = _standing(folder, done)
            if folder.holds(draft, shard, standing.sha256):
                return standing
            if not folder.publishes_again or attempt == COMMITS - 1:
                break
            stores.pause(attempt)
            if standing.sha256 >= receipt.sha256 or attempt >= COMMITS // 2:
                folder.publish(draft, shard)
                folder.put(done, ours)
        folder.remove(done)
    raise DatasetError(f"{folder.path(shard)}: another writer makes other bytes of this shard at the same time; stop one of the two and run again")


def _standing(folder: Folder, name: str) -> Receipt:
    """A store's client asks for a file's length and then for its bytes: one that is replaced in between is read torn, and read again."""
    for attempt in range(COMMITS if folder.publishes_again else 1):
        if attempt:
            stores.pause(attempt - 1)
        with contextlib.suppress(DatasetError):
            return read_receipt(folder.json(name), folder.path(name))
    return read_receipt(folder.json(name), folder.path(name))
