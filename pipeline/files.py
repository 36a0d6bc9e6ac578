"""Patterns, URIs and datasets -> files, each with its size, and how to open them.

    path or glob                         on this machine; ** crosses folders
    s3://  gs://                         pyarrow's clients; credentials from the environment; options as in s3://bucket/x?endpoint_override=host
    hf://datasets/OWNER/NAME[@REV]/...   the hub's client
    any other scheme://                  the fsspec client of that scheme, where it is installed
    a folder of datasets.save_to_disk    its Arrow files; of several splits, the one that is asked for
    a dataset of the hub by name         its own files, at a commit, as `datasets` resolves them

A location is an absolute path or a URI. Globs mean the same everywhere.
"""

from __future__ import annotations

import functools
import glob
import io
import json
import os
import posixpath
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from noise import stores
from noise.storage import DatasetError
from noise.stores import URI
from pipeline import config

READ_AHEAD = 4 * 2**20  # of a file elsewhere: one request brings so much


@dataclass(frozen=True)
class Found:
    """A file that was listed."""

    location: str
    bytes: int


def find(corpus: config.Corpus) -> list[Found]:
    """All files of a corpus, sorted, each once. Raises DatasetError naming what matches no file or does not answer."""
    if corpus.dataset is not None:
        patterns, name = _files_of_dataset(corpus), "corpus.dataset"
    else:
        patterns, name = [corpus.files] if isinstance(corpus.files, str) else list(corpus.files or ()), "corpus.files"
    found: dict[str, Found] = {}
    for pattern in patterns:
        try:
            matches = _matches(pattern, corpus.dataset_split)
        except DatasetError:
            raise
        except Exception as error:  # clients raise errors of their HTTP libraries
            if not (isinstance(error, OSError) or URI.fullmatch(pattern)):
                raise
            raise DatasetError(f"{name}: {pattern!r} cannot be listed: {getattr(error, 'strerror', None) or error}") from None
        if not matches:
            where = "" if URI.fullmatch(pattern) else f" (working folder {Path.cwd()})"
            raise DatasetError(f"{name}: {pattern!r} matches no file{where}")
        found.update((match.location, match) for match in matches)
    if not found:
        raise DatasetError("corpus.files is an empty list; name files, or take null for the embedded corpus")
    return [found[location] for location in sorted(found)]


def common_root(locations: Sequence[str]) -> str:
    """The deepest folder that holds them all, to which paths in an identity are relative; "" when they are on several stores."""
    stores = {_split(location)[::2] for location in locations}
    if len(stores) > 1:
        return ""
    ((before, after),) = stores
    return before + posixpath.commonpath([posixpath.dirname(_split(location)[1]) for location in locations]) + after


def relative(location: str, root: str) -> str:
    """The path of a location under a root: `join(root, relative(location, root)) == location`."""
    return _split(location)[1].removeprefix(_split(root)[1]).lstrip("/") if root else location


def join(root: str, path: str) -> str:
    if not root:
        return path
    before, middle, after = _split(root)
    return before + posixpath.join(middle, path) + after


def root_of(location: str, path: str) -> str | None:
    """The root under which a path is this location: `join(root, path) == location`; None where there is none."""
    before, middle, after = _split(location)
    if location == path or (middle == path and before):
        return "" if location == path else before + after
    root = middle.removesuffix("/" + path) or ("" if before else "/")
    return before + root + after if middle.endswith("/" + path) else None


def _split(location: str) -> tuple[str, str, str]:
    """(what comes before the path, the path, the options after it): s3://bucket/ + folder/name + ?region=x, or an absolute path alone."""
    return stores.split(location)


def open_file(location: str) -> BinaryIO:
    """The bytes of a file, seekable. Raises OSError."""
    before, path, after = _split(location)
    if not before:
        return Path(location).open("rb")
    store, prefix = _store(before + after)
    return io.BufferedReader(store.open_input_file(prefix + path), READ_AHEAD)


def size(location: str) -> int:
    before, path, after = _split(location)
    if not before:
        return Path(location).stat().st_size
    store, prefix = _store(before + after)
    info = store.get_file_info(prefix + path)
    if not info.is_file:
        raise FileNotFoundError(2, "No such file", location)
    return int(info.size)


def local_copy(location: str) -> BinaryIO:
    """A file on this machine, seekable: itself, or a copy that is gone when it is closed."""
    if not _split(location)[0]:
        return Path(location).open("rb")
    copy = tempfile.TemporaryFile()  # noqa: SIM115
    with open_file(location) as file:
        while part := file.read(READ_AHEAD):
            copy.write(part)
    copy.seek(0)
    return copy  # type: ignore[return-value]


