"""What a bug report needs to say: versions, what was built, the machine, the backends and why one is missing."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import resmoe_kernels
from resmoe_kernels import dispatch, ops


def environment() -> list[tuple[str, str]]:
    """Pairs of what and how it is here; a backend to a pair. Imports neither triton nor transformers."""
    missing = dispatch.missing("cpu")
    compiled = missing is None
    return [
        ("resmoe_kernels", f"{resmoe_kernels.__version__} in {Path(resmoe_kernels.__file__).parent}"),
        ("built", ops.build_info() if compiled else f"nothing: {missing}"),
        ("CPU kernels in use", ops.cpu_isa() if compiled else "none"),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{torch.__version__}, {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'without CUDA'}"),
        *((package, _version(package)) for package in ("triton", "transformers")),
        *_gpus(),
        ("backend reference", "there"),
        *(
            (f"backend {name}", dispatch.missing(name) or "there")
            for name in (b for device in dispatch.BACKENDS_OF.values() for b in device)
        ),
    ]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _gpus() -> list[tuple[str, str]]:
    if not torch.cuda.is_available():
        return [("GPUs", "none, torch finds no GPU and its driver")]
    found = []
    for gpu in range(torch.cuda.device_count()):
        it = torch.cuda.get_device_properties(gpu)
        found.append((f"GPU {gpu}", f"{it.name}, sm_{it.major}{it.minor}, {it.total_memory / 2**30:.0f} GiB"))
    return found


def aligned(rows: list[tuple[str, str]]) -> str:
    """One row a line, the second column under itself."""
    width = max(len(what) for what, _ in rows)
    return "\n".join(f"{what:<{width}}  {how}" for what, how in rows)
