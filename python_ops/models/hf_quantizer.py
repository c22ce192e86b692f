"""The plug-in by which transformers loads and saves factored checkpoints (``quant_method: "resmoe"``).

``config.json`` of such a checkpoint holds, for every compressed layer, the names, shapes and dtypes of its tensors. It
also asks for ``experts_implementation: "resmoe"``, which transformers never knows: a model is built only where this
quantizer has withdrawn the request. Without it transformers would skip the unknown quantisation with a warning and
return randomly initialised experts; it still does where the package is not imported and the caller passes an
``experts_implementation`` of its own. Both stand in every part of the config from which a class with experts may be
built alone, such as the text model of a multimodal one; there the quantisation says only where to read on.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from resmoe_kernels.factored import MATRICES, PARTS, TENSOR_NAMES, FactoredExperts
from resmoe_kernels.python_ops.models.layer import PART_ROUTER, FactoredExpertsLayer
from resmoe_kernels.python_ops.models.layouts import experts_or_ffns
from resmoe_kernels.python_ops.models.placing import (
    STORED_AS,
    check_placed,
    find_places,
    held_in_place,
    names_in,
    stored_prefix,
    unplaced_experts,
)
from resmoe_kernels.python_ops.models.routing import RouterChange
from resmoe_kernels.python_ops.models.saving import say_what_is_saved
from resmoe_kernels.python_ops.models.specs import check_digests, check_layers, described_dtype, mapping
from resmoe_kernels.python_ops.models.sub_configs import configs_with_layers, sub_configs
from resmoe_kernels.python_ops.storage.digests import check_files
from resmoe_kernels.python_ops.storage.model_files import read_config

QUANT_METHOD = "resmoe"
FORMAT_VERSION = 2  # 1: floats alone, no residual without a mask


@register_quantization_config(QUANT_METHOD)
class ResMoEConfig(QuantizationConfigMixin):
    """``quantization_config`` of a factored checkpoint.

    layers: module path -> {"sizes": {...}, "tensors": {name: {"dtype": ..., "shape": [...]}}, "report": {...}} and,
        where the router changes, "router": {...}, see RouterChange
    settings: how it was compressed;  source: fingerprint of the dense checkpoint, None if compressed in memory
    layers_in: of a part's config, the file of the folder whose own quantization_config has the layers
    format_version: refused with ValueError where newer than this package's. What is written is the least that can hold
        the layers, see format_version_of, so that a package that knows only that one reads them
    digests: see specs.digests_of; once made, those of the files of weights, by name, held against what they hold when
        they are loaded. A folder without them is loaded as it is

    Raises ValueError naming the place for a value that is not what it must be, in whatever way the file was damaged.
    """

    def __init__(
        self,
        layers: dict[str, dict[str, Any]] | None = None,
        settings: dict[str, Any] | None = None,
        source: str | None = None,
        format_version: int = FORMAT_VERSION,
        layers_in: str | None = None,
        digests: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        if unknown := sorted(set(others) - {"quant_method", "beside"}):
            raise ValueError(f"quantization_config: unknown name {unknown[0]!r}; damaged, or of another version")
        if isinstance(format_version, bool) or not isinstance(format_version, int) or format_version < 1:
            raise ValueError(f"format_version: must be a whole number from 1 up, got {format_version!r}")
        if format_version > FORMAT_VERSION:
            raise ValueError(
                f"this checkpoint has resmoe format_version {format_version}, newer than the {FORMAT_VERSION} "
                "this resmoe_kernels reads: upgrade resmoe_kernels"
            )
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.settings = mapping(settings or {}, "settings")
        self.source = source
        self.layers = mapping(layers or {}, "layers")
        _check(self.layers)
        self.digests = {} if digests is None else check_digests(self.layers, digests)
        self.format_version = format_version_of(self.layers)
        if layers_in is not None:
            self.layers_in = layers_in

    def to_dict(self) -> dict[str, Any]:
        # Those of the files that were loaded: save_pretrained writes others.
        return {key: value for key, value in super().to_dict().items() if key != "digests"}


# What stands in a part's config beside ``experts_implementation``.
PART = {"quant_method": QUANT_METHOD, "format_version": 1, "layers_in": "config.json"}


@register_quantizer(QUANT_METHOD)
class ResMoEQuantizer(HfQuantizer):
    """Replaces the experts modules named in the config by empty factored layers, which the loader then fills."""

    requires_calibration = True  # compression happens offline; loading a dense model through this is refused

    def update_attn_implementation(self, config):
        # Called before a model is built, the only place that is: see the head of this file.
        for part in (config, *(part for _, part in sub_configs(config))):
            if part._experts_implementation == QUANT_METHOD:
                part._experts_implementation = None
        return config

    def _process_model_before_weight_loading(self, model, **kwargs):
        files = kwargs.get("checkpoint_files") or []
        if hasattr(self.quantization_config, "layers_in"):
            self.quantization_config = _config_of_the_whole(files)
        layers = self.quantization_config.layers
        check_files(files, self.quantization_config.digests)
        modules = {experts.path: experts for experts in experts_or_ffns(model)}
        names = list(names_in(files))
        check_complete(layers, names)
        self._places = find_places(model, layers, names, modules)
        self._dense = unplaced_experts(modules, self._places)
        self._model, self._files = model, files
        self._stand_ins = []
        for place in self._places:
            if place.path is None:  # of a part that this class does not have
                continue
            experts = modules[place.path]
            weights = described_weights(place.spec, model.dtype)
            layer = experts.install(model, weights, *described_routing(place.spec, model.dtype))
            self._stand_ins.append((layer, _stand_in(layer, experts.parameter_names)))
        self.quantization_config.layers = {place.path: place.spec for place in self._places if place.path is not None}
        return model

    def update_weight_conversions(self, weight_conversions, model=None):  # transformers 5.20 gives no model
        return held_in_place(weight_conversions, self._places, self._model)

    def _process_model_after_weight_loading(self, model, **kwargs):
        del self._model
        for layer, names in self._stand_ins:
            for name in names:
                del layer.__dict__[name]
        check_placed(model, [*self.quantization_config.layers, *self._dense])
        stored = {place.path: place.stored for place in self._places}
        for path, spec in self.quantization_config.layers.items():
            layer = model.get_submodule(path)
            layer.requires_grad_(False)  # the loader makes every floating-point parameter trainable
            # The dtypes are those of this load, which a save must record.
            spec |= layer_spec(layer.form, layer.router_change, layer.part_router)
            spec[STORED_AS] = stored[path]
            try:
                if any(p.is_meta for p in layer.parameters()):  # offloaded by device_map, and read at every call
                    stored_weights(spec, stored[path], self._files).check_values()
                elif not layer.pack():  # which checks the same
                    layer.weights.check_values()
            except ValueError as error:
                raise ValueError(f"{path}.{error}") from None
        mark_as_factored(model, self)
        return model

    def is_serializable(self, *args, **kwargs):
        return True

    @property
    def is_trainable(self):
        return False

    @property
    def is_compileable(self):
        return True


def format_version_of(layers: dict[str, dict[str, Any]]) -> int:
    """2 where a layer has codes or a full residual, else 1."""
    for spec in layers.values():
        full = any(f"values_{m}" in spec["tensors"] and f"mask_{m}" not in spec["tensors"] for m in MATRICES)
        if full or spec["sizes"].get("payloads"):
            return 2
    return 1


def _check(layers: dict[str, Any]) -> None:
    check_layers(layers, PART_ROUTER)
    for path, spec in layers.items():
        try:
            weights = described_weights(spec)
            change, part_router = described_routing(spec)
            (change or RouterChange()).check_fits(weights.num_experts, None, part_router)
        except ValueError as error:
            raise ValueError(f"layers[{path!r}].{error}") from None


def check_complete(layers: dict[str, Any], names: Iterable[str]) -> None:
    """Raises ValueError unless a checkpoint's config describes as many factored tensors as its shards hold.

    Otherwise transformers would leave experts at random values, with a warning. Counts, because saving may rename.
    """
    described = sum(len(spec["tensors"]) + (PART_ROUTER in spec) for spec in layers.values())
    held = sum(1 for name in names if name.rpartition(".")[2] in (*TENSOR_NAMES, PART_ROUTER))
    if described != held or not layers:
        raise ValueError(f"config.json describes {described} factored tensors, the shards hold {held}: compress again")


def _config_of_the_whole(files: list[str]) -> ResMoEConfig:
    """The quantisation of the model whose part is loaded from these shards."""
    if not files:
        raise ValueError("this config is of a part of a factored checkpoint; load it from the checkpoint's folder")
    folder = Path(files[0]).parent
    found = read_config(folder).get("quantization_config") or {}
    if found.get("quant_method") != QUANT_METHOD or "layers_in" in found:
        raise ValueError(
            f"{folder}: config.json is that of a part of a factored model and does not describe its layers; save the "
            "whole model"
        )
    return ResMoEConfig(**found)


def _stand_in(layer: FactoredExpertsLayer, parameters: Iterable[str]) -> list[str]:
    """Puts nothing under the names of the dense parameters, for models that initialise them from the block around."""
    names = [name for name in parameters if "." not in name]
    for name in names:
        layer.__dict__[name] = torch.empty(0)
        layer.__dict__[name]._is_hf_initialized = True
    return names


def layer_spec(
    weights: FactoredExperts, change: RouterChange | None = None, part_router: Tensor | None = None
) -> dict[str, Any]:
    """A layer as config.json stores it, but for its report."""
    sizes = weights.sizes()
    if not sizes["payloads"]:
        del sizes["payloads"]  # which version 1 does not know
    spec: dict[str, Any] = {
        "sizes": sizes,
        "tensors": {name: _tensor_spec(tensor) for name, tensor in weights.tensors().items()},
    }
    if change is not None and change != RouterChange():
        spec["router"] = change.to_json()
    if part_router is not None:
        spec[PART_ROUTER] = _tensor_spec(part_router)
    return spec


def _tensor_spec(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}


def mark_as_factored(model: nn.Module, quantizer: HfQuantizer) -> None:
    """Makes ``save_pretrained`` write a checkpoint that loads only with this package."""
    layers = quantizer.quantization_config.layers  # type: ignore[attr-defined]
    for path, spec in layers.items():
        spec.setdefault(STORED_AS, stored_prefix(model, path, next(iter(spec["tensors"]))))  # type: ignore[arg-type]
    for _, part in configs_with_layers(model, layers):  # type: ignore[arg-type]
        part.quantization_config, part.experts_implementation = dict(PART), QUANT_METHOD  # type: ignore[attr-defined]
    say_what_is_saved(model)
    model.hf_quantizer = quantizer  # type: ignore[assignment]
    model.is_quantized, model.quantization_method = True, QUANT_METHOD  # type: ignore[assignment]
    model.config.quantization_config = quantizer.quantization_config  # type: ignore[union-attr]
    # A plain attribute: the property of nearly this name is what transformers drops when it saves a config.
    model.config.experts_implementation = QUANT_METHOD  # type: ignore[union-attr]


def described_weights(spec: dict[str, Any], dtype: torch.dtype | None = None) -> FactoredExperts:
    """The layer that config.json describes, on meta; floating point but for scales in ``dtype`` where given, else as
    stored."""
    tensors = {
        name: _described(tensor, None if name in PARTS and PARTS[name].holds == "scales" else dtype)
        for name, tensor in spec["tensors"].items()
    }
    return FactoredExperts.from_tensors(tensors, **spec["sizes"])


def stored_weights(spec: dict[str, Any], stored: str, files: Iterable[str]) -> FactoredExperts:
    """The layer that config.json describes, read from the shards."""
    tensors: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            held = set(file.keys())
            tensors |= {n: file.get_tensor(f"{stored}.{n}") for n in spec["tensors"] if f"{stored}.{n}" in held}
    return FactoredExperts.from_tensors(tensors, **spec["sizes"])


def described_routing(
    spec: dict[str, Any], dtype: torch.dtype | None = None
) -> tuple[RouterChange | None, Tensor | None]:
    """The change of the router that config.json describes, and its part router, on meta."""
    change = RouterChange.from_json(spec["router"]) if "router" in spec else None
    return change, _described(spec[PART_ROUTER], dtype) if PART_ROUTER in spec else None


def _described(tensor: dict[str, Any], dtype: torch.dtype | None) -> Tensor:
    stored = described_dtype(tensor)
    wanted = dtype if dtype is not None and stored.is_floating_point else stored
    return torch.empty(tensor["shape"], dtype=wanted, device="meta")
