"""Shards with quantised tensors, seen as the dense shards that they stand for: the same names, other bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resmoe_kernels.python_ops.storage.quantised import Stored, stored_tensors
from resmoe_kernels.python_ops.storage.shards import Shard

_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}  # as safetensors calls them


@dataclass(frozen=True)
class DenseView(Shard):
    """One shard, dense. Its header says the dense tensors; offsets of those that are made say their size only.

    made: what is made of codes and scales, by name;  raw: where those are, by name, in this shard or in another
    """

    made: Mapping[str, Stored]
    raw: Mapping[str, Shard]
    dtype: torch.dtype

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            if name in self.made:
                yield name, self.made[name].read(self._load, self.dtype)
            else:
                yield name, self._load(name)

    def _load(self, name: str) -> Tensor:
        return next(tensor for _, tensor in self.raw[name].tensors([name]))

    def is_stored(self, name: str) -> bool:
        return name not in self.made


def dense_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """In which dtype quantised weights become dense: what config.json calls the model's, bfloat16 if nothing."""
    parts = (config, config.get("text_config") or {})
    said = next((part[key] for part in parts for key in ("dtype", "torch_dtype") if part.get(key)), "bfloat16")
    dtype = getattr(torch, str(said).removeprefix("torch."), None)
    if dtype not in _NAMES:
        raise ValueError(f"config.json: dtype must be bfloat16, float16 or float32, got {said!r}")
    return dtype


def dense_views(shards: Mapping[str, Shard], config: Mapping[str, Any]) -> dict[str, Shard]:
    """The shards of a checkpoint, those with quantised tensors as views of the dense ones."""
    raw = {name: shard for shard in shards.values() for name in shard.header}
    made, serving = stored_tensors({name: shard.header[name] for name, shard in raw.items()}, config)
    if not made:
        return dict(shards)
    dtype = dense_dtype(config)
    named = {stored.codes: name for name, stored in made.items()}
    views: dict[str, Shard] = {}
    for file, shard in shards.items():
        header: dict[str, dict[str, Any]] = {}
        for name, described in shard.header.items():
            if name in named:
                shape = made[named[name]].shape
                size = torch.Size(shape).numel() * dtype.itemsize
                header[named[name]] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [0, size]}
            elif name not in serving:
                header[name] = described
        here = {name: made[name] for name in header if name in made}
        views[file] = DenseView(shard.path, header, shard.metadata, shard.data_start, here, raw, dtype)
    return views
