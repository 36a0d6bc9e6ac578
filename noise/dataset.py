"""What makes a folder of shards a dataset: plan, receipts, manifest.

    DATASET/plan.json             identity, environment, input ranges -> shards; written first
            shards/00000.arrow    one shard; 00000.json is its receipt, and a shard with a receipt is committed
            manifest.json         identity, totals, every receipt, root hash; written last

`identity` is everything that decides the numbers and nothing else; `identity_hash` is sha256 of its canonical JSON.
`root_hash` is sha256 over identity_hash and every shard's sha256 in order: it names the dataset for ever.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from noise.folder import Folder, Where
from noise.identity import CODEC_FIELDS, Identity, check_identity, differences, identity_hash
from noise.lineage import Span, grows_from, origin, spans
from noise.receipt import OPTIONAL, TOTALS, Receipt, committed, read_receipt
from noise.seal import sealed, write_seal
from noise.shard import ROWS_PER_BATCH, ShardMetadata, ShardReader
from noise.sketch import Codec
from noise.storage import DatasetError, sha256_text


def root_hash(identity: Identity, receipts: Sequence[Receipt]) -> str:
    return sha256_text(identity_hash(identity) + "".join(receipt.sha256 for receipt in receipts))


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
        made_by, _ = origin(self._spans, shard)
        return ShardMetadata(**values, step=codec.step, shard=shard, identity_hash=made_by, compression=compression)

    @functools.cached_property
    def _spans(self) -> list[Span]:
        return spans(self.identity)

    def write(self, where: Where) -> None:
        """Write plan.json, also over the plan of a dataset that this one grows from.

        Raises DatasetError, by field, if the folder holds a plan of another identity.
        """
        if self.is_news(where):
            self.rewrite(where)

    def is_news(self, where: Where) -> bool:
        """Whether plan.json is not there yet as this plan has it. Raises DatasetError, by field, if the folder holds a plan of another identity."""
        folder = Folder.of(where)
        if not folder.exists("plan.json"):
            return True
        standing = Plan.read(folder).identity
        changed = differences(self.identity, standing)
        if changed and not grows_from(self.identity, standing):
            lines = "\n  ".join(changed[:20] + [f"and {len(changed) - 20} more"] * (len(changed) > 20))
            raise DatasetError(
                f"{folder} already holds a dataset of another identity:\n  {lines}\nchoose another output folder, or restore what changed"
            )
        return bool(changed)

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


@dataclass(frozen=True)
class Manifest:
    """A finished dataset: its identity, receipts in shard order, totals and root hash."""

    identity: Identity
    receipts: list[Receipt]
    root_hash: str

    @functools.cached_property
    def totals(self) -> dict[str, Any]:
        totals = {name: sum(getattr(receipt, name) for receipt in self.receipts) for name in TOTALS + OPTIONAL}
        return {name: total for name, total in totals.items() if total or name not in OPTIONAL}

    @functools.cached_property
    def _spans(self) -> list[Span]:
        return spans(self.identity)

    def open(self, folder: Where, receipt: Receipt, check_hash: bool = True) -> ShardReader:
        """As `open_shard`; the identity, which can name 100,000 files, is hashed once."""
        return _open_shard(Folder.of(folder), receipt, origin(self._spans, receipt.shard), check_hash)

    @classmethod
    def write(
        cls,
        where: Where,
        plan: Plan,
        extra: Callable[[list[Receipt]], dict[str, Any]] | None = None,
        before: Callable[[Manifest], None] | None = None,
    ) -> Manifest:
        """Write manifest.json from the receipts. Raises DatasetError naming the shards that are not committed, or not as their receipts say.

        `extra` makes more fields of the receipts, for people; `before` puts what else belongs to the dataset (its card) before it is sealed.
        """
        folder = Folder.of(where)
        receipts = committed(folder)
        absent = [shard for shard in range(len(plan.shards)) if shard not in receipts]
        if absent:
            raise DatasetError(f"{folder} is unfinished: {len(absent)} of {len(plan.shards)} shards are not committed, first {absent[0]}")
        ordered = [receipts[shard] for shard in range(len(plan.shards))]
        _check_sizes(folder, ordered)
        manifest = cls(plan.identity, ordered, root_hash(plan.identity, ordered))
        if before is not None:
            before(manifest)
        manifest.save(folder, extra(ordered) if extra else {})
        return manifest

    def save(self, where: Where, about: dict[str, Any], files: dict[str, str] | None = None) -> None:
        """Write seal.json, of the small files that are there, and manifest.json, the last file of a dataset; `about` holds more fields.

        `files`: their hashes, where they are on their way.
        """
        folder = Folder.of(where)
        value = {
            "identity": self.identity,
            "identity_hash": identity_hash(self.identity),
            "totals": self.totals,
            "receipts": [receipt.to_json() for receipt in self.receipts],
            "root_hash": self.root_hash,
        }
        write_seal(folder, files)
        folder.put_json("manifest.json", sealed({**about, **value}))

    @classmethod
    def read(cls, where: Where) -> Manifest:
        """Raises DatasetError when the dataset is unfinished, of another format version, or its manifest was edited."""
        folder = Folder.of(where)
        path = folder.path("manifest.json")
        if not folder.exists("manifest.json"):
            if folder.exists("plan.json"):
                command = "generate" if Plan.read(folder).identity["extraction"] == "sequential" else "extract"
                raise DatasetError(
                    f"{folder} is unfinished (a plan, no manifest); run `python -m pipeline {command}` again, "
                    "or the push, pull or other command that was writing it: it continues where it stopped"
                )
            raise DatasetError(f"{folder} is not a noise dataset: it has no manifest.json")
        value = folder.json("manifest.json")
        identity = check_identity(value, path)
        if not isinstance(value.get("receipts"), list):
            raise DatasetError(f"{path} has no list of receipts")
        receipts = [read_receipt(item, path) for item in value["receipts"]]
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
    return _open_shard(Folder.of(folder), receipt, origin(spans(identity), receipt.shard), check_hash)


def _open_shard(folder: Folder, receipt: Receipt, expected: tuple[str, int], check_hash: bool) -> ShardReader:
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
    if (ours.identity_hash, ours.shard) != expected:
        raise DatasetError(f"{path} belongs to another dataset: its identity_hash is {ours.identity_hash[:16]}..., its shard {ours.shard}")
    if reader.batches != -(-receipt.rows // ROWS_PER_BATCH):
        raise DatasetError(f"{path} has {reader.batches} record batches, too few or too many for the {receipt.rows:,} rows of its receipt; {WAY_OUT}")
    return reader
