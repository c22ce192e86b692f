"""Turns a loaded dense model into a compressed one, in memory."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from resmoe_kernels.python_ops.calibration.statistics import Statistics
from resmoe_kernels.python_ops.methods.named import method_named
from resmoe_kernels.python_ops.models.checkpoint import check_finite
from resmoe_kernels.python_ops.models.dense_model import DenseModel
from resmoe_kernels.python_ops.models.hf_quantizer import ResMoEConfig, ResMoEQuantizer, layer_spec, mark_as_factored
from resmoe_kernels.python_ops.models.layouts import select_layers


def swap_experts(
    model: nn.Module,
    *,
    method: str = "resmoe",
    layers: str = "all",
    statistics: Statistics | None = None,
    progress: bool = True,
    **settings,
) -> list[str]:
    """Compresses the experts modules of a transformers model and puts factored layers in their place.

    model: a loaded dense model; changed in place, one layer at a time, the dense experts freed as it goes
    method: as in ``compress``, with its settings as keywords
    layers: ``all``, ``first:N``, ``last:N`` or numbers like ``0,3,5-7``
    statistics: from ``calibrate``, for methods that need them
    Returns the paths of the modules swapped; ``save_pretrained`` then writes a factored checkpoint.
    Raises ValueError before anything is changed: an experts module is not covered (named, with the reason), there is
    none, a setting is wrong, the model is quantised, a weight is NaN or Inf.
    """
    chosen_method = method_named(method, settings)
    if chosen_method.needs_statistics != (statistics is not None) and not (chosen_method.fits and statistics):
        needs = "needs statistics, see calibrate" if statistics is None else "uses no statistics; leave them out"
        raise ValueError(f"statistics: {method} with these settings {needs}")
    before = getattr(getattr(model, "config", None), "quantization_config", None)
    if before is not None and not isinstance(before, ResMoEConfig):
        raise ValueError(f"{type(model).__name__}: holds quantised weights; start from an unquantised model")
    dense = DenseModel(model, experts=chosen_method.find(model))
    chosen = list(select_layers(dense.experts, layers))
    for experts in chosen:
        for name, parameter in experts.module.named_parameters():
            if parameter.is_meta:
                raise ValueError(
                    f"{experts.path}.{name}: is offloaded and not in memory; load the model without offload "
                    "(device_map), or compress its folder"
                )
            check_finite(f"{experts.path}.{name}", parameter)
    specs: dict[str, Any] = {} if before is None else dict(before.layers)  # of an earlier swap
    if statistics is not None:
        statistics.check_holds(experts.path for experts in chosen)
    numbers = [dense.experts.index(e) for e in chosen]
    chosen_method.check_model(dense, numbers)
    plans = chosen_method.plan(dense, numbers, statistics, progress)
    dense.experts.clear()  # which would keep the dense weights
    swapped = []
    with tqdm(total=len(chosen), desc="compressing", unit="layer", disable=not progress) as bar:
        for plan in plans:
            experts = chosen.pop(0)
            parameters = {name: p.detach() for name, p in experts.module.named_parameters()}
            made = chosen_method(
                experts.read(parameters),
                plan=plan,
                statistics=None if statistics is None else statistics.layers[experts.path],
                progress=bar.set_postfix_str,
            )
            described = layer_spec(made.weights, made.change, made.part_router)
            specs[experts.path] = {**described, "report": dataclasses.asdict(made.report)}
            layer = experts.install(model, made.weights, made.change, made.part_router)
            del made  # whose weights pack replaces
            layer.pack()
            swapped.append(experts.path)
            bar.update()
    if hasattr(model, "config"):
        config = ResMoEConfig(layers=specs, settings={"method": method, "layers": layers, **chosen_method.recorded})
        mark_as_factored(model, ResMoEQuantizer(config, pre_quantized=True))
    return swapped
