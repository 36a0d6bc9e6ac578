"""Whose folder is it? A dataset begins where nothing is in its way, and goes on where it was begun: never over somebody's own files.

plan.json is the first file of every dataset, made or moved, so where it is, a dataset was begun; its identity tells which.
"""

from __future__ import annotations

import contextlib

from noise.dataset import Manifest, Plan
from noise.folder import Folder
from noise.seal import SMALL_FILES, UNSEALED
from noise.storage import DatasetError

PLACES = ("tokenizer", "shards", "shards/00000")
"""Folders that are a dataset's alone."""


def claim(folder: Folder, plan: Plan) -> None:
    """Write plan.json, or find it there. Raises DatasetError as `check` does."""
    if check(folder, plan):
        plan.rewrite(folder)


def check(folder: Folder, plan: Plan) -> bool:
    """Whether plan.json is still to be written. Raises DatasetError where the folder holds another dataset, or files that this one would replace."""
    if not folder.exists("plan.json") and not _is_of(folder, plan):
        refuse_others(folder)
    return plan.is_news(folder)


def _is_of(folder: Folder, plan: Plan) -> bool:
    """Whether the folder has the manifest of the planned dataset, whose plan was lost."""
    with contextlib.suppress(DatasetError):
        return folder.exists("manifest.json") and Manifest.read(folder).identity == plan.identity
    return False


def refuse_others(folder: Folder) -> None:
    """Raises DatasetError where a folder that holds no dataset has a file that a dataset would replace, or mix with its own."""
    ours = {*SMALL_FILES, *UNSEALED}
    found = [name for name in sorted(folder.sizes("")) if name in ours]
    for place in PLACES:
        found += [f"{place}/{name}" for name in sorted(folder.sizes(place))]
    if found:
        more = f" and {len(found) - 1} more files" if len(found) > 1 else ""
        raise DatasetError(
            f"{folder.path(found[0])}{more} would be replaced by a dataset's own, and no dataset was begun there (it has no plan.json); "
            "name another folder, or move it away"
        )
