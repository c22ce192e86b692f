"""Safetensors checkpoints, read one tensor at a time.

Reading goes through transformers' own table of weight conversions, so that what is on disk (one matrix per
expert, or stacked) reaches a module's parameters exactly as ``from_pretrained`` would bring it there.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from resmoe_kernels.factored import TENSOR_NAMES
from resmoe_kernels.python_ops.storage.dense_view import dense_views
from resmoe_kernels.python_ops.storage.model_files import read_config, weight_files
from resmoe_kernels.python_ops.storage.quantised import quantisation_of
from resmoe_kernels.python_ops.storage.shards import Shard, read_shard, same_tensor

_FINITE_CHUNK = 4 << 20  # elements
_EXPERT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_EXPERT_DTYPES_ON_DISK = ("F16", "BF16", "F32", "F64")


class Checkpoint:
    """A Hugging Face model folder with safetensors weights. Those that are quantised by a method of
    storage/quantised.py are read, and named, as the dense ones that they stand for.

    Raises ValueError naming what is wrong: no such folder, no config.json or index that can be read, no
    safetensors (pickle weights are never read), a missing or truncated shard, a shard that lacks a tensor the
    index promises.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder}: no such model folder (download a hub model first)")
        self.config = read_config(self.folder)
        paths, promised = weight_files(self.folder, self.config)
        self.shards = {path.name: read_shard(path) for path in paths}
        self.quantised = quantisation_of(self.config)  # how the weights are stored, None where they are dense
        for name, file in promised.items():
            if name not in self.shards[file].header:
                raise ValueError(f"{self.folder / file}: lacks {name}, which the index places there")
        self.shard_of: dict[str, Shard] = {}
        for shard in self.shards.values():
            for name in shard.header:
                if name in self.shard_of and not same_tensor(self.shard_of[name], name, shard, name):
                    raise ValueError(
                        f"{name}: is in {self.shard_of[name].path.name} and in {shard.path.name}, with other contents, "
                        "and which one counts would depend on the order of files; remove one"
                    )
                self.shard_of[name] = shard
        self.shards = dense_views(self.shards, self.config)
        self.shard_of = {name: shard for shard in self.shards.values() for name in shard.header}

    def load(self, name: str) -> Tensor:
        """One tensor, from disk; of a quantised one, the dense."""
        return next(tensor for _, tensor in self.shard_of[name].tensors([name]))


