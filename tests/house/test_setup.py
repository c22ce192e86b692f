"""setup.py: when CUDA kernels are built, for which GPUs, and what it says; with made-up compilers."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

GPUS = "sm_75 sm_80 sm_86 sm_89 sm_90 sm_100 sm_120"
VARIABLES = ("RESMOE_BUILD", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH", "MAX_JOBS")
Toolkit = Callable[..., Path]


@pytest.fixture
def setup(repo: Path, tmp_path, monkeypatch):
    """setup.py as a module, in an empty directory, with none of its variables set."""
    spec = importlib.util.spec_from_file_location("resmoe_setup", repo / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return module


@pytest.fixture
def toolkit(tmp_path, monkeypatch) -> Toolkit:
    """toolkit(...): a folder with an nvcc that answers, and writes its last argument and a log; now in CUDA_HOME."""

    def make(folder: str = "cuda", release: str = "13.0", gpus: str = GPUS, runtime: bool = True) -> Path:
        home = tmp_path / folder
        (home / "bin").mkdir(parents=True)
        (home / "lib").mkdir()
        if runtime:
            (home / "lib" / "libcudart_static.a").touch()
        nvcc = home / "bin" / "nvcc"
        nvcc.write_text(
            "#!/bin/sh\n"
            f'case "$1" in\n'
            f'--version) echo "Cuda compilation tools, release {release}, V{release}.1";;\n'
            f'--list-gpu-code) echo "{gpus} compute_90";;\n'
            f"""--dryrun) echo '#$ LIBRARIES=  "-L{home}/lib/stubs" "-L{home}/lib"' >&2;;\n"""
            f'*) echo "$*" >> {home}/log; for last; do :; done; echo object > "$last";;\n'
            "esac\n"
        )
        nvcc.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(home))
        return home

    return make


@pytest.mark.parametrize(
    "text, gpus, ptx",
    [
        ("8.0", ["80"], []),
        ("8.0;8.9;9.0a+PTX", ["80", "89", "90a"], ["90a"]),
        (" 8.0+PTX 10.0  12.1 ", ["80", "100", "121"], ["80"]),
        ("8.0, 9.0, 8.0;", ["80", "90"], []),
        ("10.0f", ["100f"], []),
    ],
)
def test_gpus_are_read_as_torch_reads_them(setup, text, gpus, ptx):
    assert setup.parse_gpus(text) == (gpus, ptx)


@pytest.mark.parametrize("text, item", [("Hopper", "Hopper"), ("8.0;90", "90"), ("8.0+ptx", "8.0+ptx")])
def test_what_is_no_gpu_is_refused(setup, text, item):
    with pytest.raises(SystemExit) as error:
        setup.parse_gpus(text)
    assert str(error.value) == (
        f'resmoe_kernels: TORCH_CUDA_ARCH_LIST must be like "8.0;9.0a+PTX", got {item!r} in {text!r}'
    )


def test_by_default_all_gpus_that_nvcc_knows_and_ptx_of_the_last(setup, toolkit):
    home = toolkit()
    cuda = setup.find_cuda("auto")
    assert str(cuda) == "sm_80, sm_89, sm_90, sm_100 with PTX; nvcc 13.0"
    assert cuda.nvcc == str(home / "bin" / "nvcc") and cuda.runtime == home / "lib" / "libcudart_static.a"
    toolkit("old", release="12.2", gpus="sm_50 sm_80 sm_86 sm_89 sm_90")
    assert str(setup.find_cuda("cuda")) == "sm_80, sm_89, sm_90 with PTX; nvcc 12.2"


def test_gpus_asked_for(setup, toolkit, monkeypatch):
    toolkit()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6;9.0a+PTX")
    assert str(setup.find_cuda("cuda")) == "sm_86, sm_90a with PTX; nvcc 13.0"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5+PTX 9.0 15.0+PTX")
    assert str(setup.find_cuda("auto")) == "sm_90, without sm_75, sm_150; nvcc 13.0"
    knows = "as they need sm_80 or later and nvcc 13.0 builds for " + GPUS.replace(" ", ", ")
    assert setup.find_cuda("cuda") == f"none for sm_75, sm_150, {knows}"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")
    assert setup.find_cuda("auto") == f"none for sm_75, {knows}"


def test_why_there_are_no_cuda_kernels(setup, toolkit, monkeypatch):
    toolkit("old", release="11.8")
    assert setup.find_cuda("auto") == "nvcc 11.8 is older than 12.0"
    toolkit("bare", runtime=False)
    assert setup.find_cuda("auto") == "libcudart_static.a was not found where nvcc 13.0 looks for libraries"
    toolkit("broken", release="x")
    assert setup.find_cuda("auto").endswith("broken/bin/nvcc --version names no release")
    assert setup.find_cuda("cpu") == "RESMOE_BUILD is cpu"
    monkeypatch.setattr(setup.shutil, "which", lambda *_, **__: None)
    assert setup.find_cuda("auto") == "nvcc was not found (in CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda)"
    monkeypatch.setattr(sys, "platform", "win32")
    assert setup.find_cuda("auto") == "they are built on Linux only"


def test_where_nvcc_is_looked_for(setup, toolkit, monkeypatch):
    on_path, path, home = toolkit("on_path"), toolkit("cuda_path"), toolkit("cuda_home")
    monkeypatch.setenv("PATH", f"{on_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_PATH", str(path))
    for variable, there in (("CUDA_HOME", home), ("CUDA_PATH", path), ("PATH", on_path)):
        assert setup.find_nvcc() == str(there / "bin" / "nvcc")
        monkeypatch.delenv(variable)


def test_objects_are_compiled_only_where_something_changed(setup, toolkit, tmp_path, monkeypatch):
    home, cuda_folder = toolkit(), tmp_path / "csrc" / "cuda"
    cuda_folder.mkdir(parents=True)
    for name in ("a.cu", "b.cu", "shared.cuh"):
        (cuda_folder / name).write_text("1")

    def compiled() -> list[str]:
        log = home / "log"
        log.unlink(missing_ok=True)
        objects = setup.compile_cuda(setup.find_cuda("auto"))
        assert [Path(o).name.split("-")[0] for o in objects] == ["a", "b"]
        assert sorted(objects) == sorted(str(o) for o in setup.CUDA_OBJECTS.iterdir())  # and no old ones
        commands = log.read_text().splitlines() if log.exists() else []
        assert all("--threads" in c and "-gencode=arch=compute_80,code=sm_80 " in c for c in commands)
        return [c.split(" -c ")[1].split()[0] for c in commands]

    both = ["csrc/cuda/a.cu", "csrc/cuda/b.cu"]
    assert compiled() == both
    assert compiled() == []
    (cuda_folder / "b.cu").write_text("2")
    assert compiled() == both[1:]
    (cuda_folder / "shared.cuh").write_text("2")
    assert compiled() == both
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0+PTX")
    assert compiled() == both
    monkeypatch.setenv("MAX_JOBS", "1")  # changes no object
    assert compiled() == []
    (cuda_folder / "b.cu").write_text("3")
    assert compiled() == both[1:]
    assert "--threads 1 " in (home / "log").read_text()
    monkeypatch.setenv("MAX_JOBS", "many")
    with pytest.raises(SystemExit, match=r"^resmoe_kernels: MAX_JOBS must be a number of at least 1, got 'many'$"):
        compiled()


def test_a_source_that_nvcc_refuses_leaves_no_object(setup, toolkit, tmp_path):
    home, cuda_folder = toolkit(), tmp_path / "csrc" / "cuda"
    cuda_folder.mkdir(parents=True)
    (cuda_folder / "a.cu").touch()
    cuda = setup.find_cuda("auto")
    (home / "bin" / "nvcc").write_text("#!/bin/sh\nexit 2\n")
    with pytest.raises(SystemExit) as error:
        setup.compile_cuda(cuda)
    assert str(error.value) == (
        "resmoe_kernels: nvcc 13.0 failed on csrc/cuda/a.cu, see its messages above; "
        "RESMOE_BUILD=cpu builds without CUDA kernels"
    )
    assert list(setup.CUDA_OBJECTS.iterdir()) == []


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"RESMOE_BUILD": "gpu"}, "resmoe_kernels: RESMOE_BUILD must be one of auto, cpu, cuda, got 'gpu'"),
        (
            {"RESMOE_BUILD": "cuda"},
            "resmoe_kernels: RESMOE_BUILD is cuda, but CUDA kernels cannot be built: nvcc 11.8 is older than 12.0",
        ),
    ],
)
def test_a_build_that_cannot_be_ends_in_one_sentence(repo, toolkit, tmp_path, variables, message):
    toolkit(release="11.8")
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES or name == "CUDA_HOME"}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)],
        cwd=repo,
        env=clean | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == message
