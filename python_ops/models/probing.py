"""Finding out what a module computes by running a copy of it with random weights and few neurons.

Names say little: modules with children gate_proj, up_proj and down_proj scale what passes between them, or cut it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from resmoe_kernels.activations import activate
from resmoe_kernels.factored import DenseExperts

CLOSE = 1e-4  # float32 sums of a few dozen terms of size 1, in another order
_WIDTH = 4  # least neurons of the module that is run
_TOKENS = 8
_WRAPPED = ("forward", "_old_forward", "_hf_hook")  # what moving weights about puts on a module


def refusal_of_mlp(
    mlp: nn.Module, hidden: int, inner: int, read: Callable[[Mapping[str, Tensor]], DenseExperts], activation: str
) -> str | None:
    """Why a feed-forward module is not down(act(gate_up x)) of what is read from it; None if it is.

    hidden, inner: its sizes;  read: its parameters, by name, as a single expert;  activation: by its name of the op
    """
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.device("cpu"):  # from_pretrained builds models with meta as the device of everything
            small = smaller_copy(mlp, small_sizes(1, hidden, inner), generator)
            expert = read({name: p.detach() for name, p in small.named_parameters()})
            x = noise(generator, _TOKENS, expert.hidden_size)
            with torch.no_grad():
                same = torch.allclose(small(x), _output(expert, x, activation), rtol=CLOSE, atol=CLOSE)
    except Exception as error:  # of any type: a model's own code, run at another size
        return f"run with few neurons, its forward fails ({type(error).__name__}: {' '.join(str(error).split())})"
    return None if same else "its forward computes something else than down(act(gate x) * up x), or down(act(up x))"


def _output(expert: DenseExperts, x: Tensor, activation: str) -> Tensor:
    """x (T, H) -> (T, H), of a single expert."""
    z = x @ expert.gate_up[0].T
    h = activate(z if expert.bias_gate_up is None else z + expert.bias_gate_up[0], activation, expert.gated)
    y = h @ expert.down[0].T
    return y if expert.bias_down is None else y + expert.bias_down[0]


def small_sizes(count: int, hidden: int, inner: int) -> dict[int, int]:
    """For a module's sizes those of the copy that is run, in the same proportions: 2 I may be H in both.

    count: experts, whose number stays
    """
    common = math.gcd(hidden, inner)
    if count in (hidden, inner, 2 * inner):
        common = 1  # numbers that mean two things; only tiny modules have them
    times = max(1, _WIDTH * common // min(hidden, inner)) if common > 1 else 1
    return {n: n // common * times for n in (hidden, inner, 2 * inner, count * inner)}


def smaller_copy(module: nn.Module, sizes: Mapping[int, int], generator: torch.Generator) -> nn.Module:
    """A copy of a module with other sizes, on the CPU, with random float32 parameters and without hooks."""
    made = module.__class__.__new__(module.__class__)
    values = {n: sizes.get(v, v) if type(v) is int else v for n, v in module.__dict__.items() if n not in _WRAPPED}
    made.__dict__.update(values)
    made._parameters, made._modules = {}, {}
    made._forward_hooks, made._forward_pre_hooks = OrderedDict(), OrderedDict()
    for name, parameter in module._parameters.items():
        made._parameters[name] = None
        if parameter is not None:
            shape = [sizes.get(n, n) for n in parameter.shape]
            values = noise(generator, *shape) / max(shape) ** 0.25
            made._parameters[name] = nn.Parameter(values, requires_grad=False)
    for name, child in module._modules.items():
        made._modules[name] = None if child is None else smaller_copy(child, sizes, generator)
    return made.eval()


def noise(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32)  # from_pretrained sets another default, too
