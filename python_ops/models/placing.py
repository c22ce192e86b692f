"""Where the factored tensors of a checkpoint go in a class of model, and that they get there, by whole names.

A checkpoint is loaded by more classes than the one it was made from: with another head, without one, or the text part
of a multimodal model. Which module of a class a tensor belongs to is asked of transformers' own renamings; the way
there is then held open by two renamings of ours around them, because theirs are written for the hub's names and move
a name that is in place already a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from resmoe_kernels.factored import TENSOR_NAMES
from resmoe_kernels.python_ops.models.layer import PART_ROUTER, FactoredExpertsLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# In a layer's spec, where it is not the layer's path: what the names of its tensors begin with in the shards, and what
# those of its dense tensors began with in the checkpoint that was compressed.
STORED_AS, KNOWN_AS = "stored_as", "known_as"
_UNMISTAKABLE = {*TENSOR_NAMES, PART_ROUTER} - {"group"}  # last words of names no dense model has


@dataclass(frozen=True)
class Place:
    """A layer of a checkpoint. path: where it is in the class that loads it, None where that has no such part;
    stored: what the names of its tensors begin with in the shards;  leaves: what they end with;  spec: of the config"""

    path: str | None
    stored: str
    leaves: tuple[str, ...]
    spec: dict[str, Any]

    def names(self) -> dict[str, str]:
        """Name in the shards -> name in the model."""
        return {f"{self.stored}.{leaf}": f"{self.path}.{leaf}" for leaf in self.leaves}


def find_places(
    model: PreTrainedModel, layers: Mapping[str, dict[str, Any]], names: Iterable[str], paths: Collection[str]
) -> list[Place]:
    """The place in ``model`` of every layer that a config describes.

    layers: by their path in the class that was saved;  names: of all tensors in the shards;  paths: of the modules of
    the model, still dense, that a layer may take the place of

    Raises ValueError naming the tensor unless config and shards hold the same factored tensors, each once.
    """
    names = set(names)
    rename = _renaming_of(model)
    renamed = {name: rename(name) for name in sorted(names, key=dot_natural_key)}  # guards of renamings go by order
    origin = {target: name for name, target in renamed.items()}
    places: list[Place] = []
    taken: dict[str, str] = {}
    for path, spec in layers.items():
        leaves = described_leaves(spec)
        stored = _stored_prefix(path, spec, leaves, names, origin, model.base_model_prefix)
        first = f".{leaves[0]}"
        targets = (rename(spec[KNOWN_AS] + first) if KNOWN_AS in spec else None, renamed[stored + first])
        candidates = (*(t.removesuffix(first) for t in targets if t is not None), path, stored)
        here = next((p for c in candidates for p in _with_and_without(c, model.base_model_prefix) if p in paths), None)
        if here is not None and here in taken:
            raise ValueError(f"{path}: config.json describes this layer and {taken[here]}, which are one in {here}")
        if here is not None:
            taken[here] = path
        places.append(Place(here, stored, leaves, spec))
    check_accounted(names, (name for place in places for name in place.names()))
    return places


def described_leaves(spec: Mapping[str, Any]) -> tuple[str, ...]:
    """Last words of the names of a layer's tensors."""
    return (*spec["tensors"], *((PART_ROUTER,) if PART_ROUTER in spec else ()))


def check_accounted(names: Collection[str], described: Iterable[str]) -> None:
    """Raises ValueError naming the first factored tensor of which only the config or only the shards know."""
    described = set(described)
    if lacking := sorted(described.difference(names)):
        raise ValueError(
            f"{lacking[0]}: config.json describes this factored tensor, the shards lack it: compress again"
        )
    unknown = sorted(n for n in names if n.rpartition(".")[2] in _UNMISTAKABLE and n not in described)
    if unknown:
        raise ValueError(
            f"{unknown[0]}: the shards hold this factored tensor, config.json does not describe it: compress again"
        )


def _stored_prefix(
    path: str,
    spec: Mapping[str, Any],
    leaves: tuple[str, ...],
    names: Collection[str],
    origin: Mapping[str, str],
    prefix: str,
) -> str:
    """What the names of a layer's tensors begin with in the shards. Raises ValueError if none of them is there."""
    for known in (spec.get(STORED_AS), path):
        if known is not None and any(f"{known}.{leaf}" in names for leaf in leaves):
            return known
    for here in _with_and_without(path, prefix):  # saved by save_pretrained, under the hub's names
        for leaf in leaves:
            name = origin.get(f"{here}.{leaf}", "")
            if name.endswith(f".{leaf}"):
                return name.removesuffix(f".{leaf}")
    raise ValueError(f"{path}: config.json describes factored experts there, the shards hold none: compress again")


