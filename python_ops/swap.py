"""Turns a loaded dense model into a compressed one, in memory."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from resmoe_kernels.python_ops.checkpoint import check_finite
from resmoe_kernels.python_ops.hf_quantizer import ResMoEConfig, ResMoEQuantizer, mark_as_factored, tensor_specs
from resmoe_kernels.python_ops.layouts import find_experts, select_layers
from resmoe_kernels.python_ops.methods import method_function


def swap_experts(
    model: nn.Module, *, method: str = "resmoe", layers: str = "all", progress: bool = True, **settings
) -> list[str]:
    """Compresses the experts modules of a transformers model and puts factored layers in their place.

    model: a loaded dense model; changed in place, one layer at a time, the dense experts freed as it goes
    method: ``resmoe``, with its settings as keywords (residual, retain, factorization, sparse_layout, ...)
    layers: ``all``, ``first:N``, ``last:N`` or numbers like ``0,3,5-7``
    Returns the paths of the modules swapped; ``save_pretrained`` then writes a factored checkpoint.
    Raises ValueError before anything is changed: an experts module is not covered (named, with the reason), there is
    none, a setting is wrong, the model is quantised, a weight is NaN or Inf.
    """
    compress_layer = method_function(method, settings)
    before = getattr(getattr(model, "config", None), "quantization_config", None)
    if before is not None and not isinstance(before, ResMoEConfig):
        raise ValueError(f"{type(model).__name__}: holds quantised weights; start from an unquantised model")
    chosen = select_layers(find_experts(model), layers)
    for experts in chosen:
        for name, parameter in experts.module.named_parameters():
            check_finite(f"{experts.path}.{name}", parameter)
    specs: dict[str, Any] = {} if before is None else dict(before.layers)  # of an earlier swap
    swapped = []
    with tqdm(total=len(chosen), desc="compressing", unit="layer", disable=not progress) as bar:
        while chosen:
            experts = chosen.pop(0)
            parameters = {name: p.detach() for name, p in experts.module.named_parameters()}
            weights, report = compress_layer(experts.read(parameters), progress=bar.set_postfix_str)
            specs[experts.path] = {**tensor_specs(weights), "report": dataclasses.asdict(report)}
            layer = experts.install(model, weights)
            del weights  # which pack replaces
            layer.pack()
            swapped.append(experts.path)
            bar.update()
    if hasattr(model, "config"):
        config = ResMoEConfig(layers=specs, settings={"method": method, "layers": layers, **compress_layer.keywords})
        mark_as_factored(model, ResMoEQuantizer(config, pre_quantized=True))
    return swapped
