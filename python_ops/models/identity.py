"""Which model this is: told from all that its files hold, so that nothing made from one is taken for another's."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from resmoe_kernels.python_ops.models.checkpoint import Checkpoint
from resmoe_kernels.python_ops.storage.digests import Stamp, file_digest, stamp, text_digest
from resmoe_kernels.python_ops.storage.model_files import files_beside


@dataclass(frozen=True)
class Identity:
    """Of a model folder.

    model: digest of all that its outputs depend on: config.json as values, every byte of its weights, its own code
    beside: digest of the other files that a compressed checkpoint takes along: tokenizer, generation config, ...
    stamps: of the files read for ``model``, as this machine knows them
    """

    model: str
    beside: str
    stamps: tuple[tuple[str, Stamp], ...]


def identify(source: Checkpoint) -> Identity:
    """Reads every file of the model once, at the speed of the disk; a file that this process has read before and that
    nobody touched since is not read again.

    Raises ValueError as files_beside does; OSError if a file cannot be read.
    """
    beside = files_beside(source.folder)
    others = [path for path in beside if path.suffix != ".py"]
    return Identity(_model(source, beside), _digest(source.folder, others), _stamps(source, beside))


def is_model(source: Checkpoint, identity: Identity) -> bool:
    """Whether a folder holds that very model: by its stamps where they are the same, else by reading it."""
    beside = files_beside(source.folder)
    return _stamps(source, beside) == identity.stamps or _model(source, beside) == identity.model


def _model(source: Checkpoint, beside: Iterable[Path]) -> str:
    config = text_digest(json.dumps(source.config, sort_keys=True))
    return text_digest(f"{config} {_digest(source.folder, _read_by_model(source, beside))}")


def _read_by_model(source: Checkpoint, beside: Iterable[Path]) -> list[Path]:
    return [shard.path for shard in source.shards.values()] + [path for path in beside if path.suffix == ".py"]


def _digest(folder: Path, paths: Iterable[Path]) -> str:
    return text_digest(json.dumps(sorted((p.relative_to(folder).as_posix(), file_digest(p)) for p in paths)))


def _stamps(source: Checkpoint, beside: Iterable[Path]) -> tuple[tuple[str, Stamp], ...]:
    paths = [source.folder / "config.json", *_read_by_model(source, beside)]
    return tuple((path.relative_to(source.folder).as_posix(), stamp(path)) for path in sorted(paths))
