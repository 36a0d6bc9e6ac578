"""What makes a folder of shards a dataset: identity, plan, receipts, manifest.

    DATASET/plan.json             identity, environment, input ranges -> shards; written first
            shards/00000.arrow    one shard; 00000.json is its receipt, and a shard with a receipt is committed
            manifest.json         identity, totals, every receipt, root hash; written last

`identity` is everything that decides the numbers and nothing else; `identity_hash` is sha256 of its canonical JSON.
`root_hash` is sha256 over identity_hash and every shard's sha256 in order: it names the dataset for ever.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, BinaryIO

from noise import stores
from noise.folder import Folder, Where
from noise.shard import EXTRACTIONS, Rows, ShardMetadata, ShardReader, ShardWriter, check_version
from noise.sketch import Codec
from noise.storage import DatasetError, canonical_json, checked_fields, parse_json, readable_json, sha256_file, sha256_text

Identity = dict[str, Any]
CODEC_FIELDS = ("format_version", "vocab_size", "block_length", "extraction", "seed", "epsilon", "draws")
"""Identity fields that every reader needs; the others describe where the numbers came from."""


@dataclass(frozen=True)
class Quarantined:
    """A planned row that is not in its shard, since it could not be encoded."""

    row: int
    """Its number in the shard; the others keep theirs, so nothing else changes."""
    tokens: int
    """Tokens in it, BOS and padding not counted."""
    reason: str


@dataclass(frozen=True)
class Receipt:
    """What was committed as one shard."""

    shard: int
    file: str
    """Name within shards/."""
    sha256: str
    bytes: int
    rows: int
    tokens: int
    """Positions with noise."""
    kept: int
    """Sketch entries."""
    saturated: int
    nll_sum: float
    """-sum of log_prob, nats."""
    characters_in: int
    """Characters of corpus read for this shard; 0 when sequential."""
    tokens_dropped: int = 0
    """Tokens of the corpus that packing left out, as the identity says it may; absent from the file where it is 0."""
    quarantined: tuple[Quarantined, ...] = ()
    """Rows that are not in the shard though the plan has them; absent from the file where there are none."""

    @property
    def rows_quarantined(self) -> int:
        return len(self.quarantined)

    @property
    def tokens_quarantined(self) -> int:
        return sum(row.tokens for row in self.quarantined)

    def to_json(self) -> dict[str, Any]:
        value = asdict(self)
        return {name: value[name] for name in value if value[name] or name not in ("tokens_dropped", "quarantined")}


OPTIONAL = ("tokens_dropped", "rows_quarantined", "tokens_quarantined")
"""Totals that are left out where they are 0."""
TOTALS = tuple(field.name for field in fields(Receipt) if field.type in ("int", "float") and field.name not in ("shard", "tokens_dropped"))


def identity_hash(identity: Identity) -> str:
    return sha256_text(canonical_json(identity))


def parts(identity: Identity) -> list[Identity]:
    """The identities that a dataset's shards carry, in shard order: a grown dataset's parents, or its own."""
    return identity.get("parents") or [identity]


def grows_from(identity: Identity, older: Identity) -> bool:
    """Whether the shards of an older state of the dataset are the first of this one's."""
    ours, theirs = parts(identity), parts(older)
    return len(ours) > len(theirs) and ours[: len(theirs)] == theirs


Owners = list[tuple[int, str]]
"""(first shard that is not its own any more, identity hash) of each part of a dataset."""


def owners(identity: Identity) -> Owners:
    """Whose shard is whose. The last part reaches to the end; of a grown dataset each says how many shards it has."""
    found, stop = [], 0
    for part in parts(identity)[:-1]:
        stop += part["shards"]["count"]
        found.append((stop, identity_hash(part)))
    return [*found, (2**62, identity_hash(parts(identity)[-1]))]


def _owner(of: Owners, shard: int) -> str:
    return next(name for stop, name in of if shard < stop)


def default_seed(identity: Identity) -> int:
    """A seed from the identity without its seed: 64 bits, never 0."""
    digest = identity_hash({name: value for name, value in identity.items() if name != "seed"})
    return int(digest[:16], 16) or 1


def root_hash(identity: Identity, receipts: Sequence[Receipt]) -> str:
    return sha256_text(identity_hash(identity) + "".join(receipt.sha256 for receipt in receipts))


