"""What no shard's hash covers: the manifest has a hash of itself, and seal.json those of the small files beside the shards.

    manifest.json    ... manifest_hash           a function of identity and shards, as all of the manifest is
    seal.json        files {name: sha256}, seal_hash      the card, the plan, the recipe and the tokenizer's files, as they were at the end

Each hash is sha256 of the canonical JSON of its file without that field, and the file is that JSON in one form (sorted keys,
indented by one space, ASCII, a last newline), so that no byte of it can change unseen.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

from noise.folder import Folder
from noise.storage import DatasetError, canonical_json, parse_json, readable_json, sha256_text

SEAL = "seal.json"
UNSEALED = ("manifest.json", SEAL, "run.jsonl", "driver.json")
"""What has hashes of its own."""
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt",
    "tokenizer.model", "sentencepiece.bpe.model", "spiece.model", "chat_template.jinja",
)  # fmt: skip
"""What a tokenizer is made of; nothing else of tokenizer/ is ever copied elsewhere."""
SMALL_FILES = ("plan.json", "README.md", "recipe.yaml", *(f"tokenizer/{name}" for name in TOKENIZER_FILES))
"""What a dataset has beside shards and hashes; whatever else lies there is somebody's own, and neither sealed nor moved."""


def copy_tokenizer(source: Path, target: Path) -> None:
    """A tokenizer's files, from a dataset's folder that was `fetched`."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)


def hash_of(folder: Folder, name: str) -> str:
    """Raises FileNotFoundError."""
    return hashlib.sha256(folder.read(name)).hexdigest()


def beside(folder: Folder) -> list[str]:
    """The files beside the shards, a dataset's own and others."""
    names = [*folder.sizes(""), *(f"tokenizer/{name}" for name in folder.sizes("tokenizer"))]
    return sorted(name for name in names if name not in UNSEALED and not name.endswith(".tmp"))


def small_files(folder: Folder) -> dict[str, str]:
    """sha256 of the dataset's own files beside the shards, by name."""
    return {name: hash_of(folder, name) for name in beside(folder) if name in SMALL_FILES}


def write_seal(folder: Folder, files: dict[str, str] | None = None) -> None:
    """Of the small files as they are now, or as they are about to be."""
    folder.put_json(SEAL, sealed({"files": small_files(folder) if files is None else files}, "seal_hash"))


def sealed(value: dict[str, Any], own: str = "manifest_hash") -> dict[str, Any]:
    """A manifest, or seal, with its own hash in the field `own`."""
    return value | {own: _hash_of_rest(value, own)}


def _hash_of_rest(value: dict[str, Any], own: str) -> str:
    return sha256_text(canonical_json({name: field for name, field in value.items() if name != own}))


def broken(value: dict[str, Any], content: bytes, path: str, own: str = "manifest_hash") -> str:
    """What is wrong with the bytes of a file that seals itself; "" where nothing is."""
    if value.get(own) != _hash_of_rest(value, own):
        return f"{path}: {own} does not belong to the rest of it: edited or damaged; fetch it again"
    if content != readable_json(value).encode():
        return f"{path} is not in the form that it is written in (sorted keys, one space, a last newline): edited or damaged; fetch it again"
    return ""


def read_seal(folder: Folder) -> dict[str, str]:
    """{name: sha256} of the small files. Raises FileNotFoundError where there is no seal, DatasetError where it is damaged."""
    path, content = folder.path(SEAL), folder.read(SEAL)
    value = parse_json(content, path)
    if wrong := broken(value, content, path, "seal_hash"):
        raise DatasetError(wrong)
    files = value.get("files")
    if not isinstance(files, dict) or not all(_is_plain(name) and isinstance(digest, str) for name, digest in files.items()):
        raise DatasetError(f"{path}: files is not a list of the dataset's own files and their hashes")
    return files


def _is_plain(name: str) -> bool:
    """Whether it is a file directly in the dataset's folder or in its tokenizer/."""
    base = name.removeprefix("tokenizer/")
    return bool(base) and not {"/", "\\", "\0"} & set(base) and base not in (".", "..")
