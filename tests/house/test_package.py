"""The package as a whole: what importing it costs, what it shows, and how it is installed."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

import resmoe_kernels
from resmoe_kernels.when_imported import when_imported


def run_elsewhere(code: str) -> subprocess.CompletedProcess:
    """Python in another directory and without PYTHONPATH: it finds what is installed and nothing else."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run([sys.executable, "-c", code], cwd="/", env=clean, capture_output=True, text=True, check=False)


def run_uninstalled(folder: Path, code: str) -> subprocess.CompletedProcess:
    """The same with ``folder`` ahead of everything, and without what an editable install adds to the search."""
    return run_elsewhere(
        "import sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        f"sys.path.insert(0, {str(folder)!r})\n{code}"
    )


def modules_after(code: str) -> list[str]:
    done = run_elsewhere(f"import json, sys\n{code}\nprint(json.dumps(sorted(sys.modules)))")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_import_is_cheap():
    """Nothing heavy: not even torch, until a name is used."""
    loaded = {name.split(".")[0] for name in modules_after("import resmoe_kernels")}
    assert loaded.isdisjoint({"torch", "numpy", "transformers", "safetensors", "scipy", "ot", "triton"})


def test_ops_import_no_models_and_touch_no_gpu():
    loaded = modules_after(
        "import resmoe_kernels\nresmoe_kernels.experts\nimport torch\nassert not torch.cuda.is_initialized()"
    )
    assert "torch" in loaded
    assert {n.split(".")[0] for n in loaded}.isdisjoint({"transformers", "scipy", "ot", "triton", "lm_eval"})
    assert not any(n.startswith("resmoe_kernels.python_ops") for n in loaded)


def test_public_names():
    """Every name of dir() is there, and they stay few."""
    names = [n for n in dir(resmoe_kernels) if not n.startswith("_")]
    assert 0 < len(names) <= 12
    for name in names:
        assert getattr(resmoe_kernels, name) is not None
    assert set(resmoe_kernels.__all__) == set(dir(resmoe_kernels))


def test_star_import_gives_the_public_names():
    loaded: dict = {}
    exec("from resmoe_kernels import *", loaded)
    assert loaded["experts"] is resmoe_kernels.experts


def test_missing_attribute():
    with pytest.raises(AttributeError, match=r"^module 'resmoe_kernels' has no attribute 'exprets'$"):
        resmoe_kernels.exprets  # noqa: B018
    assert not hasattr(resmoe_kernels, "__wrapped__")


def test_version_is_that_of_the_installed_package():
    assert version("resmoe_kernels") == resmoe_kernels.__version__


def test_models_storey_is_installed_inside_the_package():
    done = run_elsewhere("import resmoe_kernels.python_ops.methods")
    assert done.returncode == 0, done.stderr


def test_no_top_level_python_ops_is_installed():
    """The folder's plain name in site-packages would shadow anybody's own python_ops."""
    done = run_elsewhere("import python_ops")
    assert done.returncode == 1 and "No module named 'python_ops'" in done.stderr


def test_source_tree_without_install_says_what_to_do(repo):
    """From the checkout without an install the ops work, and what lives in python_ops says how to install."""
    done = run_uninstalled(repo, "import resmoe_kernels\nresmoe_kernels.experts\nresmoe_kernels.compress")
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith(
        "ImportError: resmoe_kernels is imported from its source tree without being installed; "
        "run: pip install --no-build-isolation -e ."
    )


