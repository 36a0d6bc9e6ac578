"""A finished dataset, checked from the outside in: manifest, plan, every small file, then every shard, many at a time.

    manifest.json     its own hash, its form to the byte, totals and root hash from its receipts, the identity's hash
    seal.json         its own hash, its form to the byte
    plan.json         the manifest's identity
    shards/*.json     the manifest's receipts, to the byte
    shards/*.arrow    sha256, then schema, counts and content (`soundness`)
    what else seal.json names (card, plan, recipe, tokenizer)      sha256
    run.jsonl         the hash in each of its lines
    driver.json       its own hash, its form to the byte; there while a driver runs, or when one died late

So any changed byte is found, and its file named. Not covered: files that somebody put there later; those in the folder itself are
listed. Datasets of before these hashes cover less, and that is said too. All damage is reported, not only the first. Costs one
pass over the bytes.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from noise.dataset import Manifest, Plan
from noise.folder import Folder, Where
from noise.identity import differences
from noise.lineage import grows_from
from noise.receipt import Receipt, read_receipt, receipt_name
from noise.seal import SEAL, broken, hash_of, read_seal
from noise.storage import LARGEST_FILE, DatasetError, parse_json, readable_json
from pipeline import lease, run_log
from pipeline.config import DamageError
from pipeline.progress import Progress, say
from pipeline.soundness import verify_shard
from pipeline.tokenizer import tokenizer_hash

ALONE = 2**26
"""Bytes of shards that one process checks by itself: starting others takes longer."""


@dataclass
class Findings:
    """What a verification saw."""

    manifest: Manifest
    damage: list[str] = field(default_factory=list)
    """One line a damaged file, each with its name."""
    uncovered: list[str] = field(default_factory=list)
    """Files that no hash covers."""
    cut_off: bool = False
    """Whether run.jsonl ends in the middle of a line."""
    sealed: bool = True
    """Whether the manifest has hashes of itself and of the small files."""
    receipts: bool = True
    """Whether the receipts' own files are there."""


def verify(where: Where, processes: int | None = None) -> Manifest:
    """Raises DamageError that names every file that is missing, damaged or not this dataset's; DatasetError where there is nothing to verify."""
    folder = Folder.of(where)
    found = examine(folder, processes)
    if found.damage:
        raise DamageError(found.damage)
    totals = found.manifest.totals
    left_out = f", {totals['rows_quarantined']:,} rows quarantined" if "rows_quarantined" in totals else ""
    for line in uncovered_in_words(found):
        say(f"verify: {line}")
    say(
        f"verify: {folder} is whole: {totals['rows']:,} rows, {totals['tokens']:,} positions with noise{left_out}, "
        f"root hash {found.manifest.root_hash}"
    )
    return found.manifest


def uncovered_in_words(found: Findings) -> list[str]:
    lines = [] if found.sealed else ["the manifest is of an older form: no hash covers itself, the plan beside its identity, and the card"]
    if found.cut_off:
        lines.append(f"{run_log.NAME} ends in the middle of a line, as when its writer is stopped; the next one goes on behind it")
    if found.uncovered:
        lines.append(f"no hash covers {', '.join(found.uncovered[:10])}" + (f" and {len(found.uncovered) - 10} more" * (len(found.uncovered) > 10)))
    return lines


def examine(where: Where, processes: int | None = None) -> Findings:
    """Look at everything. Raises DatasetError where there is no finished dataset that this code reads, DamageError where its manifest is damaged."""
    folder = Folder.of(where)
    manifest, value = _manifest(folder)
    found = Findings(manifest, sealed="manifest_hash" in value)
    found.damage += _plan(folder, manifest)
    found.damage += _small_files(folder, manifest, found)
    found.damage += _logs(folder, found)
    there = dict(folder.sizes("shards"))
    for inner in sorted({receipt.file.rpartition("/")[0] for receipt in manifest.receipts} - {""}):  # of a published dataset
        there |= {f"{inner}/{name}": size for name, size in folder.sizes(f"shards/{inner}").items()}
    names = [receipt_name(receipt.shard) for receipt in manifest.receipts]
    found.receipts = bool(set(names) & there.keys())
    known = {*names, *(receipt.file for receipt in manifest.receipts)}
    strangers = sorted(name for name in there if name not in known and not name.endswith(".tmp"))
    found.damage += [f"{folder.path(f'shards/{name}')} is no shard of this dataset; remove it" for name in strangers]
    found.damage += _shards(folder, found, processes)
    return found


def _manifest(folder: Folder) -> tuple[Manifest, dict[str, Any]]:
    """The manifest, which must be whole before it can tell of anything else."""
    if not folder.exists("manifest.json"):
        Manifest.read(folder)  # says what is there instead
    path, content = folder.path("manifest.json"), folder.read("manifest.json")
    try:
        value = parse_json(content, path)
        wrong = broken(value, content, path) if "manifest_hash" in value else ""
    except DatasetError as error:
        raise DamageError([str(error)]) from None
    try:
        manifest = Manifest.read(folder)
    except DatasetError as error:
        if "manifest_hash" in value and not wrong:  # whole, and of a version or kind that is not read here
            raise
        raise DamageError([str(error)]) from None
    if wrong:
        raise DamageError([wrong])
    return manifest, value


def _plan(folder: Folder, manifest: Manifest) -> list[str]:
    """Raises DatasetError where the dataset is being grown."""
    try:
        plan = Plan.read(folder).identity
    except DatasetError as error:
        return [str(error)]
    changed = differences(plan, manifest.identity)
    if changed and grows_from(plan, manifest.identity):
        raise DatasetError(f"{folder} is being grown, and its manifest is the one from before; run `python -m pipeline extract` to finish")
    return [f"{folder}: plan.json and manifest.json have different identities: {'; '.join(changed)}"] if changed else []


