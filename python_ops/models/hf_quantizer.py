"""The plug-in by which transformers loads and saves factored checkpoints (``quant_method: "resmoe"``).

``config.json`` of such a checkpoint holds, for every compressed layer, the names, shapes and dtypes of its tensors. It
also asks for ``experts_implementation: "resmoe"``, a name that exists only once this module is imported: without it
transformers would skip the unknown quantisation with a warning and return randomly initialised experts. It still does
where the package is not imported and the caller passes an ``experts_implementation`` of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from resmoe_kernels.factored import TENSOR_NAMES, FactoredExperts
from resmoe_kernels.python_ops.models.layer import PART_ROUTER
from resmoe_kernels.python_ops.models.layouts import find_experts
from resmoe_kernels.python_ops.models.routing import RouterChange
from resmoe_kernels.when_imported import when_imported

QUANT_METHOD = "resmoe"
FORMAT_VERSION = 1


@register_quantization_config(QUANT_METHOD)
class ResMoEConfig(QuantizationConfigMixin):
    """``quantization_config`` of a factored checkpoint.

    layers: module path -> {"sizes": {...}, "tensors": {name: {"dtype": ..., "shape": [...]}}, "report": {...}} and,
        where the router changes, "router": {...}, see RouterChange
    settings: how it was compressed;  source: fingerprint of the dense checkpoint, None if compressed in memory
    format_version: refused with ValueError where newer than this package's
    """

    def __init__(
        self,
        layers: dict[str, dict[str, Any]] | None = None,
        settings: dict[str, Any] | None = None,
        source: str | None = None,
        format_version: int = FORMAT_VERSION,
        **_: Any,
    ) -> None:
        if not isinstance(format_version, int) or format_version > FORMAT_VERSION:
            raise ValueError(
                f"this checkpoint has resmoe format_version {format_version}, newer than the {FORMAT_VERSION} "
                "this resmoe_kernels reads: upgrade resmoe_kernels"
            )
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.format_version = format_version
        self.settings = settings or {}
        self.source = source
        self.layers = layers or {}


@register_quantizer(QUANT_METHOD)
class ResMoEQuantizer(HfQuantizer):
    """Replaces the experts modules named in the config by empty factored layers, which the loader then fills."""

    requires_calibration = True  # compression happens offline; loading a dense model through this is refused

    def _process_model_before_weight_loading(self, model, **kwargs):
        _run_dense_layers_as_usual(model)
        layers = self.quantization_config.layers
        check_complete(layers, _names(kwargs.get("checkpoint_files") or []))
        modules = {experts.path: experts for experts in find_experts(model, or_ffns=True)}
        prefix = f"{model.base_model_prefix}."
        found = {}  # by the paths of this model, which may be a part or a whole of the one that was saved
        for path, spec in layers.items():
            here = next((p for p in (path, prefix + path, path.removeprefix(prefix)) if p in modules), None)
            if here is None:
                raise ValueError(
                    f"{path}: the checkpoint holds factored experts there, {type(model).__name__} has none"
                )
            weights = described_weights(spec, model.dtype)
            change, part_router = described_routing(spec, model.dtype)
            modules[here].install(model, weights, change, part_router)
            found[here] = spec
        self.quantization_config.layers = found
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        for path, spec in self.quantization_config.layers.items():
            layer = model.get_submodule(path)
            layer.requires_grad_(False)  # the loader makes every floating-point parameter trainable
            # The dtypes are those of this load, which a save must record.
            spec |= layer_spec(layer.form, layer.router_change, layer.part_router)
            try:
                if not layer.pack():  # which checks the same
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


def check_complete(layers: dict[str, Any], names: Iterable[str]) -> None:
    """Raises ValueError unless a checkpoint's config describes as many factored tensors as its shards hold.

    Otherwise transformers would leave experts at random values, with a warning. Counts, because saving may rename.
    """
    described = sum(len(spec["tensors"]) + (PART_ROUTER in spec) for spec in layers.values())
    held = sum(1 for name in names if name.rpartition(".")[2] in (*TENSOR_NAMES, PART_ROUTER))
    if described != held or not layers:
        raise ValueError(f"config.json describes {described} factored tensors, the shards hold {held}: compress again")


def _names(files: Iterable[str]) -> Iterator[str]:
    for path in files:
        with safe_open(path, framework="pt") as file:
            yield from file.keys()


def layer_spec(
    weights: FactoredExperts, change: RouterChange | None = None, part_router: Tensor | None = None
) -> dict[str, Any]:
    """A layer as config.json stores it, but for its report."""
    spec: dict[str, Any] = {
        "sizes": weights.sizes(),
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
    model.hf_quantizer = quantizer  # type: ignore[assignment]
    model.is_quantized, model.quantization_method = True, QUANT_METHOD  # type: ignore[assignment]
    model.config.quantization_config = quantizer.quantization_config  # type: ignore[union-attr]
    # A plain attribute: the property of nearly this name is what transformers drops when it saves a config.
    model.config.experts_implementation = QUANT_METHOD  # type: ignore[union-attr]


def described_weights(spec: dict[str, Any], dtype: torch.dtype | None = None) -> FactoredExperts:
    """The layer that config.json describes, on meta; floating point in ``dtype`` where given, else as stored."""
    tensors = {name: _described(tensor, dtype) for name, tensor in spec["tensors"].items()}
    return FactoredExperts.from_tensors(tensors, **spec["sizes"])


def described_routing(
    spec: dict[str, Any], dtype: torch.dtype | None = None
) -> tuple[RouterChange | None, Tensor | None]:
    """The change of the router that config.json describes, and its part router, on meta."""
    change = RouterChange.from_json(spec["router"]) if "router" in spec else None
    return change, _described(spec[PART_ROUTER], dtype) if PART_ROUTER in spec else None


def _described(tensor: dict[str, Any], dtype: torch.dtype | None) -> Tensor:
    stored = getattr(torch, tensor["dtype"])
    wanted = dtype if dtype is not None and stored.is_floating_point else stored
    return torch.empty(tensor["shape"], dtype=wanted, device="meta")


def _run_dense_layers_as_usual(model: nn.Module) -> None:
    """Layers left dense run under the implementation transformers would have chosen by itself."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_experts_implementation", None) == QUANT_METHOD:
            config._experts_implementation = model.get_correct_experts_implementation(None)  # type: ignore[union-attr, operator]


def _make_name_known() -> None:
    from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward

    # Known so that a model can be built under it; layers never run under it, see _run_dense_layers_as_usual.
    ExpertsInterface.register(QUANT_METHOD, grouped_mm_experts_forward)


when_imported("transformers.integrations.moe", _make_name_known)