class ModuleReader:
    """Brings a module's parameters from disk, by transformers' own conversions for that model.

    model: the dense model, built on meta;  checkpoint: where its weights are
    Raises ValueError naming the tensor if one that is taken as it is has another shape than the model's.
    """

    def __init__(self, checkpoint: Checkpoint, model: nn.Module) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        mapping = get_model_conversion_mapping(model)  # type: ignore[arg-type]
        renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        converters = [m for m in mapping if isinstance(m, WeightConverter)]
        by_pattern = {p: c for c in converters for p in c.source_patterns}
        prefix = model.base_model_prefix
        state = model.state_dict()
        self.checkpoint, self.model, self._state = checkpoint, model, state
        # parameter -> (its converter or None, [(name on disk, converter's pattern)]); of a converter that makes several
        # parameters out of the same tensors, the first
        self.sources: dict[str, tuple[WeightConverter | None, list[tuple[str, str]]]] = {}
        for name in sorted(checkpoint.shard_of, key=dot_natural_key):  # as the loader does: some renamings go by order
            target, pattern = rename_source_key(name, renamings, converters, prefix, state)  # type: ignore[arg-type]
            if target not in state and name in state:
                target, pattern = rename_source_key(name, [], [], prefix, state)  # type: ignore[arg-type]
            converter = None if pattern is None else by_pattern[pattern]
            self.sources.setdefault(target, (converter, []))[1].append((name, pattern or name))
            if converter is None and target in state:
                self._check_shape(name, target, checkpoint.shard_of[name].header[name]["shape"])
        model._weight_conversions = [m for m in mapping if m.was_used()]  # type: ignore[assignment]  # as after a load
        # parameter -> the one under whose name ``sources`` has it
        self._listed = {made: target for target in list(self.sources) for made in self._made_with(target)}
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        self._tied = {
            lacking: there
            for pair in tied.items()
            for lacking, there in (pair, pair[::-1])
            if lacking not in self._listed and there in self._listed
        }

    def _made_with(self, target: str) -> list[str]:
        """The parameters that come of what ``sources`` has of ``target``, itself included."""
        converter, sources = self.sources[target]
        several = converter is not None and (len(converter.target_patterns) > 1 or "*" in converter.target_patterns[0])
        if not several or target not in self._state:
            return [target]
        shapes = [self.checkpoint.shard_of[name].header[name]["shape"] for name, _ in sources]
        made = self._converted(target, [torch.empty(shape, device="meta") for shape in shapes])
        return list(made)

    def names_on_disk(self, path: str, parameters: Iterable[str]) -> list[str]:
        """Names of the tensors that make up a module's parameters. Raises ValueError if one has none, or one of a
        dtype that is not read."""
        names = []
        for parameter in parameters:
            target = f"{path}.{parameter}"
            listed = self._listed.get(self._tied.get(target, target))
            if listed is None:
                raise ValueError(f"{self.checkpoint.folder}: no tensor in the checkpoint makes {target}")
            names += [name for name, _ in self.sources[listed][1]]
        for name in names:
            shard = self.checkpoint.shard_of[name]
            if shard.header[name]["dtype"] not in _EXPERT_DTYPES_ON_DISK:  # opened only then: there may be 50,000 names
                with safe_open(shard.path, framework="pt") as file:
                    _check_dtype(name, file.get_slice(name)[:0])
        return names

    def path_on_disk(self, path: str) -> str:
        """What the names of a module's tensors begin with in the checkpoint, up to where the module's own begin."""
        from resmoe_kernels.python_ops.models.placing import stored_prefix

        return stored_prefix(self.model, path, TENSOR_NAMES[0])  # type: ignore[arg-type]

    def parameters_made_of(self, names: Collection[str]) -> list[str]:
        """The parameters, ties included, that tensors of these names are needed for."""
        made = [p for p, listed in self._listed.items() if any(n in names for n, _ in self.sources[listed][1])]
        return [*made, *(tied for tied, there in self._tied.items() if there in set(made))]

    def read(self, path: str, parameters: Iterable[str]) -> dict[str, Tensor]:
        """A module's parameters and buffers by name; the path of the model itself is empty.

        Raises ValueError naming the tensor if a parameter holds NaN or Inf or is quantised, or if one has another
        shape than config.json says.
        """
        return {parameter: self._read(f"{path}.{parameter}".removeprefix(".")) for parameter in parameters}

    def _read(self, target: str) -> Tensor:
        target = self._tied.get(target, target)
        if target not in self._listed:
            raise ValueError(f"{self.checkpoint.folder}: no tensor in the checkpoint makes {target}")
        listed = self._listed[target]
        converter, sources = self.sources[listed]
        if converter is None:
            return self._load(sources[0][0], target)  # of two tensors of one parameter the loader takes the first
        tensors = [self._load(name, target) for name, _ in sources]
        value = self._converted(listed, tensors)[target]
        tensor = value[0] if isinstance(value, list) else value
        self._check_shape(target, target, tensor.shape)
        return tensor

    def _load(self, name: str, target: str) -> Tensor:
        tensor = self.checkpoint.load(name)
        if self._state[target].is_floating_point() and tensor.dtype not in _EXPERT_DTYPES:
            _check_dtype(name, tensor)
        if self.is_parameter(target):
            check_finite(name, tensor)
        return tensor

    def is_parameter(self, target: str) -> bool:
        """Whether it is a parameter of the model and no buffer, which may hold anything."""
        return target in self._parameters

    def makes_parameters(self, name: str) -> bool:
        """Whether a tensor of the checkpoint goes into a parameter of the model."""
        return name in self._names_of_parameters

    @cached_property
    def _names_of_parameters(self) -> set[str]:
        made = {listed for target, listed in self._listed.items() if self.is_parameter(target)}
        return {name for listed in made for name, _ in self.sources[listed][1]}

    @cached_property
    def _parameters(self) -> set[str]:
        return {name for name, _ in self.model.named_parameters(remove_duplicate=False)}

    def _converted(self, listed: str, tensors: list[Tensor]) -> dict[str, Any]:
        """What the converter of ``listed`` makes of its tensors, given in the order of ``sources``."""
        converter, sources = self.sources[listed]
        converter = deepcopy(converter)
        assert converter is not None
        for (name, pattern), tensor in zip(sources, tensors, strict=True):
            converter.add_tensor(listed, name, pattern, tensor)  # type: ignore[arg-type]
        try:
            return converter.convert(listed, model=self.model, config=self.model.config)  # type: ignore[arg-type]
        except (RuntimeError, ValueError) as error:  # from torch.stack or torch.cat
            raise ValueError(f"{listed}: its tensors in the checkpoint do not fit together ({error})") from None

    def _check_shape(self, name: str, target: str, shape: Iterable[int]) -> None:
        wanted = tuple(self._state[target].shape)
        if tuple(shape) != wanted:
            raise ValueError(f"{name}: config.json wants {wanted}, the checkpoint has {tuple(shape)}")


def _check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _EXPERT_DTYPES:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{name}: must be float16, bfloat16, float32 or float64, got {kind}; dequantise it first")


def check_shard_finite(shard: Shard, names: Iterable[str]) -> None:
    """Raises ValueError naming the tensor if one of them holds NaN or Inf; one tensor in memory at a time.

    Only of the dtypes that a model computes in: what others mean is for those who read them.
    """
    for name, tensor in shard.tensors(names):
        if tensor.dtype in _EXPERT_DTYPES:
            check_finite(name, tensor)


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises ValueError naming the tensor and the first bad place if it holds NaN or Inf."""
    if not tensor.is_floating_point():
        return
    # A sum is finite unless an entry is not (or float64 overflows). In pieces, because torch makes a float64 copy of
    # what it sums: of an embedding of 32000 x 4096 that is 1 GB.
    if all(torch.isfinite(piece.sum(dtype=torch.float64)) for piece in tensor.reshape(-1).split(_FINITE_CHUNK)):
        return
    bad = (~torch.isfinite(tensor)).nonzero()
    if len(bad):
        place = tuple(bad[0].tolist())
        raise ValueError(f"{name}: all weights must be finite, got {tensor[place].item()} at {place}")
