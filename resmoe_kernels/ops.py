"""Ops: one schema each, one check shared by wrapper and fake, and the choice of backend.

Every op is registered twice: ``resmoe::<op>``, where compiled kernels override the reference per device, and
``resmoe::<op>_reference``, which is always plain PyTorch. C++ only adds implementations of the first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from resmoe_kernels.activations import check_activation
from resmoe_kernels.factored import SIZE_NAMES, TENSOR_NAMES, FactoredExperts
from resmoe_kernels.sparse import BLOCK, expand_sparse_reference

_log = logging.getLogger("resmoe_kernels")
_lib = torch.library.Library("resmoe", "DEF")
_forced: str | None = None  # process-wide; dynamo guards on it, so a compiled model follows a change
_HIDDEN_SIZE = len(TENSOR_NAMES) + SIZE_NAMES.index("hidden_size")
_KERNELS = {"cpu": "CPU"}  # backend name -> dispatch key its kernels are registered under


def _define(name: str, schema: str, reference: Callable, fake: Callable) -> None:
    for op in (name, f"{name}_reference"):
        _lib.define(op + schema)
        _lib.impl(op, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"resmoe::{op}", fake, lib=_lib)


def _op(name: str) -> Callable:
    return getattr(torch.ops.resmoe, f"{name}_reference" if _forced == "reference" else name)


def _compiled(op: str) -> list[str]:
    return [b for b, key in _KERNELS.items() if torch._C._dispatch_has_kernel_for_dispatch_key(f"resmoe::{op}", key)]


# ---- backends


def backends() -> tuple[str, ...]:
    """Names of the backends that can run ``resmoe::experts``: ``reference``, and those whose kernels are built."""
    return ("reference", *_compiled("experts"))


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Runs every op of the block, in every thread, on one backend; ``auto`` is the default choice by device.

    Raises ValueError, listing what is there, if the backend cannot run ``resmoe::experts`` here.
    """
    global _forced
    known = ("auto", *backends())
    if name not in known:
        raise ValueError(f"backend: {name!r} is not there; there are {', '.join(known)}")
    before, _forced = _forced, None if name == "auto" else name
    try:
        yield
    finally:
        _forced = before


def explain(weights: FactoredExperts) -> str:
    """One line per op of a layer: which backend runs it where the layer lives, and why no faster one does."""
    device = next(iter(weights.tensors().values())).device.type
    lines = []
    for op in ("experts", "expand_sparse") if any(n.startswith("mask") for n in weights.tensors()) else ("experts",):
        able = [b for b in _compiled(op) if b == device and _forced != "reference"]
        if able:
            lines.append(f"resmoe::{op} on {device}: {able[0]}")
        elif _forced == "reference":
            lines.append(f"resmoe::{op} on {device}: reference (forced)")
        else:
            lines.append(f"resmoe::{op} on {device}: reference (no compiled kernel for {device} is built)")
    if weights.factorization != "stacked":
        lines.append(f"factorization {weights.factorization!r} is served by the reference only")
    return "\n".join(lines)


# ---- expand_sparse


def expand_sparse(mask: Tensor, values: Tensor, row_offsets: Tensor | None, width: int) -> Tensor:
    """Writes the stored values of every row to their columns; see ``expand_sparse_reference``."""
    _check_expand_sparse(mask, values, row_offsets, width)
    offsets = None if row_offsets is None else row_offsets.contiguous()
    return _op("expand_sparse")(mask.contiguous(), values.contiguous(), offsets, width)  # what compiled kernels read


def _check_expand_sparse(mask: Tensor, values: Tensor, row_offsets: Tensor | None, width: int) -> None:
    if mask.dim() != 2 or mask.dtype != torch.int32 or mask.shape[1] != -(-width // BLOCK):
        raise ValueError(
            f"expand_sparse: mask must be (N, {-(-width // BLOCK)}) int32 for width {width}, "
            f"got {tuple(mask.shape)} {mask.dtype}"
        )
    if row_offsets is None:
        if values.dim() != 3 or values.shape[:2] != mask.shape:
            raise ValueError(
                f"expand_sparse: block values must be {(*mask.shape, 'n')}, got {tuple(values.shape)}; "
                "bitmap values need row_offsets"
            )
    elif (
        row_offsets.shape != (mask.shape[0] + 1,)
        or row_offsets.dtype not in (torch.int32, torch.int64)
        or values.dim() != 1
    ):
        raise ValueError(
            f"expand_sparse: bitmap needs row_offsets ({mask.shape[0] + 1},) int32 or int64 and values (nnz,), "
            f"got {tuple(row_offsets.shape)} {row_offsets.dtype} and {tuple(values.shape)}"
        )


def _expand_sparse_fake(mask: Tensor, values: Tensor, row_offsets: Tensor | None, width: int) -> Tensor:
    _check_expand_sparse(mask, values, row_offsets, width)
    return values.new_empty(mask.shape[0], width)


def _expand_sparse_impl(mask: Tensor, values: Tensor, row_offsets: Tensor | None, width: int) -> Tensor:
    return expand_sparse_reference(mask, values, row_offsets, width).contiguous()


_define(
    "expand_sparse",
    "(Tensor mask, Tensor values, Tensor? row_offsets, int width) -> Tensor",
    _expand_sparse_impl,
    _expand_sparse_fake,
)


def _expand_sparse_gradients(ctx, grad: Tensor) -> tuple:
    mask, values, row_offsets = ctx.saved_tensors
    values = values.detach().requires_grad_()
    with torch.enable_grad():
        dense = expand_sparse_reference(mask, values, row_offsets, grad.shape[1])
    return None, torch.autograd.grad(dense, values, grad)[0], None, None


for _name in ("expand_sparse", "expand_sparse_reference"):
    torch.library.register_autograd(
        f"resmoe::{_name}",
        _expand_sparse_gradients,
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:3]),
        lib=_lib,
    )