def differences(ours: Any, theirs: Any, path: str = "") -> list[str]:
    """Where two identities differ, one line a field: `teacher.weights_hash: 'ab' here, 'cd' there`."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        names = sorted(set(ours) | set(theirs))
        prefix = f"{path}." if path else ""
        return [line for name in names for line in differences(ours.get(name), theirs.get(name), prefix + name)]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return [line for at, pair in enumerate(zip(ours, theirs, strict=True)) for line in differences(*pair, f"{path}[{_name(at, *pair)}]")]
    if ours == theirs:
        return []
    return [f"{path}: {_brief(ours)} here, {_brief(theirs)} there"]


def _name(at: int, ours: Any, theirs: Any) -> Any:
    """What people know an item of two lists by: a file's path, else its place."""
    paths = {item.get("path") if isinstance(item, dict) else None for item in (ours, theirs)}
    return (paths.pop() or at) if len(paths) == 1 else at


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


@dataclass(frozen=True)
class Plan:
    """Which input makes which shard; everything a worker needs besides the corpus and the teacher."""

    identity: Identity
    environment: dict[str, Any]
    """Hardware and library versions; outside the identity."""
    shards: list[Any]
    """One entry a shard: the pipeline's description of its input range."""

    def metadata(self, shard: int) -> ShardMetadata:
        codec = Codec(self.identity["vocab_size"], self.identity["epsilon"], self.identity["draws"])
        values = {name: self.identity[name] for name in CODEC_FIELDS}
        compression = self.identity.get("compression", "none")
        return ShardMetadata(**values, step=codec.step, shard=shard, identity_hash=_owner(self._owners, shard), compression=compression)

    @functools.cached_property
    def _owners(self) -> Owners:
        return owners(self.identity)

    def write(self, where: Where) -> None:
        """Write plan.json, also over the plan of a dataset that this one grows from.

        Raises DatasetError, by field, if the folder holds a plan of another identity.
        """
        folder = Folder.of(where)
        if folder.exists("plan.json"):
            standing = Plan.read(folder).identity
            changed = differences(self.identity, standing)
            if not changed:
                return
            if not grows_from(self.identity, standing):
                lines = "\n  ".join(changed[:20] + [f"and {len(changed) - 20} more"] * (len(changed) > 20))
                raise DatasetError(
                    f"{folder} already holds a dataset of another identity:\n  {lines}\nchoose another output folder, or restore what changed"
                )
        self.rewrite(folder)

    def rewrite(self, where: Where) -> None:
        """Write plan.json whatever is there: for what is outside the identity."""
        Folder.of(where).put_json("plan.json", {"identity_hash": identity_hash(self.identity), **asdict(self)})

    @classmethod
    def read(cls, where: Where) -> Plan:
        folder = Folder.of(where)
        value, path = folder.json("plan.json"), folder.path("plan.json")
        identity = check_identity(value, path)
        if not isinstance(value.get("shards"), list) or not isinstance(value.get("environment"), dict):
            raise DatasetError(f"{path} lacks its list of shards or its environment")
        return cls(identity, value["environment"], value["shards"])


def check_identity(value: dict[str, Any], path: str) -> Identity:
    """The identity of a plan or manifest, after its hash, version and codec fields were checked."""
    identity = value.get("identity")
    if not isinstance(identity, dict):
        raise DatasetError(f"{path} has no identity")
    check_version(identity.get("format_version"), str(path))
    missing = [name for name in CODEC_FIELDS if name not in identity]
    if missing:
        raise DatasetError(f"{path}: the identity lacks {', '.join(missing)}")
    if identity["extraction"] not in EXTRACTIONS:
        raise DatasetError(f"{path}: extraction is {identity['extraction']!r}, expected one of {EXTRACTIONS}")
    if value.get("identity_hash") != identity_hash(identity):
        raise DatasetError(f"{path}: identity_hash does not belong to the identity beside it; the file was edited")
    return identity


def shard_name(shard: int) -> str:
    return f"{shard:05d}.arrow"


def receipt_name(shard: int) -> str:
    return f"{shard:05d}.json"


def _receipt(value: Any, name: str) -> Receipt:
    if not isinstance(value, dict):
        raise DatasetError(f"{name}: a receipt is not a JSON object")
    receipt = Receipt(**checked_fields(Receipt, {"tokens_dropped": 0} | value, name, beside=("quarantined",)), quarantined=_quarantined(value, name))
    if receipt.file != shard_name(receipt.shard):
        raise DatasetError(f"{name}: receipt of shard {receipt.shard} names the file {receipt.file!r}")
    if not re.fullmatch("[0-9a-f]{64}", receipt.sha256):
        raise DatasetError(f"{name}: sha256 is {_brief(receipt.sha256)}, expected 64 hexadecimal digits")
    return receipt


