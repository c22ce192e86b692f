"""The CUDA kernels, their launch and their binding, compiled for the CPU: ops that tests call with CPU tensors.

``library()`` builds csrc/cuda and csrc/bindings_cuda.cpp with a C++ compiler on the emulation of CUDA (tests/cpp), once
for all processes and until one of the sources changes, and loads it; ``on_cpu()`` lets ``resmoe::low_rank_decode`` and
``resmoe::block_sparse_decode`` take CPU tensors; ``Gpu.use`` says on which made-up GPU launches run.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock

import resmoe_kernels.ops  # noqa: F401  defines the ops

REPO = Path(__file__).resolve().parents[2]
TORCH = Path(torch.__file__).parent
BUILT = REPO / "build" / "emulated_cuda"
OPS = ("low_rank_decode", "block_sparse_decode")
SOURCES = (
    *(path.relative_to(REPO).as_posix() for path in sorted((REPO / "csrc" / "cuda").glob("*.cu"))),  # all, as setup.py
    *(f"tests/cpp/{name}.cpp" for name in ("cuda_emulation", "cuda_emulation_threads", "emulated_kernels")),
)
READ = (
    "csrc/*",
    "csrc/cpu/*.h",
    "csrc/cuda/*",
    "tests/cpp/*emulat*",
    "tests/cpp/host_headers/**/*",
)  # what a library depends on


# Of threads, warps and blocks, shuffled by a seed; of asynchronous copies, when they are waited for or at once.
ORDERS, ARRIVALS = ("forward", "reverse", "shuffled"), ("late", "early")


class Gpu(NamedTuple):
    """A GPU that the emulation stands for."""

    units: int = 3  # multiprocessors: blocks of a launch
    shared_bytes: int = 227 << 10  # of a block, at most: sm_90's
    order: str = ORDERS[0]
    copies: str = ARRIVALS[0]
    seed: int = 0

    def use(self) -> None:
        """For launches from now on."""
        order, copies = ORDERS.index(self.order), ARRIVALS.index(self.copies)
        library().emulate(self.units, self.shared_bytes, order, copies, self.seed)


def header_folders() -> list[Path]:
    """Where cuda_runtime.h may be: in a toolkit, or in what triton brings."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [Path(home, "include") for home in homes if home]
    if (triton := importlib.util.find_spec("triton")) is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "include")
    return [folder for folder in folders if (folder / "cuda_runtime.h").is_file()]


def missing() -> str | None:
    """Why the library cannot be built here, None if it can."""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return f"the emulation of CUDA is for Linux on x86-64, this is {platform.system()} on {platform.machine()}"
    if shutil.which("g++") is None:
        return "there is no g++"
    if not header_folders():
        return "cuda_runtime.h is in no CUDA_HOME, not in /usr/local/cuda, and there is no triton, which has it too"
    return None


def compiler(headers: Path) -> list[str]:
    """The command that compiles files with these CUDA headers, from REPO."""
    return [
        *("g++", "-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas"),
        *("-DRESMOE_EMULATE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-Icsrc", "-Itests/cpp"),
        *("-isystem", f"{headers}", "-isystem", f"{TORCH / 'include'}"),
        *("-isystem", "tests/cpp/host_headers"),  # the last: what the others lack
        *("-include", "emulated_runtime.h", "-x", "c++"),
    ]


@cache
def library() -> ctypes.CDLL:
    """The built kernels; ``emulate`` of tests/cpp/emulated_kernels.cpp is in it."""
    linked = ["-x", "none", "-shared", "-Wl,-z,defs", f"-L{TORCH / 'lib'}", "-ltorch_cpu"]
    compile_all = [*compiler(header_folders()[0]), *SOURCES, *linked]
    parts = [repr((compile_all, torch.__version__)).encode()]
    parts += [path.read_bytes() for pattern in READ for path in sorted(REPO.glob(pattern)) if path.is_file()]
    path = BUILT / f"kernels-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}.so"
    BUILT.mkdir(parents=True, exist_ok=True)
    with FileLock(BUILT / "lock"):
        if not path.exists():
            for stale in BUILT.glob("kernels-*"):
                stale.unlink()
            unfinished = path.with_suffix(".unfinished")
            done = subprocess.run(
                [*compile_all, "-o", unfinished], cwd=REPO, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{' '.join(compile_all)}\n{done.stderr[:8000]}"
            unfinished.rename(path)
        loaded = ctypes.CDLL(str(path))
    _define()
    return loaded


@cache
def _define() -> torch.library.Library:
    """resmoe_emulated::<op>, which the library has registered, with the schemas of resmoe::<op>."""
    namespace = torch.library.Library("resmoe_emulated", "DEF")
    for op in OPS:
        schema = getattr(torch.ops.resmoe, op).default._schema
        namespace.define(str(schema).removeprefix("resmoe::"))
    return namespace


@contextmanager
def on_cpu() -> Iterator[None]:
    """Within it, ``resmoe::<op>`` of CPU tensors is the emulated kernel, and memory that is not written is NaN."""
    library()
    Gpu().use()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # only so that torch.empty comes filled
    try:
        with torch.library._scoped_library("resmoe", "IMPL") as kernels:
            for op in OPS:
                kernels.impl(op, getattr(torch.ops.resmoe_emulated, op).default, "CPU")
            yield
    finally:
        torch.use_deterministic_algorithms(before)