# ---- experts


def experts(
    x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, weights: FactoredExperts, activation: str = "silu"
) -> Tensor:
    """The expert layer on the fastest backend there is; arguments and meaning as in ``experts_reference.experts``.

    Differentiable: the backward pass recomputes through the reference. Raises ValueError naming the tensor, the rule
    and what came.
    """
    return experts_flat(x, top_k_index, top_k_weights, _flatten(weights), activation)


def experts_flat(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, weights: Sequence, activation: str) -> Tensor:
    """``experts`` on the fields of FactoredExperts, in the order TENSOR_NAMES, SIZE_NAMES: a call builds nothing."""
    _check_experts(x, top_k_index, top_k_weights, weights, activation)
    return _op("experts")(x, top_k_index, top_k_weights, *weights, activation)


def _flatten(weights: FactoredExperts) -> list:
    return [getattr(weights, name) for name in (*TENSOR_NAMES, *SIZE_NAMES)]


def _unflatten(flat: Sequence) -> FactoredExperts:
    return FactoredExperts(**dict(zip((*TENSOR_NAMES, *SIZE_NAMES), flat, strict=True)))


def _check_experts(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, weights: Sequence, activation: str) -> None:
    """What a call can get wrong; the weights themselves were checked when their FactoredExperts was made."""
    tensors, hidden_size = weights[: len(TENSOR_NAMES)], weights[_HIDDEN_SIZE]

    def got(tensor: Tensor) -> str:
        return f"got {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"

    if x.dim() != 2 or x.shape[1] != hidden_size or not x.is_floating_point():
        raise ValueError(f"experts: x must be (T, {hidden_size}) floating point, {got(x)}")
    if (
        top_k_index.dim() != 2
        or top_k_index.shape[0] != x.shape[0]
        or top_k_index.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(f"experts: top_k_index must be ({x.shape[0]}, top_k) int32 or int64, {got(top_k_index)}")
    if top_k_weights.shape != top_k_index.shape or not top_k_weights.is_floating_point():
        raise ValueError(
            f"experts: top_k_weights must be {tuple(top_k_index.shape)} floating point, {got(top_k_weights)}"
        )
    routing = (("top_k_index", top_k_index), ("top_k_weights", top_k_weights))
    for name, tensor in (*routing, *zip(TENSOR_NAMES, tensors, strict=True)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"experts: {name} must be on x's device {x.device}, got {tensor.device}")
    check_activation(activation)


def _experts_fake(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *rest) -> Tensor:
    *flat, activation = rest
    _check_experts(x, top_k_index, top_k_weights, flat, activation)
    return x.new_empty(x.shape)


def _experts_impl(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *rest) -> Tensor:
    from resmoe_kernels.experts_reference import experts as reference

    *flat, activation = rest
    with torch.autocast(x.device.type, enabled=False):  # whose bfloat16 products would break the float32 sums
        return reference(x, top_k_index, top_k_weights, _unflatten(flat), activation)


_EXPERTS_ARGUMENTS = (
    "Tensor x, Tensor top_k_index, Tensor top_k_weights, "
    + "".join(f"Tensor? {name}, " for name in TENSOR_NAMES)
    + "int num_experts, int hidden_size, int intermediate_size, bool gated, str factorization, str activation"
)
_define("experts", f"({_EXPERTS_ARGUMENTS}) -> Tensor", _experts_impl, _experts_fake)


# The backward pass is an op of its own, so that a compiled model may contain it: it reads which experts were hit.


def _experts_backward_impl(grad: Tensor, wanted: Sequence[int], *inputs) -> list[Tensor]:
    inputs = tuple(i.detach() if isinstance(i, Tensor) else i for i in inputs)
    leaves = [inputs[i].requires_grad_() for i in wanted]
    with torch.enable_grad():
        output = _experts_impl(*inputs)
    grads = torch.autograd.grad(output, leaves, grad, allow_unused=True)  # unused: no token reached that part
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, grads, strict=True)]


def _experts_backward_fake(grad: Tensor, wanted: Sequence[int], *inputs) -> list[Tensor]:
    return [torch.empty_like(inputs[i]) for i in wanted]


_define(
    "experts_backward",
    f"(Tensor grad, int[] wanted, {_EXPERTS_ARGUMENTS}) -> Tensor[]",
    _experts_backward_impl,
    _experts_backward_fake,
)


def _save_for_backward(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*(i for i in inputs if isinstance(i, Tensor)))
    ctx.others = [None if isinstance(i, Tensor) else (i,) for i in inputs]


def _experts_gradients(ctx, grad: Tensor) -> tuple:
    saved = iter(ctx.saved_tensors)
    inputs = [next(saved) if other is None else other[0] for other in ctx.others]
    wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
    grads: list[Tensor | None] = [None] * len(inputs)
    for i, g in zip(wanted, torch.ops.resmoe.experts_backward(grad, wanted, *inputs), strict=True):
        grads[i] = g
    return tuple(grads)


for _name in ("experts", "experts_reference"):
    torch.library.register_autograd(f"resmoe::{_name}", _experts_gradients, setup_context=_save_for_backward, lib=_lib)


# ---- the compiled extension

_extension = sorted(Path(__file__).parent.glob("_C*.so"))
if _extension:
    torch.ops.load_library(str(_extension[0]))
else:
    _log.warning("resmoe_kernels: the C++ extension is not built; every op runs on the plain PyTorch reference")