def _quarantined(value: dict[str, Any], name: str) -> tuple[Quarantined, ...]:
    found = value.get("quarantined", [])
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise DatasetError(f"{name}: quarantined is {_brief(found)}, expected a list of rows")
    return tuple(Quarantined(**checked_fields(Quarantined, row, f"{name}: a quarantined row")) for row in found)


def committed(where: Where) -> dict[int, Receipt]:
    """Receipts by shard number, all of them read."""
    folder = Folder.of(where)
    names = [receipt_name(shard) for shard in sorted(listed(folder))]
    found: dict[int, Receipt] = {}
    for name, content in zip(names, folder.read_all(f"shards/{name}" for name in names), strict=True):
        path = folder.path(f"shards/{name}")
        receipt = _receipt(parse_json(content, path), path)
        if name != receipt_name(receipt.shard):
            raise DatasetError(f"{path} is the receipt of shard {receipt.shard}, which belongs in {receipt_name(receipt.shard)}")
        found[receipt.shard] = receipt
    return found


def listed(where: Where) -> set[int]:
    """Numbers of the shards that are committed, from one listing: no receipt is opened."""
    return {int(name[:-5]) for name in Folder.of(where).sizes("shards") if re.fullmatch(r"\d{5,}\.json", name)}


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
            return _read_receipt(folder, done)
        folder.publish(draft, shard)
        folder.put_new(done, ours)
        for attempt in range(COMMITS):
            standing = _read_receipt(folder, done)
            if folder.holds(draft, shard, standing.sha256):
                return standing
            if not folder.publishes_again:
                break
            stores.pause(attempt)
            if standing.sha256 >= receipt.sha256 or attempt >= COMMITS // 2:
                folder.publish(draft, shard)
                folder.put(done, ours)
        folder.remove(done)
    raise DatasetError(f"{folder.path(shard)}: another writer makes other bytes of this shard at the same time; stop one of the two and run again")


def _read_receipt(folder: Folder, name: str) -> Receipt:
    """A store's client asks for a file's length and then for its bytes: one that is replaced in between is read torn, and read again."""
    for attempt in range(COMMITS if folder.publishes_again else 1):
        if attempt:
            stores.pause(attempt - 1)
        with contextlib.suppress(DatasetError):
            return _receipt(folder.json(name), folder.path(name))
    return _receipt(folder.json(name), folder.path(name))


class Totals:
    """What a receipt says of a shard's rows, counted as they pass. A reader recounts it with the same code."""

    def __init__(self, metadata: ShardMetadata):
        self._metadata, self._largest_code = metadata, 256**metadata.codec.code_bytes - 1
        self.rows = self.tokens = self.kept = self.saturated = 0
        self.nll_sum = 0.0

    def add(self, rows: Rows) -> None:
        self.rows += len(rows)
        self.tokens += int(rows.has_noise(self._metadata.extraction).sum())
        self.kept += len(rows.entries[0])
        self.saturated += int((rows.code == self._largest_code).sum())
        for row in rows.log_prob:  # row by row, so that the sum does not depend on how rows were grouped
            self.nll_sum -= float(row.sum(dtype="float64"))

    def receipt(self, file: str, sha256: str, size: int, characters_in: int) -> Receipt:
        return Receipt(self._metadata.shard, file, sha256, size, self.rows, self.tokens, self.kept, self.saturated, self.nll_sum, characters_in)