def _small_files(folder: Folder, manifest: Manifest, found: Findings) -> list[str]:
    """Against their hashes; fills in what no hash covers."""
    damage, sealed = [], {}
    try:
        sealed = read_seal(folder)
    except FileNotFoundError:
        damage = [f"{folder.path(SEAL)} is missing; fetch it again"] if found.sealed else []
    except DatasetError as error:
        damage = [str(error)]
    for name, expected in sealed.items():
        try:
            actual = hash_of(folder, name)
        except FileNotFoundError:
            damage.append(f"{folder.path(name)} is missing, and {SEAL} names it; fetch it again")
            continue
        if actual != expected:
            damage.append(f"{folder.path(name)} has sha256 {actual[:16]}..., {SEAL} says {expected[:16]}...: edited or damaged; fetch it again")
    there = [*folder.sizes(""), *(f"tokenizer/{name}" for name in folder.sizes("tokenizer"))]
    found.uncovered = sorted(name for name in there if name not in sealed and name not in (SEAL, "manifest.json") and not name.endswith(".tmp"))
    special = manifest.identity.get("tokenizer")
    if isinstance(special, dict) and not any(folder.path("tokenizer") in line for line in damage):
        try:
            ours = tokenizer_hash(folder.fetched("tokenizer"))
        except (DatasetError, OSError) as error:
            return [*damage, f"{folder.path('tokenizer')} cannot be read: {error}"]
        if ours != special["sha256"]:
            damage.append(f"{folder.path('tokenizer')} is not the tokenizer of this dataset: its hash is not the identity's; fetch it again")
        elif not sealed:  # of a tokenizer, the identity's hash covers the rules
            found.uncovered = [name for name in found.uncovered if name != "tokenizer/tokenizer.json"]
    return damage


def _logs(folder: Folder, found: Findings) -> list[str]:
    """What is written beside a dataset while it is made, each with hashes of its own; takes from `uncovered` what they cover."""
    damage, covered = [], set()
    if run_log.NAME in found.uncovered and folder.sizes("")[run_log.NAME] <= LARGEST_FILE:
        try:
            log = run_log.examine(folder.read(run_log.NAME))
        except DatasetError as error:
            return [str(error)]
        covered |= {run_log.NAME} if log.hashed else set()
        found.cut_off = log.cut_off and not log.damaged
        if log.damaged:
            path = folder.path(run_log.NAME)
            damage.append(f"{path}, line {log.damaged}, is not as it was written: edited or damaged; nothing needs it: fetch it again, or delete it")
    if lease.NAME in found.uncovered:
        try:
            _, hashed = lease.read_holder(folder)
        except FileNotFoundError:  # its driver has ended meanwhile
            hashed = True
        except DatasetError as error:
            hashed = True
            damage.append(str(error))
        covered |= {lease.NAME} if hashed else set()
    found.uncovered = [name for name in found.uncovered if name not in covered]
    return damage


def _shards(folder: Folder, found: Findings, processes: int | None) -> list[str]:
    """Every shard with its receipt, in order; with more than one process, many at a time."""
    manifest, damage = found.manifest, []
    size = manifest.totals["bytes"]
    processes = min(processes or (1 if size <= ALONE else os.cpu_count() or 1), max(1, len(manifest.receipts)))
    look = _Look(folder.absolute(), found.manifest, found.sealed, found.receipts)
    with Progress("verify", "shards", len(manifest.receipts), size) as progress, _many(look, processes) as results:
        for receipt, wrong in zip(manifest.receipts, results, strict=True):
            damage += wrong
            progress.advance(work=receipt.bytes, tokens=receipt.tokens)
    return damage


@contextmanager
def _many(look: _Look, processes: int) -> Iterator[Iterator[list[str]]]:
    """What `look` says of every shard, in order. Raises OSError where a process died."""
    shards = range(len(look.manifest.receipts))
    if processes == 1:
        yield map(look, shards)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _begin, (look,)) as pool:
        try:
            yield pool.map(_look, shards, chunksize=max(1, min(64, len(shards) // (8 * processes))))
        except BrokenProcessPool:
            raise OSError(f"a process that read shards of {look.folder} died, perhaps for want of memory; try --processes 1") from None
        finally:
            pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class _Look:
    """One shard and its receipt's file -> what is wrong with them."""

    folder: str
    manifest: Manifest
    sealed: bool
    receipts: bool

    def __call__(self, shard: int) -> list[str]:
        folder, receipt = Folder.of(self.folder), self.manifest.receipts[shard]
        damage = self._receipt(folder, receipt) if self.receipts else []
        try:
            verify_shard(self.manifest.open(folder, receipt), receipt, self.manifest.identity)
        except DatasetError as error:
            damage.append(str(error))
        return damage

    def _receipt(self, folder: Folder, receipt: Receipt) -> list[str]:
        name = f"shards/{receipt_name(receipt.shard)}"
        path = folder.path(name)
        try:
            content = folder.read(name)
            same = read_receipt(parse_json(content, path), path) == receipt
        except FileNotFoundError:
            return [f"{path} is missing, though other receipts are there; fetch it again"]
        except DatasetError as error:
            return [str(error)]
        if not same or (self.sealed and content != readable_json(receipt.to_json()).encode()):
            return [f"{path} is not the receipt that the manifest holds: edited or damaged; fetch it again"]
        return []


_ours: list[_Look] = []


def _begin(look: _Look) -> None:
    import torch

    torch.set_num_threads(1)
    _ours[:] = [look]


def _look(shard: int) -> list[str]:
    return _ours[0](shard)


__all__ = ["DamageError", "Findings", "examine", "verify", "verify_shard"]