def test_missing_extension_is_said_once(tmp_path, repo):
    """A copy without the compiled library still works, on the reference, and says so."""
    without = shutil.ignore_patterns("_C*.so", "__pycache__")
    shutil.copytree(repo / "resmoe_kernels", tmp_path / "resmoe_kernels", ignore=without)
    code = "import resmoe_kernels as r\nprint(r.__file__, r.backends())"
    done = run_uninstalled(tmp_path, code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{tmp_path}/resmoe_kernels/__init__.py ('reference',)"
    sentence = "resmoe_kernels: the C++ extension is not built; every op runs on the plain PyTorch reference"
    assert done.stderr.count(sentence) == 1


# ---- what is given away: the sdist, and the wheel built from it


def builds(call: str, folder: Path, to: Path) -> Path:
    """What setuptools' build backend makes of a folder, as pip asks it to."""
    code = f"from setuptools import build_meta\nbuild_meta.{call}({str(to)!r})"
    without_cuda = os.environ | {"RESMOE_BUILD": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=without_cuda, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return next(to.iterdir())


@pytest.fixture(scope="module")
def unpacked_sdist(tmp_path_factory, repo) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "demo-out", "__pycache__", "*.so", "*.egg-info")
    shutil.copytree(repo, folder / "tree", ignore=unwanted)
    archive = builds("build_sdist", folder / "tree", folder / "dist")
    shutil.unpack_archive(archive, folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def unpacked_wheel(tmp_path_factory, repo, unpacked_sdist) -> Path:
    """From the sdist; the extension is the one of the checkout, as compiling it anew takes minutes."""
    built = sorted((repo / "resmoe_kernels").glob("_C*.so"))[0]
    code = (
        "from setuptools import Distribution, Extension\n"
        "command = Distribution({'ext_modules': [Extension('a', [])]}).get_command_obj('build_ext')\n"
        "command.ensure_finalized()\nprint(command.build_lib)"
    )
    library = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    there = unpacked_sdist / library / "resmoe_kernels"
    there.mkdir(parents=True)
    shutil.copy(built, there)
    later = time.time() + 3600  # than all sources
    os.utime(there / built.name, (later, later))
    folder = tmp_path_factory.mktemp("wheel")
    wheel = builds("build_wheel", unpacked_sdist, folder / "dist")
    assert wheel.name.split("-")[2:4] == ["cp310", "abi3"]  # one for every Python
    shutil.unpack_archive(wheel, folder / "unpacked", "zip")
    return folder / "unpacked"


def files(folder: Path, *parts: str) -> set[str]:
    """The files of these parts of a folder, but no compiled ones."""
    found = (path for part in parts for path in (folder / part).rglob("*") if path.is_file())
    return {str(p.relative_to(folder)) for p in found if p.suffix not in (".so", ".pyc")}


def test_sdist_holds_all_that_builds_and_tests_need(repo, unpacked_sdist):
    parts = ("csrc", "resmoe_kernels", "python_ops", "tests")
    assert files(repo, *parts) <= files(unpacked_sdist, *parts)
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "CHANGELOG.md", "LICENSE"):
        assert (unpacked_sdist / name).is_file()


def test_wheel_holds_the_package_and_nothing_else(repo, unpacked_wheel):
    expected = files(repo, "resmoe_kernels") | {f"resmoe_kernels/{f}" for f in files(repo, "python_ops")}
    found = {name for name in files(unpacked_wheel, ".") if ".dist-info/" not in name}
    assert found == expected
    assert "resmoe_kernels/py.typed" in found
    (entry_points,) = unpacked_wheel.glob("*.dist-info/entry_points.txt")
    assert "resmoe = resmoe_kernels.python_ops.cli:main" in entry_points.read_text()


def test_wheel_runs_elsewhere(unpacked_wheel):
    code = (
        "import torch, resmoe_kernels as rk\n"
        "torch.manual_seed(0)\n"
        "layer = rk.FactoredExperts(num_experts=2, hidden_size=32, intermediate_size=16, gated=True,\n"
        "    group=torch.zeros(2).int(), base_gate_up=torch.randn(1, 32, 32), base_down=torch.randn(1, 32, 16))\n"
        "call = torch.randn(3, 32), torch.tensor([[0], [1], [0]]), torch.ones(3, 1)\n"
        "y = rk.experts(*call, rk.PackedExperts.pack(layer))\n"
        "with rk.backend('reference'):\n    expected = rk.experts(*call, layer)\n"
        "torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)\n"
        "from resmoe_kernels.python_ops.tools.environment import environment\n"
        "print(rk.__file__, 'cpu' in rk.backends(), dict(environment())['built'])\n"
    )
    done = run_uninstalled(unpacked_wheel, code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{unpacked_wheel}/resmoe_kernels/__init__.py True CPU kernels (portable")


# ---- when_imported


@pytest.fixture
def module(tmp_path, monkeypatch) -> Iterator[str]:
    """The name of an importable module that counts its executions."""
    name = "resmoe_when_imported_probe"
    (tmp_path / f"{name}.py").write_text("value = 7\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = sys.meta_path[:]
    yield name
    sys.meta_path[:] = before
    sys.modules.pop(name, None)


def test_callback_runs_at_once_for_a_module_that_is_there():
    calls: list[str] = []
    when_imported("json", lambda: calls.append("json"))
    assert calls == ["json"]


def test_callback_runs_after_the_import_and_once(module):
    calls: list[int] = []
    when_imported(module, lambda: calls.append(sys.modules[module].value))
    assert calls == []
    imported = __import__(module)
    assert calls == [7]  # after execution: the module's names were there
    assert imported.__spec__.origin.endswith(f"{module}.py") and imported.value == 7
    del sys.modules[module]
    __import__(module)
    assert calls == [7]


def test_several_callbacks_for_one_module(module):
    calls: list[str] = []
    when_imported(module, lambda: calls.append("first"))
    when_imported(module, lambda: calls.append("second"))
    __import__(module)
    assert sorted(calls) == ["first", "second"]


def test_callback_survives_a_look_that_does_not_import(module):
    """importlib.util.find_spec asks whether a module exists; the import that follows must still call back."""
    calls: list[str] = []
    when_imported(module, lambda: calls.append("called"))
    assert find_spec(module) is not None and calls == []
    __import__(module)
    assert calls == ["called"]


def test_callback_survives_an_import_that_fails(module, tmp_path):
    source = tmp_path / f"{module}.py"
    source.write_text("raise RuntimeError('not yet')\n")
    calls: list[str] = []
    when_imported(module, lambda: calls.append("called"))
    with pytest.raises(RuntimeError, match="not yet"):
        __import__(module)
    assert calls == []
    source.write_text("value = 'now it works'\n")  # another size, so that no cached bytecode is taken for it
    __import__(module)
    assert calls == ["called"]


def test_a_module_that_does_not_exist_fails_as_ever():
    before = sys.meta_path[:]
    when_imported("resmoe_no_such_module", lambda: None)
    with pytest.raises(ModuleNotFoundError, match="resmoe_no_such_module"):
        __import__("resmoe_no_such_module")
    sys.meta_path[:] = before


def test_sources_of_a_watched_module_can_be_read(module):
    """Tracebacks and inspect ask the module's loader for its source."""
    when_imported(module, lambda: None)
    assert inspect.getsource(__import__(module)) == "value = 7\n"
