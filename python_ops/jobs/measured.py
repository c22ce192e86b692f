"""What was measured of a layer, in a file that is there whole or counts as not there."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from resmoe_kernels.python_ops.models.checkpoint import write_tensors

_DIGEST = "sha256"


def write_measured(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Writes tensors with a digest of them; the file appears under its name only once it is whole."""
    write_tensors({**tensors, _DIGEST: _digest(tensors)}, file)


def read_measured(file: Path) -> dict[str, Tensor] | None:
    """The inverse; None where there is no file, and where it is damaged, which no header tells of its data."""
    try:
        tensors = load_file(file)
        stored = tensors.pop(_DIGEST)
    except (OSError, SafetensorError, KeyError):
        return None
    return tensors if torch.equal(stored, _digest(tensors)) else None


def _digest(tensors: Mapping[str, Tensor]) -> Tensor:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)
