"""What methods that fit under moments share: a layer's matrices as problems, and the layer that solutions make."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from resmoe_kernels.factored import CODED, DenseExperts, FactoredExperts
from resmoe_kernels.parts import SCALES, payloads_text
from resmoe_kernels.payload import Payload
from resmoe_kernels.products import total
from resmoe_kernels.python_ops.solvers.align import in_order
from resmoe_kernels.python_ops.solvers.fits import Fitted, Matrix, Stored
from resmoe_kernels.python_ops.solvers.moments import drawn_to_layer, shrunk_moments

if TYPE_CHECKING:
    from resmoe_kernels.python_ops.calibration.layer_moments import LayerMoments

RIDGE = 0.05


def in_neuron_order(
    experts: DenseExperts, moments: LayerMoments | None, permutations: Tensor | None
) -> tuple[DenseExperts, LayerMoments | None]:
    """Experts and moments with their neurons in another order, the same for None."""
    if permutations is None:
        return experts, moments
    pairs = [in_order(experts, e, permutations[e]) for e in range(experts.num_experts)]
    gate_up, down = (torch.stack(m) for m in zip(*pairs, strict=True))
    bias = experts.bias_gate_up
    if bias is not None:
        halves = bias.unflatten(1, (-1, experts.intermediate_size))
        bias = halves.gather(2, permutations.unsqueeze(1).expand_as(halves)).flatten(1)
    moved = DenseExperts(gate_up, down, bias, experts.bias_down, experts.gated)
    return moved, None if moments is None else moments.permuted(permutations)


def problem_of(experts: DenseExperts, moments: LayerMoments | None, matrix: str, ridge: float) -> Matrix:
    """The problem of one matrix. Rows of gate_up count as their neurons do in the output:

        D_i^2 = E[(dh_i / dz_i)^2] ||down_i||^2        of each expert, with the layer's for those with few tokens

    moments: of these very experts, or None for the identity. Raises ValueError if they are of others.
    """
    weights = getattr(experts, matrix).float()
    if moments is None:
        identity = torch.eye(weights.shape[-1]).expand(len(weights), -1, -1)
        return Matrix(weights, identity, torch.ones(len(weights)))
    here = (*experts.down.shape[::2], experts.hidden_size)
    there = (*moments.down.shape[:2], moments.gate_up.shape[1])
    if here != there:
        raise ValueError(
            f"statistics: their moments are of (experts, I, H) = {there}, the layer has {here}; calibrate this model"
        )
    sums = moments.gate_up if matrix == "gate_up" else moments.down
    mass = moments.mass.float()
    shrunk = shrunk_moments(sums, mass, moments.tokens, ridge=ridge)
    if matrix == "down":
        return Matrix(weights, shrunk, mass)
    slopes = drawn_to_layer(moments.slope, mass, moments.tokens)
    down = experts.down.float()
    columns = (down * down).sum(1).repeat(1, slopes.shape[1] // experts.intermediate_size)
    rows = (slopes * columns).sqrt()
    return Matrix(weights, shrunk, mass, rows.clamp_min(1e-3 * total(rows) / rows.numel() or 1.0))


def assembled(experts: DenseExperts, fitted: dict[str, Fitted]) -> FactoredExperts:
    tensors: dict[str, Tensor] = {}
    payloads: dict[str, Payload] = {}

    def store(name: str, stored: Stored | None, group: bool = False) -> None:
        if stored is None:
            return
        tensors[name] = stored.tensor.unsqueeze(0) if group else stored.tensor
        if stored.payload is not None and stored.scales is not None:
            tensors[SCALES + name] = stored.scales.unsqueeze(0) if group else stored.scales
            payloads[name] = stored.payload

    for matrix, made in fitted.items():
        store(f"base_{matrix}", made.base, group=True)
        for stem in ("u", "v", "values"):
            store(f"{stem}_{matrix}", getattr(made, stem))
        if made.u is not None:
            ends = torch.tensor([0, *made.ranks]).cumsum(0)
            tensors[f"rank_offsets_{matrix}"] = ends.to(torch.int32)
    if "base_gate_up" in tensors:
        tensors["group"] = torch.zeros(experts.num_experts, dtype=torch.int32)
    biases = {"bias_gate_up": experts.bias_gate_up, "bias_down": experts.bias_down}
    return FactoredExperts.from_tensors(
        tensors | {name: bias for name, bias in biases.items() if bias is not None},
        num_experts=experts.num_experts,
        hidden_size=experts.hidden_size,
        intermediate_size=experts.intermediate_size,
        gated=experts.gated,
        payloads=payloads_text({name: payloads[name] for name in CODED if name in payloads}),
    )