@dataclass(frozen=True)
class Manifest:
    """A finished dataset: its identity, receipts in shard order, totals and root hash."""

    identity: Identity
    receipts: list[Receipt]
    root_hash: str

    @property
    def totals(self) -> dict[str, Any]:
        totals = {name: sum(getattr(receipt, name) for receipt in self.receipts) for name in TOTALS + OPTIONAL}
        return {name: total for name, total in totals.items() if total or name not in OPTIONAL}

    @functools.cached_property
    def _owners(self) -> Owners:
        return owners(self.identity)

    def open(self, folder: Where, receipt: Receipt, check_hash: bool = True) -> ShardReader:
        """As `open_shard`; the identity, which can name 100,000 files, is hashed once."""
        return _open_shard(Folder.of(folder), receipt, _owner(self._owners, receipt.shard), check_hash)

    @classmethod
    def write(cls, where: Where, plan: Plan, extra: Callable[[list[Receipt]], dict[str, Any]] | None = None) -> Manifest:
        """Write manifest.json from the receipts. Raises DatasetError naming the shards that are not committed, or not as their receipts say.

        `extra` makes more fields of the receipts; they are for people, and no hash depends on them.
        """
        folder = Folder.of(where)
        receipts = committed(folder)
        absent = [shard for shard in range(len(plan.shards)) if shard not in receipts]
        if absent:
            raise DatasetError(f"{folder} is unfinished: {len(absent)} of {len(plan.shards)} shards are not committed, first {absent[0]}")
        ordered = [receipts[shard] for shard in range(len(plan.shards))]
        _check_sizes(folder, ordered)
        manifest = cls(plan.identity, ordered, root_hash(plan.identity, ordered))
        value = {
            "identity": plan.identity,
            "identity_hash": identity_hash(plan.identity),
            "totals": manifest.totals,
            "receipts": [receipt.to_json() for receipt in ordered],
            "root_hash": manifest.root_hash,
        }
        folder.put_json("manifest.json", {**(extra(ordered) if extra else {}), **value})
        return manifest

    @classmethod
    def read(cls, where: Where) -> Manifest:
        """Raises DatasetError when the dataset is unfinished, of another format version, or its manifest was edited."""
        folder = Folder.of(where)
        path = folder.path("manifest.json")
        if not folder.exists("manifest.json"):
            if folder.exists("plan.json"):
                command = "generate" if Plan.read(folder).identity["extraction"] == "sequential" else "extract"
                raise DatasetError(
                    f"{folder} is unfinished (a plan, no manifest); run `python -m pipeline {command}` again, it continues where it stopped"
                )
            raise DatasetError(f"{folder} is not a noise dataset: it has no manifest.json")
        value = folder.json("manifest.json")
        identity = check_identity(value, path)
        if not isinstance(value.get("receipts"), list):
            raise DatasetError(f"{path} has no list of receipts")
        receipts = [_receipt(item, path) for item in value["receipts"]]
        if [receipt.shard for receipt in receipts] != list(range(len(receipts))):
            raise DatasetError(f"{path}: receipts are not in shard order")
        manifest = cls(identity, receipts, root_hash(identity, receipts))
        if value.get("root_hash") != manifest.root_hash or value.get("totals") != manifest.totals:
            raise DatasetError(f"{path}: root_hash or totals do not belong to the receipts beside them; the file was edited")
        return manifest


WAY_OUT = "fetch it again, or delete its receipt and run extract again"


def _check_sizes(folder: Folder, receipts: list[Receipt]) -> None:
    """Raises DatasetError naming the first shard whose file is not there or has another size than its receipt says; from listing alone."""
    found = folder.sizes("shards")
    for receipt in receipts:
        _check_size(folder.path(f"shards/{receipt.file}"), found.get(receipt.file), receipt)


def _check_size(path: str, size: int | None, receipt: Receipt) -> None:
    if size is None:
        raise DatasetError(f"{path} is missing; {WAY_OUT}")
    if size != receipt.bytes:
        raise DatasetError(f"{path} has {size} bytes, its receipt says {receipt.bytes}: truncated or edited; {WAY_OUT}")


def open_shard(folder: Where, receipt: Receipt, identity: Identity, check_hash: bool = True) -> ShardReader:
    """A committed shard, checked against its receipt (size, hash) and the dataset's identity. Of a store, a copy that goes with the reader."""
    return _open_shard(Folder.of(folder), receipt, _owner(owners(identity), receipt.shard), check_hash)


def _open_shard(folder: Folder, receipt: Receipt, expected: str, check_hash: bool) -> ShardReader:
    name = f"shards/{receipt.file}"
    path = folder.path(name)
    try:
        source = folder.map(name)
    except FileNotFoundError:
        source = None
    _check_size(path, None if source is None else source.size(), receipt)
    if check_hash and (found := hashlib.sha256(source.read_buffer()).hexdigest()) != receipt.sha256:
        raise DatasetError(f"{path} has sha256 {found[:16]}..., its receipt says {receipt.sha256[:16]}...: edited or damaged; {WAY_OUT}")
    reader = ShardReader(path, source)
    ours = reader.metadata
    if ours.identity_hash != expected or ours.shard != receipt.shard:
        raise DatasetError(f"{path} belongs to another dataset: its identity_hash is {ours.identity_hash[:16]}..., its shard {ours.shard}")
    return reader
