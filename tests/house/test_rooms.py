"""Imports between rooms run one way, no file reaches a file that reaches it, and private names stay in their file."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import REPO

PACKAGE = "resmoe_kernels"
ORDER = re.findall(r"^    (\w+) {2,}\S", (REPO / "python_ops" / "__init__.py").read_text(), re.MULTILINE)
FILES = {  # module -> file
    ".".join((*parents, *path.relative_to(REPO).with_suffix("").parts)).removesuffix(".__init__"): path
    for folder, parents in ((PACKAGE, ()), ("python_ops", (PACKAGE,)))
    for path in sorted((REPO / folder).rglob("*.py"))
}


class Import(NamedTuple):
    line: int
    module: str  # a file of the package
    name: str | None  # what is taken from it, None for the file itself


def imports(source: str, known: dict[str, Path]) -> Iterator[Import]:
    """Of files of the package, at any depth, for types only too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, a.name, None) for a in node.names if a.name in known)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
            for alias in node.names:
                file = f"{node.module}.{alias.name}"
                yield (
                    Import(node.lineno, file, None)
                    if file in known
                    else Import(node.lineno, node.module or "", alias.name)
                )


def room(module: str) -> str | None:
    """The folder of python_ops that a file lies in, None for the files above the rooms and for other storeys."""
    match = re.match(rf"{PACKAGE}\.python_ops\.(\w+)", module)
    return match[1] if match and (REPO / "python_ops" / match[1]).is_dir() else None


def against_the_order(module: str, source: str, known: dict[str, Path]) -> list[str]:
    """The imports of a file that run upwards."""
    own = room(module)
    if own is None:
        return []
    found = []
    for line, other, _ in imports(source, known):
        above = "the top" if other.startswith(f"{PACKAGE}.python_ops") and room(other) is None else None
        if room(other) and ORDER.index(room(other)) < ORDER.index(own):
            above = room(other)
        if above:
            found.append(f"{module}:{line} in {own} imports {other} of {above}, which is above it")
    return found


def rings(edges: dict[str, set[str]]) -> list[set[str]]:
    """Files that reach each other, by import of import."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for other in edges.get(waiting.pop(), ()):
                if other not in seen:
                    seen.add(other)
                    waiting.append(other)
        return seen

    reach = {name: reached(name) for name in edges}
    found = {frozenset(o for o in reach[name] if name in reach[o]) for name in edges if name in reach[name]}
    return sorted(map(set, found), key=sorted)


def private_names(module: str, source: str, known: dict[str, Path]) -> list[str]:
    """Where a file takes a private name of another: by import, or as an attribute of an imported file."""
    found, files = [], {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
            for alias in node.names:
                if f"{node.module}.{alias.name}" in known:
                    files[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                elif alias.name.startswith("_") and not alias.name.startswith("__"):
                    found.append(f"{module}:{node.lineno} imports {alias.name} of {node.module}")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in files:
            private = node.attr.startswith("_") and not node.attr.startswith("__")
            found += [f"{module}:{node.lineno} uses {node.attr} of {files[node.value.id]}"] * private
    return found


def test_every_room_has_its_place_and_says_what_lives_there():
    folders = {path.parent.name for path in (REPO / "python_ops").glob("*/*.py")}
    assert folders == set(ORDER), "the order is in python_ops/__init__.py"
    for folder in folders:
        said = (REPO / "python_ops" / folder / "__init__.py").read_text()
        (statement,) = ast.parse(said).body  # a docstring and nothing else
        assert isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant), folder


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_run_one_way(module):
    source = FILES[module].read_text(encoding="utf-8")
    assert against_the_order(module, source, FILES) == []
    assert private_names(module, source, FILES) == []


@pytest.mark.parametrize("storey", ["python_ops", "resmoe_kernels"])
def test_no_file_reaches_a_file_that_reaches_it(storey):
    edges = {
        module: {i.module for i in imports(path.read_text(encoding="utf-8"), FILES)}
        for module, path in FILES.items()
        if path.relative_to(REPO).parts[0] == storey and module != PACKAGE  # whose table of public names is lazy
    }
    assert rings(edges) == []


def test_a_solver_knows_no_model():
    for module, path in FILES.items():
        if room(module) == "solvers":
            assert "transformers" not in path.read_text(encoding="utf-8"), module


def test_what_is_held_is_seen():
    """An import upwards, a ring round a corner, a private name in either way."""
    known = {f"{PACKAGE}.python_ops.{m}": Path() for m in ("tools.evaluate", "solvers.svd", "models.layer", "cli")}
    up = "def f():\n    from resmoe_kernels.python_ops.tools.evaluate import evaluate\n"
    assert against_the_order(f"{PACKAGE}.python_ops.solvers.svd", up, known) != []
    assert against_the_order(f"{PACKAGE}.python_ops.tools.x", up, known) == []
    top = "import resmoe_kernels.python_ops.cli"
    assert against_the_order(f"{PACKAGE}.python_ops.tools.x", top, known) != []
    assert rings({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [{"a", "b", "c"}]
    assert rings({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    for private in ("import _rows", "import svd\nsvd._rows()"):
        module = "resmoe_kernels.python_ops.solvers" + (".svd" if "_rows" in private.split("\n")[0] else "")
        assert private_names("x", f"from {module} {private}", known) != []
