"""Writing files that survive: each appears under its name whole, and is on the disk before anything refers to it."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resmoe_kernels.python_ops.storage.digests import Digest, file_digest
from resmoe_kernels.python_ops.storage.shards import Shard

_COPY_CHUNK = 16 << 20  # bytes


def part_name(target: Path) -> Path:
    """Where a file is written before it gets its name. Hidden: no file of a checkpoint is copied to such a name."""
    return target.with_name(f".{target.name}.part")


def write_subset(shard: Shard, names: Iterable[str], target: Path) -> str:
    """Copies some tensors of a shard to a new safetensors file: bytes untouched, a few MiB at a time, or, of what the
    shard does not store as it is, one tensor at a time.

    Returns the digest of the new file.
    """
    header: dict[str, Any] = {"__metadata__": shard.metadata} if shard.metadata else {}
    position, wanted = 0, set(names)
    chosen = [name for name in shard.header if name in wanted]
    for name in chosen:
        start, stop = shard.header[name]["data_offsets"]
        header[name] = {**shard.header[name], "data_offsets": [position, position + stop - start]}
        position += stop - start
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    part, digest = part_name(target), Digest(head)
    with shard.path.open("rb") as source, part.open("wb") as out:
        out.write(head)
        for name in chosen:
            if not shard.is_stored(name):
                for _, tensor in shard.tensors([name]):
                    data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
                    out.write(data)
                    digest.update(data)
                continue
            start, stop = shard.header[name]["data_offsets"]
            source.seek(shard.data_start + start)
            _copy(source, out, stop - start, digest)
    give_name(part, target)
    return digest.text()


def _copy(source, out, length: int, digest: Digest) -> None:
    while length:
        chunk = source.read(min(length, _COPY_CHUNK))
        if not chunk:
            raise ValueError(f"{source.name}: ends before the data its header promises")
        out.write(chunk)
        digest.update(chunk)
        length -= len(chunk)


def copy_file(source: Path, target: Path) -> str:
    """Copies a file. Returns its digest."""
    part, digest = part_name(target), Digest()
    with source.open("rb") as file, part.open("wb") as out:
        _copy(file, out, source.stat().st_size, digest)
    give_name(part, target)
    return digest.text()


def write_tensors(tensors: Mapping[str, Tensor], target: Path) -> str:
    """Writes tensors to a new safetensors file. Returns its digest."""
    from safetensors.torch import save_file

    part = part_name(target)
    part.touch()
    mode = part.stat().st_mode  # which safetensors would make 0600
    # One key: safetensors writes several in an order that differs from process to process.
    save_file({name: t.contiguous() for name, t in tensors.items()}, part, metadata={"format": "pt"})
    part.chmod(mode)
    digest = file_digest(part)
    give_name(part, target)
    return digest


def write_json(value: Any, target: Path) -> None:
    """Writes JSON."""
    part = part_name(target)
    with part.open("w", encoding="utf-8") as out:
        out.write(json.dumps(value, indent=2) + "\n")
    give_name(part, target)


def give_name(part: Path, target: Path) -> None:
    """Gives a file its name once it is on the disk, and waits until the name is, too: what refers to it may be written
    next."""
    sync_file(part)
    part.replace(target)
    sync_folder(target.parent)


def sync_file(path: Path) -> None:
    """Waits until what a file holds is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk. A no-op where the system has no such call (Windows)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
