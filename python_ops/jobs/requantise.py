"""A factored checkpoint stored anew in fewer bits, without the dense model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from resmoe_kernels.factored import MATRICES, FactoredExperts
from resmoe_kernels.python_ops.jobs.assemble import carry_over, publish
from resmoe_kernels.python_ops.jobs.folder import check_place, is_done
from resmoe_kernels.python_ops.jobs.unfinished import Record, Unfinished
from resmoe_kernels.python_ops.models.checkpoint import Checkpoint
from resmoe_kernels.python_ops.models.hf_quantizer import (
    QUANT_METHOD,
    ResMoEConfig,
    check_complete,
    described_weights,
    layer_spec,
)
from resmoe_kernels.python_ops.models.identity import identify
from resmoe_kernels.python_ops.models.layer import PART_ROUTER
from resmoe_kernels.python_ops.models.placing import STORED_AS, described_leaves
from resmoe_kernels.python_ops.solvers.align import relative, squared_norm
from resmoe_kernels.python_ops.solvers.rounding import Storage, check_requantised, requantised
from resmoe_kernels.python_ops.storage.digests import check_files
from resmoe_kernels.python_ops.storage.files import write_tensors


def requantise(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    bits: int | None = None,
    base_bits: int | None = None,
    residual_bits: int | None = None,
    group: int = 128,
    progress: bool = True,
) -> Path:
    """Stores the layers of a factored checkpoint in fewer bits.

    model: folder of a factored checkpoint, as ``compress`` and ``save_pretrained`` write it
    out: folder to make, in a folder that exists. It appears, whole, when the job is done; until then the work is in
        ``.<out>.unfinished`` beside it, and the same call goes on where a killed one stopped, to the same bytes
    bits, base_bits, residual_bits, group: see Storage. What has these bits and this group already stays as it is

    Every tensor by itself is rounded; of a base and a full residual, the residual takes up what the base loses. Low
    ranks and pruned residuals cannot: compress from the dense model for the least error. A layer's report keeps
    the error that compression had, and adds ``requantise_error``, ||W' - W''||_F / ||W'||_F to the layer as it was.
    Memory: one layer as it is, once more as it becomes, and 64 MiB of what is being rounded.
    Returns ``out``. Raises ValueError naming the layer and tensor that has fewer bits than asked for, and what else is
    wrong with the input, before anything is written; nothing is left behind then.
    """
    storage = Storage(bits, base_bits, residual_bits, group)
    if not storage.codes:
        raise ValueError("bits: must be 8, 4, 3 or 2, of all or of base or residual, got none")
    source, target = Checkpoint(model), Path(out).resolve()
    stored = source.config.get("quantization_config") or {}
    if not isinstance(stored, dict) or stored.get("quant_method") != QUANT_METHOD or "layers" not in stored:
        raise ValueError(f"{source.folder}: is not a factored checkpoint; requantise stores one anew, see compress")
    config = ResMoEConfig(**stored)
    check_complete(config.layers, source.shard_of)
    check_place(source, target)
    check_files([shard.path for shard in source.shards.values()], config.digests)
    identity = identify(source)
    job = {
        "source": identity.model,
        "beside": identity.beside,
        "settings": {**config.settings, "requantised": storage.recorded()},
    }
    unfinished = Unfinished(target.with_name(f".{target.name}.unfinished"), job)
    if is_done(target, job) and not unfinished.folder.exists():
        return Path(out)
    names = {path: _names_of(source, path, spec) for path, spec in config.layers.items()}
    for path, spec in config.layers.items():
        try:
            check_requantised(described_weights(spec), storage)
        except ValueError as error:
            raise ValueError(f"{path}.{error}") from None
    files = [f"requantised-{i:05d}.safetensors" for i in range(len(names))]
    consumed = {name for of_layer in names.values() for name in of_layer.values()}
    if taken := sorted(file for file in files if set(getattr(source.shards.get(file), "header", ())) - consumed):
        raise ValueError(f"{source.folder / taken[0]}: has the name of a file to be written; rename the shard")

    with unfinished.held():
        if is_done(target, job):  # another process was faster, or a killed run left its folder
            return Path(out)
        carry_over(source, consumed, unfinished, progress)
        layers = zip(config.layers.items(), files, strict=True)
        for (path, spec), file in tqdm(
            layers, desc="requantising", total=len(files), unit="layer", disable=not progress
        ):
            if unfinished.record(file).read() is None:
                _store(source, path, spec, names[path], storage, unfinished.record(file))
        publish(source, [unfinished.record(file) for file in files], _parts(source.config), unfinished, target)
    return Path(out)


def _names_of(source: Checkpoint, path: str, spec: dict[str, Any]) -> dict[str, str]:
    """Field of the layer -> name in the shards."""
    leaves = described_leaves(spec)
    for stored in (spec.get(STORED_AS), path):
        if stored is not None and all(f"{stored}.{leaf}" in source.shard_of for leaf in leaves):
            return {leaf: f"{stored}.{leaf}" for leaf in leaves}
    raise ValueError(
        f"{path}: its tensors have other names in the shards; load the checkpoint and save it with this package first"
    )


def _store(
    source: Checkpoint,
    path: str,
    spec: dict[str, Any],
    names: dict[str, str],
    storage: Storage,
    record: Record,
) -> None:
    tensors = {field: source.load(name) for field, name in names.items()}
    part_router = tensors.pop(PART_ROUTER, None)
    before = FactoredExperts.from_tensors(tensors, **spec["sizes"])
    try:
        before.check_values()
        after = requantised(before, storage)
    except ValueError as error:
        raise ValueError(f"{path}.{error}") from None
    report = {**spec.get("report", {}), "requantise_error": _error(before, after), "bytes_now": after.nbytes()}
    written: dict[str, Tensor] = after.tensors()
    described = layer_spec(after, part_router=part_router)
    if part_router is not None:
        written[PART_ROUTER] = part_router
        report["bytes_now"] += part_router.numel() * part_router.element_size()
    kept = {key: value for key, value in spec.items() if key not in (*described, "report")}
    stored_as = names[next(iter(names))].rpartition(".")[0]
    digest = write_tensors({f"{stored_as}.{name}": tensor for name, tensor in written.items()}, record.file)
    record.write(digest, path=path, **kept, **described, report=report)


def _error(before: FactoredExperts, after: FactoredExperts) -> float:
    lost = whole = 0.0
    for e in range(before.num_experts):
        for matrix in MATRICES:
            weight = before.materialize_matrix(matrix, e, torch.float32)
            whole += squared_norm(weight)
            lost += squared_norm(weight.sub_(after.materialize_matrix(matrix, e, torch.float32)))
    return relative(lost, whole)


def _parts(config: dict[str, Any], keys: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The parts of a config that say of themselves that they belong to a factored checkpoint, but for the whole."""
    found = []
    for key, value in config.items():
        if isinstance(value, dict) and key != "quantization_config":
            if (value.get("quantization_config") or {}).get("quant_method") == QUANT_METHOD:
                found.append((*keys, key))
            found += _parts(value, (*keys, key))
    return found