def _with_and_without(path: str, prefix: str) -> tuple[str, ...]:
    return (path, f"{prefix}.{path}", path.removeprefix(f"{prefix}."))


def _transforms_of(model: PreTrainedModel) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    from transformers.conversion_mapping import get_model_conversion_mapping  # not there yet when this is imported

    return _split(get_model_conversion_mapping(model))


def _renaming_of(model: PreTrainedModel) -> Callable[[str], str]:
    renamings, converters = _transforms_of(model)
    state = model.state_dict()
    return lambda name: rename_source_key(name, renamings, converters, model.base_model_prefix, state)[0]


def _split(transforms: Iterable[WeightTransform]) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    transforms = list(transforms)
    return (
        [t for t in transforms if isinstance(t, WeightRenaming)],
        [t for t in transforms if isinstance(t, WeightConverter)],
    )


# ---- on the way


def held_in_place(
    transforms: list[WeightTransform], places: Iterable[Place], model: PreTrainedModel
) -> list[WeightTransform]:
    """transformers' renamings for a load, with every factored tensor going to its place whatever they say.

    Raises ValueError naming a tensor that would go elsewhere for all that.
    """
    targets = {name: target for place in places if place.path is not None for name, target in place.names().items()}
    if not targets:
        return transforms
    marks = {name: f"\0{number}\0" for number, name in enumerate(targets)}
    take = _Renamed(marks)
    give = _Renamed({marks[name]: target for name, target in targets.items()}, search=True)
    held: list[WeightTransform] = [take, *transforms, give]
    renamings, converters = _split(held)
    state = model.state_dict()
    for name, target in targets.items():
        found, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if found != target or pattern is not None:
            raise ValueError(
                f"{name}: belongs at {target} in {type(model).__name__}, transformers brings it to {found}"
            )
    return held


class _Renamed(WeightRenaming):
    """Renames whole names by a table. search: the key of the table is looked for within the name, all of which goes:
    other renamings may have put something before it."""

    __slots__ = ("search", "table")

    def __init__(self, table: Mapping[str, str], search: bool = False) -> None:
        super().__init__(source_patterns="resmoe", target_patterns="resmoe")  # which are not used
        self.table, self.search = dict(table), search

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        key = source_key
        if self.search and (start := source_key.find("\0")) >= 0:
            key = source_key[start : source_key.index("\0", start + 1) + 1]
        if key not in self.table:
            return source_key, None
        self._was_used = True
        return self.table[key], key

    def reverse_transform(self) -> _Renamed:
        return _Renamed({new: old for old, new in self.table.items()}, search=not self.search)


def stored_prefix(model: PreTrainedModel, path: str, leaf: str) -> str:
    """What the names of a layer's tensors begin with when ``save_pretrained`` writes them."""
    name, prefix = f"{path}.{leaf}", model.base_model_prefix
    (stored,) = revert_weight_conversion(model, {name: torch.empty(0, device="meta")})
    back, _ = rename_source_key(stored, *_transforms_of(model))
    # Renamings that lose something cannot be reversed.
    there_and_back = stored.endswith(f".{leaf}") and back in _with_and_without(name, prefix)
    return stored.removesuffix(f".{leaf}") if there_and_back else path


# ---- there


def check_placed(model: PreTrainedModel, paths: Iterable[str]) -> None:
    """Raises ValueError naming the first parameter of these modules that no tensor of the checkpoint was brought to.

    The loader marks what it has brought; what is offloaded stays on meta until it is used.
    """
    for path in paths:
        module = model.get_submodule(path)
        for name, parameter in module.named_parameters():
            if not parameter.is_meta and not getattr(parameter, "_is_hf_initialized", False):
                kind = "factored" if isinstance(module, FactoredExpertsLayer) else "dense"
                raise ValueError(
                    f"{path}.{name}: {type(model).__name__} has {kind} experts there and transformers brought nothing "
                    "from the checkpoint to them; load the class it was saved from, or compress again"
                )


def names_in(files: Iterable[str | Path]) -> Iterator[str]:
    """Names of all tensors in safetensors files."""
    for path in files:
        with safe_open(path, framework="pt") as file:
            yield from file.keys()


def unplaced_experts(modules: Iterable[str], places: Iterable[Place]) -> list[str]:
    """Paths of the modules that no factored layer took the place of."""
    taken = {place.path for place in places}
    return [path for path in modules if path not in taken]
