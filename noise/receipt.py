"""What a shard's receipt says: shards/00000.json beside shards/00000.arrow. A shard with a receipt is committed."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from typing import Any

from noise.folder import Folder, Where
from noise.shard import Rows, ShardMetadata
from noise.storage import DatasetError, brief, checked_fields, parse_json


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


MOST_ROWS = 2**32
"""Of a shard: sequence ids are shard * 2^32 + row."""
OPTIONAL = ("tokens_dropped", "rows_quarantined", "tokens_quarantined")
"""Totals that are left out where they are 0."""
TOTALS = tuple(field.name for field in fields(Receipt) if field.type in ("int", "float") and field.name not in ("shard", "tokens_dropped"))


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


def shard_name(shard: int) -> str:
    return f"{shard:05d}.arrow"


def published_name(shard: int) -> str:
    """Where a published dataset has it: 00012/12345.arrow, at most 1,000 shards in a folder."""
    return f"{shard // 1000:05d}/{shard_name(shard)}"


def receipt_name(shard: int) -> str:
    return f"{shard:05d}.json"


def read_receipt(value: Any, name: str) -> Receipt:
    """The receipt that a parsed JSON value holds; DatasetError, with the name of the file, where it holds none."""
    if not isinstance(value, dict):
        raise DatasetError(f"{name}: a receipt is not a JSON object")
    receipt = Receipt(**checked_fields(Receipt, {"tokens_dropped": 0} | value, name, beside=("quarantined",)), quarantined=_quarantined(value, name))
    if receipt.file not in (shard_name(receipt.shard), published_name(receipt.shard)):
        raise DatasetError(f"{name}: receipt of shard {receipt.shard} names the file {receipt.file!r}")
    if receipt.rows > MOST_ROWS:
        raise DatasetError(f"{name}: shard {receipt.shard} has {receipt.rows:,} rows, a shard has at most {MOST_ROWS:,}")
    if not re.fullmatch("[0-9a-f]{64}", receipt.sha256):
        raise DatasetError(f"{name}: sha256 is {brief(receipt.sha256)}, expected 64 hexadecimal digits")
    return receipt


def _quarantined(value: dict[str, Any], name: str) -> tuple[Quarantined, ...]:
    found = value.get("quarantined", [])
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise DatasetError(f"{name}: quarantined is {brief(found)}, expected a list of rows")
    return tuple(Quarantined(**checked_fields(Quarantined, row, f"{name}: a quarantined row")) for row in found)


def committed(where: Where) -> dict[int, Receipt]:
    """Receipts by shard number, all of them read."""
    folder = Folder.of(where)
    names = [receipt_name(shard) for shard in sorted(listed(folder))]
    found: dict[int, Receipt] = {}
    for name, content in zip(names, folder.read_all(f"shards/{name}" for name in names), strict=True):
        path = folder.path(f"shards/{name}")
        receipt = read_receipt(parse_json(content, path), path)
        if name != receipt_name(receipt.shard):
            raise DatasetError(f"{path} is the receipt of shard {receipt.shard}, which belongs in {receipt_name(receipt.shard)}")
        found[receipt.shard] = receipt
    return found


def listed(where: Where) -> set[int]:
    """Numbers of the shards that are committed, from one listing: no receipt is opened."""
    return {int(name[:-5]) for name in Folder.of(where).sizes("shards") if re.fullmatch(r"\d{5,}\.json", name)}
