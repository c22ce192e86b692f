"""The folder where a factored checkpoint grows, beside its place: found again by the same job, renamed at the end."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from resmoe_kernels.python_ops.models.checkpoint import (
    INDEX,
    SINGLE,
    Checkpoint,
    Shard,
    check_shard_finite,
    copy_file,
    part_name,
    read_config,
    read_shard,
    write_json,
    write_subset,
)
from resmoe_kernels.python_ops.models.hf_quantizer import PART, QUANT_METHOD, format_version_of
from resmoe_kernels.python_ops.models.sub_configs import part_of_json

_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}


def fingerprint_of(source: Checkpoint) -> str:
    """Tells checkpoints apart without reading all of them: config, headers, both ends of every shard."""
    digest = hashlib.sha256(json.dumps(source.config, sort_keys=True).encode())
    for shard in source.shards.values():
        with shard.path.open("rb") as file:
            digest.update(file.read(shard.data_start + (1 << 16)))
            file.seek(-min(1 << 16, shard.path.stat().st_size), os.SEEK_END)
            digest.update(file.read())
    return digest.hexdigest()


def check_place(source: Checkpoint, target: Path) -> None:
    if target.is_relative_to(source.folder.resolve()):
        raise ValueError(f"{target}: lies in the folder of the model to compress; choose a folder outside of it")
    if target == Path.cwd() or target.is_mount():
        raise ValueError(f"{target}: is the current folder or a mount, which cannot be replaced; choose a folder in it")
    if not target.parent.is_dir():
        raise ValueError(f"{target.parent}: no such folder to make {target.name} in; make it first")


def is_done(target: Path, job: dict[str, Any]) -> bool:
    """Whether ``target`` is this job's finished result.

    Raises ValueError if it is anything else, unless absent or empty.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    if not target.is_dir():
        raise ValueError(f"{target}: exists and is not a folder; choose another name")
    quantization: dict[str, Any] = {}
    if (target / "config.json").is_file():
        quantization = read_config(target).get("quantization_config") or {}
    if quantization.get("quant_method") != QUANT_METHOD:
        raise ValueError(f"{target}: exists and is not a checkpoint made by this command; choose another folder")
    for key, what in (("source", "of another model"), ("settings", "made with other settings")):
        if quantization.get(key) != job[key]:
            raise ValueError(f"{target}: holds a factored checkpoint {what}; choose another folder")
    return True


_LOCK, _JOB = "lock", "job.json"  # of the unfinished folder: the first to come and the last to go
FOLDERS = ("checkpoint", "layers", "measured")


def _is_empty(unfinished: Path) -> bool:
    """Whether it holds nothing but what is there before job.json comes or after it goes."""
    return unfinished.is_dir() and set(unfinished.iterdir()) <= {unfinished / _LOCK, part_name(unfinished / _JOB)}


@contextmanager
def work_in(unfinished: Path, job: dict[str, Any]) -> Iterator[None]:
    """Holds the folder where the checkpoint grows: made, or found again if it is this very job's.

    Removed at the end, and when the input turns out to be bad; left in place when the process is killed.
    """
    described = unfinished / _JOB
    if unfinished.exists() and not described.is_file() and not _is_empty(unfinished):
        raise ValueError(f"{unfinished}: the work is done there, and it holds something else; move it away")
    unfinished.mkdir(exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(FileLock(unfinished / _LOCK).acquire(blocking=False))
        except Timeout:
            raise ValueError(f"{unfinished}: another process is compressing into it; wait for it to end") from None
        if not described.is_file():
            write_json(job, described)
        elif json.loads(described.read_text()) != job:
            raise ValueError(
                f"{unfinished}: holds an unfinished job with other settings or another model; "
                "run that command again to finish it, or remove the folder"
            )
        try:
            yield
        except ValueError:
            _remove(unfinished)
            raise
        _remove(unfinished)


def _remove(unfinished: Path) -> None:
    # In this order, so that, killed anywhere, what is left says whose it is and tensors have their spec.
    for name in FOLDERS:
        if (unfinished / name).is_dir():
            shutil.rmtree(unfinished / name)
    for path in (unfinished / _JOB, part_name(unfinished / _JOB), unfinished / _LOCK):
        path.unlink(missing_ok=True)
    with suppress(OSError):  # a process that came for the lock just now; it removes the folder in turn
        unfinished.rmdir()


# ---- what is in it


def _rest_name(shard: Shard) -> str:
    # transformers would take a file of the single-file name for the whole model.
    return "model-00001-of-00001.safetensors" if shard.path.name == SINGLE else shard.path.name


def carry_over(
    source: Checkpoint,
    consumed: set[str],
    folder: Path,
    progress: bool,
    checked: Callable[[str], bool] = lambda _: False,
) -> None:
    """Everything that is not a compressed expert: other tensors, tokenizer, generation config, code.

    checked: of which tensors, by name, NaN and Inf are refused: buffers of clip limits and masks hold them rightly
    """
    for shard in tqdm(source.shards.values(), desc="copying the rest", unit="shard", disable=not progress):
        rest = [name for name in shard.header if name not in consumed]
        target = folder / _rest_name(shard)
        if not rest or target.is_file():
            continue
        check_shard_finite(shard, filter(checked, rest))
        if len(rest) == len(shard.header):
            copy_file(shard.path, target)
        else:
            write_subset(shard, rest, target)
    for path in sorted(source.folder.rglob("*")):
        relative = path.relative_to(source.folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        ours = relative.as_posix() in ("config.json", INDEX)  # written by finish
        if path.is_file() and not hidden and not ours and path.suffix not in _WEIGHT_SUFFIXES:
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            copy_file(path, folder / relative)


def finish(
    source: Checkpoint, job: dict[str, Any], specs: list[Path], parts: list[tuple[str, ...]], folder: Path
) -> None:
    """Index and config, from what is on disk: a resumed job has not seen the layers of its first run.

    parts: of the config, from which classes with experts may be built
    """
    for stray in folder.glob(".*"):  # parts of files, ours and safetensors', from when the job was killed
        stray.unlink()
    weight_map, total, layers = {}, 0, {}
    for path in sorted(folder.glob("*.safetensors")):
        shard = read_shard(path)
        weight_map.update(dict.fromkeys(shard.header, path.name))
        total += sum(stop - start for start, stop in (t["data_offsets"] for t in shard.header.values()))
    for path in specs:
        spec = json.loads(path.read_text())
        layers[spec.pop("path")] = spec
    write_json({"metadata": {"total_size": total}, "weight_map": weight_map}, folder / INDEX)
    quantization = {
        "quant_method": QUANT_METHOD,
        "format_version": format_version_of(layers),
        **job,
        "layers": layers,
    }
    # The second key makes a load without this package fail, see hf_quantizer.
    config = copy.deepcopy(source.config)
    for part in [p for keys in parts if (p := part_of_json(config, keys)) is not None]:
        part.update(quantization_config=PART, experts_implementation=QUANT_METHOD)
    config.update(quantization_config=quantization, experts_implementation=QUANT_METHOD)
    write_json(config, folder / "config.json")
