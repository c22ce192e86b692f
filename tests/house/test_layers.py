"""Dependencies run downwards only: models (python_ops) on ops (resmoe_kernels) on metal (csrc)."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPO

OPS = sorted((REPO / "resmoe_kernels").glob("*.py"))
METAL = sorted(p for p in (REPO / "csrc").rglob("*") if p.suffix in {".h", ".hpp", ".cpp", ".cc", ".cu", ".cuh"})
# What the ops storey may import besides the standard library and itself.
ALLOWED = {"torch", "triton"}


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module) of every import and every importlib.import_module with a plain name, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = ("resmoe_kernels." if node.level else "") + (node.module or "")
            yield node.lineno, module
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield node.lineno, argument.value


def without_type_checking(tree: ast.Module) -> ast.Module:
    """The module as it runs: without the body of ``if TYPE_CHECKING:``."""
    body = [n for n in tree.body if not (isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING")]
    return ast.Module(body=body, type_ignores=[])


def functions_of(tree: ast.Module) -> list[ast.AST]:
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)]


@pytest.mark.parametrize("path", OPS, ids=lambda p: p.name)
def test_ops_storey_imports_nothing_above_it(path: Path):
    tree = without_type_checking(ast.parse(path.read_text(encoding="utf-8")))
    for line, module in imports(tree):
        top = module.split(".")[0]
        assert top in {*sys.stdlib_module_names, *ALLOWED, "resmoe_kernels"}, f"{path.name}:{line} imports {module}"
        # Only the lazy table of __init__ and the command line's entry point reach up.
        if module.startswith("resmoe_kernels.python_ops"):
            assert path.name in ("__init__.py", "__main__.py"), f"{path.name}:{line} imports {module}"


def test_package_init_reaches_up_only_inside_functions():
    tree = without_type_checking(ast.parse((REPO / "resmoe_kernels" / "__init__.py").read_text(encoding="utf-8")))
    inside = {line for function in functions_of(tree) for line, _ in imports(function)}
    for line, module in imports(tree):
        assert line in inside or not module.startswith(("resmoe_kernels.python_ops", "torch")), f"line {line}: {module}"


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(encoding="utf-8"), re.MULTILINE)


def is_torch(header: str) -> bool:
    return header.split("/")[0] in {"torch", "ATen", "c10", "pybind11"} or header == "Python.h"


def test_metal_is_there():
    assert {"bindings.cpp"} < {p.name for p in METAL}


@pytest.mark.parametrize("path", METAL, ids=lambda p: p.relative_to(REPO).as_posix())
def test_only_the_binding_files_know_torch(path: Path):
    torch_headers = [h for h in includes(path) if is_torch(h)]
    if path == REPO / "csrc" / "bindings.h":
        assert torch_headers
    elif not path.name.startswith("bindings"):
        assert not torch_headers, f"{path.name} includes {torch_headers}"
        assert "bindings" not in " ".join(includes(path))


@pytest.mark.parametrize(
    "path", sorted((REPO / "python_ops").rglob("*.py")), ids=lambda p: p.relative_to(REPO).as_posix()
)
def test_models_storey_does_not_reach_past_the_ops(path: Path):
    """The models storey knows ops by their Python names, never the raw torch.ops entries or the extension."""
    source = path.read_text(encoding="utf-8")
    assert "torch.ops." not in source and "resmoe_kernels._C" not in source
