"""Who may import whom, and that `noise` and `trainer` run on an image that has neither ray, datasets nor transformers."""

from __future__ import annotations

import ast
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("noise", "pipeline", "trainer", "eval")
HEAVY = ("ray", "datasets", "transformers")

BLOCKED = """
import importlib, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HEAVY:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
for name in NAMES:
    importlib.import_module(name)
print(len([name for name in sys.modules if name.partition(".")[0] in HEAVY]))
"""


def modules(room: str) -> list[str]:
    """All modules of a room but `__main__`, which is a command."""
    found = [module.name for module in pkgutil.walk_packages([str(ROOT / room)], f"{room}.")]
    return [room, *(name for name in found if not name.endswith("__main__"))]


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(top package, whole name) of every import under a node; imports within a room may be relative and are left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0], node.module


def top_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run when a module is imported; what stands under `if TYPE_CHECKING` and in functions does not."""
    pending = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
        elif isinstance(node, ast.ClassDef | ast.If | ast.With | ast.Try):
            pending += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
            pending += [statement for handler in getattr(node, "handlers", []) for statement in handler.body]
        else:
            yield node


def offenders(room: str, forbidden: set[str]) -> list[str]:
    found = []
    for path in sources(room):
        found += [f"{path.relative_to(ROOT)} imports {name}" for top, name in imports(ast.parse(path.read_text())) if top in forbidden]
    return found


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [
        ("noise", {"pipeline", "trainer", "eval"}),
        ("trainer", {"pipeline", "eval", "ray"}),
        ("pipeline", {"trainer", "eval"}),
    ],
)
def test_rooms_know_only_the_rooms_below(room: str, forbidden: set[str]) -> None:
    assert not offenders(room, forbidden)


def test_noise_needs_torch_numpy_and_pyarrow_alone() -> None:
    """numba is for speed: one file imports it, and the others do without (test_compiled.py); the hub is asked by its own client."""
    allowed = set(sys.stdlib_module_names) | {"noise", "torch", "numpy", "pyarrow"}
    others = {path.name: {top for top, _ in imports(ast.parse(path.read_text()))} - allowed for path in sources("noise")}
    assert others.pop("native.py") == {"numba"} and others.pop("hub.py") == {"huggingface_hub"} and not any(others.values())


@pytest.mark.parametrize("room", ["noise", "trainer"])
def test_heavy_imports_sit_in_the_functions_that_need_them(room: str) -> None:
    found = []
    for path in sources(room):
        for statement in top_level(ast.parse(path.read_text())):
            found += [f"{path.relative_to(ROOT)}:{statement.lineno} imports {name}" for top, name in imports(statement) if top in HEAVY]
    assert not found


@pytest.mark.parametrize("room", ["noise", "trainer"])
def test_imports_where_ray_datasets_and_transformers_are_absent(room: str) -> None:
    program = f"HEAVY, NAMES = {HEAVY!r}, {modules(room)!r}\n{BLOCKED}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env={**os.environ}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "0"
