"""A dataset's identity: everything that decides its numbers, and nothing else.

`identity_hash` is sha256 of its canonical JSON. A grown dataset's identity lists those of its parts, and each shard carries its part's hash.
"""

from __future__ import annotations

from typing import Any

from noise.shard import EXTRACTIONS, check_version
from noise.storage import DatasetError, canonical_json, sha256_text

Identity = dict[str, Any]
CODEC_FIELDS = ("format_version", "vocab_size", "block_length", "extraction", "seed", "epsilon", "draws")
"""Identity fields that every reader needs; the others describe where the numbers came from."""


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


def owner(of: Owners, shard: int) -> str:
    """The identity hash that this shard carries."""
    return next(name for stop, name in of if shard < stop)


def default_seed(identity: Identity) -> int:
    """A seed from the identity without its seed: 64 bits, never 0."""
    digest = identity_hash({name: value for name, value in identity.items() if name != "seed"})
    return int(digest[:16], 16) or 1


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
    return [f"{path}: {brief(ours)} here, {brief(theirs)} there"]


def _name(at: int, ours: Any, theirs: Any) -> Any:
    """What people know an item of two lists by: a file's path, else its place."""
    paths = {item.get("path") if isinstance(item, dict) else None for item in (ours, theirs)}
    return (paths.pop() or at) if len(paths) == 1 else at


def brief(value: Any) -> str:
    """A value as a message shows it, at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
