"""The configs inside a composite config, from which a class of a part of the model may be built on its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def sub_configs(config: PreTrainedConfig) -> Iterator[tuple[tuple[str, ...], PreTrainedConfig]]:
    """Every config inside this one, at any depth, with the keys that lead to it."""
    for key in getattr(config, "sub_configs", {}):
        inner: Any = getattr(config, key, None)
        if hasattr(inner, "sub_configs"):
            yield (key,), inner
            yield from (((key, *keys), deeper) for keys, deeper in sub_configs(inner))


def configs_with_layers(model: PreTrainedModel, paths: Iterable[str]) -> list[tuple[tuple[str, ...], PreTrainedConfig]]:
    """Those inside the model's config from which a part that holds one of the modules at ``paths`` is built."""
    from transformers import PreTrainedModel  # not there yet when this is imported

    paths = list(paths)
    holders = [
        module.config
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and any(path.startswith(f"{name}.") for path in paths)
    ]
    kinds = {type(config) for config in holders}  # by type: some models build their parts from copies
    return [(keys, config) for keys, config in sub_configs(model.config) if type(config) in kinds]


def part_of_json(config: dict[str, Any], keys: Iterable[str]) -> dict[str, Any] | None:
    """The object in a config.json that these keys lead to; None if it is not written out there."""
    part: Any = config
    for key in keys:
        part = part.get(key) if isinstance(part, dict) else None
    return part if isinstance(part, dict) else None
