"""Tensors in a file that is there whole, bit by bit, or counts as not there: what was measured of a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from resmoe_kernels.python_ops.storage.digests import Digest
from resmoe_kernels.python_ops.storage.files import write_tensors

_DIGEST = "digest"


def write_sealed(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Writes tensors with a digest of them; the file appears under its name only once it is whole."""
    write_tensors({**tensors, _DIGEST: _digest(tensors)}, file)


def read_sealed(file: Path) -> dict[str, Tensor] | None:
    """The inverse; None where there is no file, and where it is damaged, which no header tells of its data."""
    try:
        tensors = load_file(file)
        stored = tensors.pop(_DIGEST)
    except (OSError, SafetensorError, KeyError):
        return None
    return tensors if torch.equal(stored, _digest(tensors)) else None


def _digest(tensors: Mapping[str, Tensor]) -> Tensor:
    digest = Digest()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return torch.tensor(list(digest.text().encode()), dtype=torch.uint8)
