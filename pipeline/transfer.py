"""A finished dataset from one place to another, in its published form: push and pull are the same work in two directions.

    shards/00000/00000.arrow    at most 1,000 shards in a folder, since stores and hubs list slowly
    manifest.json               the receipts, with the new names of files; identity and root hash are what they were
    README.md, plan.json, tokenizer/ ...    as they are; what is no part of a dataset stays behind, and is named

plan.json goes first and the manifest last, so the same command continues, and a place that holds something else is refused. Every shard's
bytes are hashed on the way, and refused unless they are those of its receipt. A shard that is there already stays: in a folder if it has
its hash; on a store or hub, which would have to send it back to be hashed, if it has its size, and `verify` hashes it.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from noise.dataset import Manifest, Plan
from noise.folder import Folder, Where
from noise.local import LocalFolder
from noise.receipt import Receipt, listed, published_name
from noise.seal import SEAL, SMALL_FILES, beside, read_seal
from noise.storage import DatasetError
from pipeline import card
from pipeline.claim import refuse_others
from pipeline.progress import Progress, say

TRANSFERS = 8
"""Shards on their way at the same time."""
PIECE = 8 * 2**20
"""Bytes of a shard that are in memory at a time."""


@dataclass(frozen=True)
class Transfer:
    """What is where, before anything moves."""

    source: Folder
    target: Folder
    manifest: Manifest
    """of the source"""
    missing: list[Receipt]
    """of the source, not at the target yet"""

    @property
    def bytes(self) -> int:
        return sum(receipt.bytes for receipt in self.missing)


def prepare(source: Where, target: Where, private: bool = False, dry_run: bool = False) -> Transfer:
    """Look at both ends. Raises DatasetError where the source is unfinished, or the target holds something else."""
    here, there = Folder.of(source), Folder.of(target)
    manifest = Manifest.read(here)
    there.begin(private, dry_run)
    if there.exists("manifest.json"):
        standing = Manifest.read(there)
        if standing.root_hash != manifest.root_hash:
            raise DatasetError(
                f"{there} holds another dataset, root hash {standing.root_hash[:16]}..., not {manifest.root_hash[:16]}...; name another place"
            )
    elif not there.exists("plan.json"):
        refuse_others(there)
    elif listed(there) or _without_card(Plan.read(there)) != _without_card(Plan.read(here)):
        raise DatasetError(f"{there} holds a dataset that is being made, or part of another one; name another place")
    sizes: dict[str, int] = {}
    for folder in sorted({published_name(receipt.shard).rpartition("/")[0] for receipt in manifest.receipts}):
        sizes |= {f"{folder}/{name}": size for name, size in there.sizes(f"shards/{folder}").items()}
    stay = [receipt for receipt in manifest.receipts if sizes.get(published_name(receipt.shard)) == receipt.bytes]
    if stay and isinstance(there, LocalFolder):
        say(f"{there}: {len(stay):,} shards are there already; they are hashed")
        with ThreadPoolExecutor(TRANSFERS) as pool:
            stay = [one for one, whole in zip(stay, pool.map(partial(_is_whole, there), stay), strict=True) if whole]
    kept = {receipt.shard for receipt in stay}
    return Transfer(here, there, manifest, [receipt for receipt in manifest.receipts if receipt.shard not in kept])


def _without_card(plan: Plan) -> Plan:
    """A card can be written anew between two pushes of one dataset."""
    return replace(plan, environment={name: value for name, value in plan.environment.items() if name != "card"})


def _is_whole(there: Folder, receipt: Receipt) -> bool:
    digest, source = hashlib.sha256(), there.map(f"shards/{published_name(receipt.shard)}")
    while piece := source.read_buffer(PIECE):
        digest.update(piece)
    return digest.hexdigest() == receipt.sha256


def transfer(source: Where, target: Where, dry_run: bool = False, private: bool = False) -> Manifest:
    """Bring the dataset to `target`, or say what would be moved. Returns the manifest that stands there, or would."""
    work = prepare(source, target, private, dry_run)
    total, files = work.manifest.totals["bytes"], len(work.manifest.receipts)
    published = replace(work.manifest, receipts=[replace(receipt, file=published_name(receipt.shard)) for receipt in work.manifest.receipts])
    verb = "would move" if dry_run else "moves"
    say(
        f"{work.source} -> {work.target}: {verb} {len(work.missing):,} of {files:,} shards, {work.bytes:,} of {total:,} bytes; "
        f"root hash {work.manifest.root_hash}"
    )
    if not (Plan.read(work.source).environment.get("card") or {}).get("corpus_license"):
        say(f"{work.source}: its card states no licence of the text; `python -m pipeline card {work.source} --corpus_license ...` does")
    stay, beside_shards = files - len(work.missing), beside(work.source)
    small = _small_files(work.source, beside_shards)
    if stay and not isinstance(work.target, LocalFolder):
        say(f"{work.target}: {stay:,} shards that are there were compared by size alone; `python -m pipeline verify {work.target}` hashes them")
    if others := [name for name in beside_shards if name not in small]:
        say(f"{work.source}: no part of the dataset, and stays behind: {', '.join(others[:20])}{' ...' * (len(others) > 20)}")
    if dry_run:
        return published
    work.target.put("plan.json", small["plan.json"])
    progress = Progress("transfer", "shards", files, total, stay, total - work.bytes)
    with progress, ThreadPoolExecutor(TRANSFERS) as pool:
        for receipt in pool.map(lambda one: _move(work, one), work.missing):
            progress.advance(work=receipt.bytes, tokens=receipt.tokens)
    for name, content in small.items():
        work.target.put(name, content)
    published.save(work.target, about(work.source), {name: hashlib.sha256(content).hexdigest() for name, content in small.items()})
    return Manifest.read(work.target)


def _move(work: Transfer, receipt: Receipt) -> Receipt:
    """One shard, hashed on its way."""
    name, digest = f"shards/{published_name(receipt.shard)}", hashlib.sha256()
    with work.target.draft(name) as draft:
        work.source.download(f"shards/{receipt.file}", draft)
        draft.seek(0)
        while piece := draft.read(PIECE):
            digest.update(piece)
        if digest.hexdigest() != receipt.sha256:
            path = work.source.path(f"shards/{receipt.file}")
            raise DatasetError(
                f"{path} has sha256 {digest.hexdigest()[:16]}..., its receipt says {receipt.sha256[:16]}...: damaged; nothing of it was moved"
            )
        work.target.publish(draft, name)
    return receipt


def _small_files(source: Folder, there: list[str]) -> dict[str, bytes]:
    """The dataset's own files beside the shards; where it has a seal, those that the seal names, as the seal names them."""
    try:
        sealed = read_seal(source)
    except FileNotFoundError:  # a dataset of before
        sealed = None
    wanted = [name for name in SMALL_FILES if name in (there if sealed is None else sealed)]
    if absent := [name for name in ["plan.json", *wanted] if name not in there]:
        raise DatasetError(f"{source.path(absent[0])} is missing; fetch it again")
    contents = {"plan.json": source.read("plan.json")} | dict(zip(wanted, source.read_all(wanted), strict=True))
    for name, expected in (sealed or {}).items():
        if name in contents and hashlib.sha256(contents[name]).hexdigest() != expected:
            path = source.path(name)
            raise DatasetError(f"{path} is not what {SEAL} says: edited or damaged; fetch it again (README.md can be written again by `card`)")
    if "README.md" in contents:
        contents["README.md"] = card.published(contents["README.md"])
    return contents


def about(folder: Folder) -> dict[str, Any]:
    """What a manifest says beside what every manifest does."""
    made = ("identity", "identity_hash", "totals", "receipts", "root_hash", "manifest_hash")
    return {name: value for name, value in folder.json("manifest.json").items() if name not in made}


def describe(where: Where, **stated: str) -> None:
    """Say on a dataset's card what was not said when it was made; "" leaves what is there."""
    folder = Folder.of(where)
    plan, manifest = Plan.read(folder), Manifest.read(folder)
    said = dict(plan.environment.get("card") or {}) | {name: value for name, value in stated.items() if value}
    told = replace(plan, environment=plan.environment | {"card": said})
    told.rewrite(folder)
    card.write_card(folder, told, manifest)
    if manifest.receipts and "/" in manifest.receipts[0].file:
        folder.put("README.md", card.published(folder.read("README.md")))
    manifest.save(folder, about(folder))
    say(f"{folder}: the card says " + ", ".join(f"{name} {value}" for name, value in said.items() if value))