@functools.cache
def _store(address: str) -> tuple[Any, str]:
    """(pyarrow filesystem, what its paths begin with) of `scheme://authority/?options`. Raises DatasetError where there is no client for it."""
    from pyarrow import fs

    scheme, authority, _ = URI.fullmatch(address).groups()  # type: ignore[union-attr]
    if scheme in stores.OPTIONS:
        try:
            return stores.client(address)
        except DatasetError as error:
            raise DatasetError(f"corpus: {error}") from None
    try:
        if scheme == "hf":
            from huggingface_hub import HfFileSystem

            client: Any = HfFileSystem()
        else:
            import fsspec

            client = fsspec.filesystem(scheme)
    except (ImportError, ValueError) as error:
        raise DatasetError(f"corpus: nothing here reads {scheme}:// ({error}); install its fsspec client, or copy the files") from None
    return fs.PyFileSystem(fs.FSSpecHandler(client)), f"{authority}/" if authority else ""


def _matches(pattern: str, split: str) -> list[Found]:
    """Files of one pattern; a folder is one that datasets.save_to_disk wrote."""
    before, path, after = _split(pattern)
    if not before:
        here = str(Path(pattern).expanduser().absolute())
        if Path(here).is_dir():
            return _saved(here, split)
        return [Found(name, status.st_size) for name in glob.iglob(here, recursive=True) if _is_file(status := os.stat(name))]  # noqa: PTH116, PTH207
    store, prefix = _store(before + after)
    fixed = re.split(r"(?=[^/]*[*?\[])", path, maxsplit=1)[0]
    from pyarrow import fs

    if fixed == path:
        info = store.get_file_info(prefix + path.rstrip("/"))
        if info.type == fs.FileType.Directory:
            return _saved(pattern.rstrip("/"), split)
        return [Found(pattern, info.size)] if info.is_file else []
    listing = store.get_file_info(fs.FileSelector((prefix + fixed).rstrip("/"), recursive=True, allow_not_found=True))
    wanted = glob_pattern(path)
    files = ((info, info.path.removeprefix("/").removeprefix(prefix)) for info in listing if info.is_file)
    return [Found(f"{before}{name}{after}", info.size) for info, name in files if wanted.fullmatch(name)]


def _is_file(status: os.stat_result) -> bool:
    import stat

    return stat.S_ISREG(status.st_mode)


def glob_pattern(pattern: str) -> re.Pattern[str]:
    """What a glob with / between folders and ** across them matches, as `glob.glob(recursive=True)` has it."""
    parts = {"**/": r"(?:[^/.][^/]*/)*", "**": r"(?:[^/.][^/]*/)*[^/.][^/]*", "*": "[^/]*", "?": "[^/]"}
    found = ""
    for token in re.findall(r"\*\*/|\*\*|\*|\?|\[[^\]/]+\]|.", pattern, re.DOTALL):
        if len(token) > 2 and token[0] == "[":
            found += "[" + ("^" + token[2:-1] if token[1] == "!" else token[1:-1]).replace("\\", r"\\") + "]"
        else:
            found += parts.get(token, re.escape(token))
    return re.compile(found, re.DOTALL)


def _saved(folder: str, split: str) -> list[Found]:
    """The Arrow files of a folder of datasets.save_to_disk."""
    for name in ("dataset_dict.json", "state.json"):
        try:
            with open_file(join(folder, name)) as file:
                about = json.load(file)
        except FileNotFoundError:
            continue
        except ValueError as error:
            raise DatasetError(f"corpus.files: {join(folder, name)} is not valid JSON ({error})") from None
        if name == "dataset_dict.json":
            if split not in about["splits"]:
                raise DatasetError(f"corpus.files: {folder} has the splits {', '.join(about['splits'])}, not {split!r}: set corpus.dataset_split")
            return _saved(join(folder, split), split)
        if about.get("_indices_files"):
            raise DatasetError(f"corpus.files: {folder} was saved with a selection beside its rows; save it again after flatten_indices()")
        locations = [join(folder, part["filename"]) for part in about["_data_files"]]
        return [Found(location, size(location)) for location in locations]
    raise DatasetError(f"corpus.files: {folder} is a folder, and none of datasets.save_to_disk; name its files, as in {folder}/*.jsonl")


def _files_of_dataset(corpus: config.Corpus) -> list[str]:
    """Locations of a split's own files. Raises DatasetError when the hub does not answer, or has no such dataset, configuration or split."""
    import datasets

    assert corpus.dataset is not None
    try:
        builder = datasets.load_dataset_builder(corpus.dataset, corpus.dataset_config, revision=corpus.dataset_revision)
    except Exception as error:  # of the hub's client, its HTTP library, or `datasets`
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DatasetError(
            f"corpus.dataset {corpus.dataset!r}: the hub did not say which files it has: {reason} "
            "(without a network, download them and name them in corpus.files)"
        ) from None
    files = builder.config.data_files or {}
    if corpus.dataset_split not in files:
        there = ", ".join(map(str, files)) or "none that are files"
        raise DatasetError(f"corpus.dataset {corpus.dataset!r} has no split {corpus.dataset_split!r}; it has {there}: set corpus.dataset_split")
    return [str(location) for location in files[corpus.dataset_split]]
