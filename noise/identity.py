"""A dataset's identity: everything that decides its numbers, and nothing else.

`identity_hash` is sha256 of its canonical JSON. What a dataset was made from others by, `lineage` reads.
"""

from __future__ import annotations

from typing import Any

from noise.shard import EXTRACTIONS, check_version
from noise.sketch import Codec
from noise.storage import DatasetError, brief, canonical_json, sha256_text

Identity = dict[str, Any]
CODEC_FIELDS = ("format_version", "vocab_size", "block_length", "extraction", "seed", "epsilon", "draws")
"""Identity fields that every reader needs; the others describe where the numbers came from."""


def identity_hash(identity: Identity) -> str:
    return sha256_text(canonical_json(identity))


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
        raise DatasetError(f"{path}: extraction is {brief(identity['extraction'])}, expected one of {EXTRACTIONS}")
    if wrong := _wrong(identity):
        raise DatasetError(f"{path}: the identity's {wrong}")
    if value.get("identity_hash") != identity_hash(identity):
        raise DatasetError(f"{path}: identity_hash does not belong to the identity beside it; the file was edited")
    return identity


def _wrong(identity: Identity) -> str:
    """The first field that readers index with and that is of another kind; "" where there is none. Its numbers are checked by the codec."""
    numbers = {"vocab_size": int, "block_length": int, "draws": int, "epsilon": int | float, "seed": str}
    for name, kind in numbers.items():
        if not isinstance(identity[name], kind) or isinstance(identity[name], bool):
            return f"{name} is {brief(identity[name])}"
    try:
        Codec(identity["vocab_size"], identity["epsilon"], identity["draws"])
    except ValueError as error:
        return str(error)
    if not 2 <= identity["block_length"] <= 2**24:
        return f"block_length is {brief(identity['block_length'])}; it must be in [2, 2^24]"
    if not _are_identities(identity.get("parents", [])):
        return "parents are no list of identities"
    tokenizer = identity.get("tokenizer", {"bos": 0, "eos": 0, "sha256": ""})
    if not isinstance(tokenizer, dict) or [type(tokenizer.get(name)) for name in ("bos", "eos", "sha256")] != [int, int, str]:
        return f"tokenizer is {brief(tokenizer)}, expected its bos, eos and sha256"
    generation = identity.get("generation", {"stop": "eos"})
    return "" if isinstance(generation, dict) and generation.get("stop") in ("eos", "never") else f"generation is {brief(generation)}"


def _are_identities(parents: Any) -> bool:
    return isinstance(parents, list) and all(isinstance(parent, dict) and _are_identities(parent.get("parents", [])) for parent in parents)


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
