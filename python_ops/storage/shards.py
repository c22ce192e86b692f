"""One safetensors file: its header, without its data."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its header and where its data begin."""

    path: Path
    header: dict[str, dict[str, Any]]  # name -> {"dtype", "shape", "data_offsets"}, in file order
    metadata: dict[str, str]
    data_start: int

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors of these names, from disk, one at a time."""
        with safe_open(self.path, framework="pt") as file:
            for name in names:
                yield name, file.get_tensor(name)

    def is_stored(self, name: str) -> bool:
        """Whether the bytes that the header places in the file are this tensor's; always so, but see dense_view."""
        return True


def read_shard(path: Path) -> Shard:
    """Reads and checks a header. Raises ValueError naming the file if it is missing, cut short or damaged."""
    if not path.is_file():
        raise ValueError(f"{path}: this shard of the checkpoint is missing")
    size = path.stat().st_size
    try:
        with safe_open(path, framework="pt"):  # the library's own checks of the format
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (SafetensorError, struct.error, ValueError) as error:
        raise ValueError(f"{path}: truncated or damaged safetensors file of {size} bytes ({error})") from None
    metadata = header.pop("__metadata__", {})
    ordered = dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"]))
    return Shard(path, ordered, metadata, 8 + length)


def same_tensor(first: Shard, name: str, second: Shard, other: str) -> bool:
    """Whether two tensors are one, bit by bit."""
    kinds = [(shard.header[n]["dtype"], shard.header[n]["shape"]) for shard, n in ((first, name), (second, other))]
    if kinds[0] != kinds[1]:
        return False
    with safe_open(first.path, framework="pt") as one, safe_open(second.path, framework="pt") as two:
        tensors = [file.get_tensor(n).reshape(-1) for file, n in ((one, name), (two, other))]
    return torch.equal(*(t.view(torch.uint8) if t.numel() else t for t in tensors))
