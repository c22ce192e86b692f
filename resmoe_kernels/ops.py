"""Ops: one schema each, one check shared by wrapper and fake, and the choice of backend.

Every op is registered twice: ``resmoe::<op>``, where compiled kernels override the reference per device, and
``resmoe::<op>_reference``, which is always plain PyTorch. C++ only adds implementations of the first.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from resmoe_kernels.activations import POINTWISE, check_activation
from resmoe_kernels.derivatives import only_first, refuse_forward_mode
from resmoe_kernels.factored import CODED, SIZE_NAMES, SIZE_TYPES, TENSOR_NAMES, FactoredExperts
from resmoe_kernels.heuristics import cuda_up_to
from resmoe_kernels.parts import payloads_text
from resmoe_kernels.payload import Payload
from resmoe_kernels.sparse import BLOCK, expand_sparse_reference

if TYPE_CHECKING:
    from resmoe_kernels.packed import PackedExperts

_log = logging.getLogger("resmoe_kernels")
_lib = torch.library.Library("resmoe", "DEF")
_forced: str | None = None  # process-wide; dynamo guards on it, so a compiled model follows a change
_HIDDEN_SIZE = len(TENSOR_NAMES) + SIZE_NAMES.index("hidden_size")
_BACKENDS_OF = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}  # device -> backends of its kernels


def _define(name: str, schema: str, reference: Callable, fake: Callable) -> None:
    for op in (name, f"{name}_reference"):
        _lib.define(op + schema)
        _lib.impl(op, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"resmoe::{op}", fake, lib=_lib)


def _op(name: str) -> Callable:
    return getattr(torch.ops.resmoe, f"{name}_reference" if _forced == "reference" else name)


def has_cpu_kernel(op: str) -> bool:
    """Whether the extension, where it is built, has this op."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"resmoe::{op}", "CPU")


@cache
def interprets() -> bool:
    """Whether Triton's kernels run on the CPU, by its interpreter: TRITON_INTERPRET=1 when they are imported."""
    if "TRITON_INTERPRET" not in os.environ or importlib.util.find_spec("triton") is None:
        return False
    from resmoe_kernels.triton_kernels.launch import INTERPRETED

    return INTERPRETED


def _missing(backend: str) -> str | None:
    """Why a backend cannot run anything here, None if it can."""
    if backend == "cpu":
        return None if has_cpu_kernel("experts_packed") else "the C++ extension is not built"
    if backend == "cuda":
        if not torch._C._dispatch_has_kernel_for_dispatch_key("resmoe::low_rank_decode", "CUDA"):
            return "the C++ extension is built without CUDA kernels"
        if not torch.cuda.is_available():
            return "torch finds no GPU and its driver"
        major, minor = torch.cuda.get_device_capability()
        return None if major >= 8 else f"this GPU is an sm_{major}{minor}, and the kernels need sm_80 or later"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if not torch.cuda.is_available() and not interprets():
        return "torch finds no GPU and its driver"
    return None


@cache
def _warn_once(sentence: str) -> None:
    _log.warning(sentence)


# ---- backends


def backends() -> tuple[str, ...]:
    """Names of the backends that can run ``resmoe::experts`` here: ``reference``, ``cpu`` where the extension is built,
    ``triton`` where triton is installed and there is a GPU (or TRITON_INTERPRET=1, on CPU tensors and very slowly),
    ``cuda`` where the extension is built with CUDA kernels and there is a GPU that runs them."""
    return ("reference", *(b for device in _BACKENDS_OF.values() for b in device if _missing(b) is None))


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Runs every op of the block, in every thread, on one backend; ``auto`` is the default choice by device.

    The environment variable RESMOE_BACKEND does the same for a whole process. Raises ValueError, listing what is
    there, if the backend cannot run ``resmoe::experts`` here.
    """
    global _forced
    before, _forced = _forced, _checked(name)
    try:
        yield
    finally:
        _forced = before


def _checked(name: str) -> str | None:
    known = ("auto", *backends())
    if name not in known:
        reason = f" ({_missing(name)})" if any(name in names for names in _BACKENDS_OF.values()) else ""
        raise ValueError(f"backend: {name!r} is not there{reason}; there are {', '.join(known)}")
    return None if name == "auto" else name


def explain(weights: FactoredExperts | PackedExperts | torch.nn.Module, activation: str = "silu") -> str:
    """One line per op of a layer: which backend runs it where the layer lives, and why no faster one does.

    Of a model, the same for every layer of factored experts, each line after the layer's name.
    """
    if isinstance(weights, torch.nn.Module):
        layers = [(n, m) for n, m in weights.named_modules() if callable(getattr(m, "explain", None))]
        if not layers:
            raise ValueError(
                f"explain: {type(weights).__name__} has no layer of factored experts; swap_experts makes them"
            )
        return "\n".join(f"{name}: {line}" for name, layer in layers for line in layer.explain().splitlines())
    packed = not isinstance(weights, FactoredExperts)
    form = weights if isinstance(weights, FactoredExperts) else weights.form
    device = "cpu" if packed else next(iter(form.tensors().values())).device.type
    backend = _forced if _forced in _BACKENDS_OF["cuda"] else next(iter(_BACKENDS_OF.get(device, ())), None)
    if _forced == "reference":
        runs = "reference (forced)"
    elif backend is None:
        runs = f"reference (there are no kernels for {device})"
    elif (missing := _missing(backend)) is not None:
        runs = f"reference ({missing})"
    elif (reason := _declines(backend, form, activation, device, packed)) is not None:
        refused = "refused" if _forced == backend else "reference"
        runs = f"{refused} (the {backend} kernels do not serve {reason})"
    elif backend in _BACKENDS_OF["cuda"]:
        where = next(iter(form.tensors().values())).device
        return f"resmoe::experts on {device}: {_explain_gpu(backend, form, activation, where)}"
    else:
        anew = "" if packed else "; packed anew for every call, PackedExperts.pack does it once"
        return f"resmoe::experts on {device}: cpu ({cpu_isa()}{anew})"
    lines = [f"resmoe::experts on {device}: {runs}"]
    if any(name.startswith("mask") for name in form.tensors()):
        compiled = device == "cpu" and has_cpu_kernel("expand_sparse") and _forced != "reference"
        lines.append(f"resmoe::expand_sparse on {device}: {'cpu' if compiled else runs}")
    return "\n".join(lines)


def _explain_gpu(backend: str, form: FactoredExperts, activation: str, device: torch.device) -> str:
    """The backend that serves a layer, its target, and where both were free to take it, what decides."""
    if backend == "cuda":
        return f"cuda ({_sm_of(device)})"
    from resmoe_kernels.triton_kernels.launch import target_of

    if _forced is not None or device.type != "cuda":
        return f"triton ({target_of(device)})"
    if (missing := _missing("cuda")) is not None:
        return f"triton ({target_of(device)}; no cuda: {missing})"
    if (reason := _declines("cuda", form, activation, "cuda", packed=False)) is not None:
        return f"triton ({target_of(device)}; the cuda kernels do not serve {reason})"
    row = cuda_up_to(_sm_of(device), form.mask_down is not None)
    if row.tokens == 0:
        return f"triton ({target_of(device)}; cuda where it is asked for: {row.reason})"
    return f"cuda up to {row.tokens} tokens, triton beyond ({target_of(device)}; {row.reason})"


def _sm_of(device: torch.device) -> str:
    """``sm_90``"""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _declines(backend: str, form: FactoredExperts, activation: str, device: str, packed: bool) -> str | None:
    if backend == "triton":
        from resmoe_kernels.triton_kernels.experts import declines as triton_declines

        return _elsewhere(device, packed) or triton_declines(form, activation)
    if backend == "cuda":
        from resmoe_kernels.experts_cuda import declines_layer

        dtypes = form.dtypes()
        here = None if device == "cuda" else f"tensors on {device}"
        return here or declines_layer(form, next(iter(dtypes), torch.bfloat16), activation)
    from resmoe_kernels.packed import declines

    return declines(form, activation)


def _elsewhere(device: str, packed: bool) -> str | None:
    """Why the Triton kernels cannot read a layer where it is."""
    if packed:
        return "weights packed for the CPU"
    return f"tensors on {device}" if device == "cpu" and not interprets() else None


_lib.define("cpu_isa() -> str")
_lib.define("build_info() -> str")
_lib.define("decode_limits() -> int[]")  # see experts_cuda.limits
_lib.define("assignment(Tensor score, Tensor prices, bool exact) -> (Tensor, Tensor, float, float)")


def assignment(score: Tensor, prices: Tensor, exact: bool) -> tuple[Tensor, Tensor, float, float]:
    """Linear assignment, see csrc/assignment.h; needs the extension.

    score: (n, n) float32 and prices: (n,) float64, contiguous, on the CPU
    Returns columns (n,) int64, prices (n,) float64, value and gap.
    """
    return torch.ops.resmoe.assignment(score, prices, exact)


def cpu_isa() -> str:
    """The instruction set whose kernels run on this CPU; needs the extension."""
    return torch.ops.resmoe.cpu_isa()


def build_info() -> str:
    """What the extension was built with, in a line; needs it."""
    return torch.ops.resmoe.build_info()


# ---- expand_sparse


def expand_sparse(mask: Tensor, values: Tensor, row_offsets: Tensor | None, width: int) -> Tensor:
    """Writes the stored values of every row to their columns; see ``expand_sparse_reference``."""
    _check_expand_sparse(mask, values, row_offsets, width)
    refuse_forward_mode("expand_sparse", (values,))
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
    refuse_forward_mode("expand_sparse", (grad,))
    values, again = values.detach().requires_grad_(), torch.is_grad_enabled()
    with torch.enable_grad():
        dense = expand_sparse_reference(mask, values, row_offsets, grad.shape[1])
    made = torch.autograd.grad(dense, values, grad, create_graph=again)[0]  # linear: differentiable in grad once more
    return None, made, None, None


for _name in ("expand_sparse", "expand_sparse_reference"):
    torch.library.register_autograd(
        f"resmoe::{_name}",
        _expand_sparse_gradients,
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:3]),
        lib=_lib,
    )


# ---- experts


def experts(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    weights: FactoredExperts | PackedExperts,
    activation: str = "silu",
) -> Tensor:
    """The expert layer on the fastest backend there is; arguments and meaning as in ``experts_reference.experts``.

    CPU kernels read PackedExperts; FactoredExperts are packed for each call anew, which takes longer than the call.
    On GPUs, Triton kernels read FactoredExperts. What the kernels of a device do not serve (``packed.declines``,
    ``triton_kernels.experts.declines``, float64 x) runs on the reference, and is logged once; so does everything on a
    GPU where triton is not installed. Differentiable: the backward pass recomputes through the reference. Raises
    ValueError naming the tensor, the rule and what came, or what is not served by the backend that is forced.
    """
    if isinstance(weights, FactoredExperts):
        return experts_flat(x, top_k_index, top_k_weights, _flatten(weights), activation)
    return experts_packed(x, top_k_index, top_k_weights, weights.block, weights.form.hidden_size, activation)


def experts_flat(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, weights: Sequence, activation: str) -> Tensor:
    """``experts`` on the fields of FactoredExperts, in the order TENSOR_NAMES, SIZE_NAMES: a call builds nothing."""
    _check_experts(x, top_k_index, top_k_weights, weights, activation)
    if x.device.type != "cpu":
        _refuse_if_forced("cpu", f"x on {x.device}")
    else:
        _refuse_if_forced("cuda", f"x on {x.device}")
    if _forced == "triton" and x.device.type == "cpu" and (reason := _elsewhere("cpu", packed=False)) is not None:
        _refuse_if_forced("triton", reason)
    return _op("experts")(x, top_k_index, top_k_weights, *weights, activation)


def _flatten(weights: FactoredExperts) -> list:
    return [getattr(weights, name) for name in (*TENSOR_NAMES, *SIZE_NAMES)]


def _unflatten(flat: Sequence) -> FactoredExperts:
    return FactoredExperts(**dict(zip((*TENSOR_NAMES, *SIZE_NAMES), flat, strict=True)))


def _check_experts(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, weights: Sequence, activation: str) -> None:
    """What a call can get wrong; the weights themselves were checked when their FactoredExperts was made."""
    _check_call(x, top_k_index, top_k_weights, weights[_HIDDEN_SIZE], activation)
    for name, tensor in zip(TENSOR_NAMES, weights[: len(TENSOR_NAMES)], strict=True):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"experts: {name} must be on x's device {x.device}, got {tensor.device}")
    refuse_forward_mode("experts", weights[: len(TENSOR_NAMES)])


def _check_call(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, hidden_size: int, activation: str) -> None:
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
    for name, tensor in (("top_k_index", top_k_index), ("top_k_weights", top_k_weights)):
        if tensor.device != x.device:
            raise ValueError(f"experts: {name} must be on x's device {x.device}, got {tensor.device}")
    check_activation(activation)
    refuse_forward_mode("experts", (x, top_k_weights))


def _experts_fake(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *rest) -> Tensor:
    *flat, activation = rest
    _check_experts(x, top_k_index, top_k_weights, flat, activation)
    return x.new_empty(x.shape)


def _experts_impl(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *rest) -> Tensor:
    from resmoe_kernels.experts_reference import experts as reference

    *flat, activation = rest
    with torch.autocast(x.device.type, enabled=False):  # whose bfloat16 products would break the float32 sums
        return reference(x, top_k_index, top_k_weights, _unflatten(flat), activation)


_WEIGHTS_ARGUMENTS = ", ".join(
    [f"Tensor? {name}" for name in TENSOR_NAMES] + [f"{kind} {name}" for name, kind in SIZE_TYPES.items()]
)
_EXPERTS_ARGUMENTS = f"Tensor x, Tensor top_k_index, Tensor top_k_weights, {_WEIGHTS_ARGUMENTS}, str activation"
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


def _gradients(backward: str, ctx, grad: Tensor) -> tuple:
    saved = iter(ctx.saved_tensors)
    inputs = [next(saved) if other is None else other[0] for other in ctx.others]
    tensors = (grad, *(i for i in inputs if isinstance(i, Tensor)))
    refuse_forward_mode("experts", tensors)
    wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
    grads: list[Tensor | None] = [None] * len(inputs)
    with torch.no_grad():
        made = getattr(torch.ops.resmoe, backward)(grad, wanted, *inputs)
    if torch.is_grad_enabled():
        made = only_first("experts", made, tensors)
    for i, g in zip(wanted, made, strict=True):
        grads[i] = g
    return tuple(grads)


def _differentiable(op: str) -> None:
    for name in (op, f"{op}_reference"):
        gradients = partial(_gradients, f"{op}_backward")
        torch.library.register_autograd(f"resmoe::{name}", gradients, setup_context=_save_for_backward, lib=_lib)


_differentiable("experts")


# ---- packed: one block of memory that compiled kernels read, see csrc/packed.h

_lib.define(f"pack({_WEIGHTS_ARGUMENTS}) -> Tensor")
# sizes: E, H, I, gated, then bits and group of each of CODED, 0 and 0 where it is floats
_lib.define("unpack(Tensor packed) -> (Tensor[] tensors, int[] arguments_of_pack, int[] sizes)")
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # of x, and of weights


def pack(weights: FactoredExperts) -> Tensor:
    """The block (bytes,) uint8 of a layer. Raises ValueError where ``check_values`` does, with the same sentences."""
    return _pack_flat(_flatten(weights))


def _pack_flat(weights: Sequence) -> Tensor:
    return torch.ops.resmoe.pack(*(w.contiguous() if isinstance(w, Tensor) else w for w in weights))


def unpack(packed: Tensor) -> FactoredExperts:
    """The inverse of ``pack``, bit by bit."""
    tensors, arguments, sizes = torch.ops.resmoe.unpack(packed)
    named = dict(zip([TENSOR_NAMES[i] for i in arguments], tensors, strict=True))
    (E, H, inner, gated), stored = sizes[:4], sizes[4:]
    codes = zip(CODED, zip(stored[::2], stored[1::2], strict=True), strict=True)
    payloads = payloads_text({name: Payload(bits, group) for name, (bits, group) in codes if bits})
    return FactoredExperts.from_tensors(
        named, num_experts=E, hidden_size=H, intermediate_size=inner, gated=bool(gated), payloads=payloads
    )


def experts_packed(
    x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, packed: Tensor, hidden_size: int, activation: str
) -> Tensor:
    """``experts`` on a block that ``pack`` returned."""
    _check_experts_packed(x, top_k_index, top_k_weights, packed, hidden_size, activation)
    for backend in _BACKENDS_OF["cuda"]:
        _refuse_if_forced(backend, "weights packed for the CPU")
    op = _op("experts_packed")
    reason = declines_call(x.dtype, activation)
    if reason is not None:
        _refuse_if_forced("cpu", reason)
        op = torch.ops.resmoe.experts_packed_reference
    return op(x, top_k_index, top_k_weights, packed, hidden_size, activation)


def _check_experts_packed(
    x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, packed: Tensor, hidden_size: int, activation: str
) -> None:
    _check_call(x, top_k_index, top_k_weights, hidden_size, activation)
    if packed.device != x.device:
        raise ValueError(f"experts: packed must be on x's device {x.device}, got {packed.device}")


def declines_call(dtype: torch.dtype, activation: str) -> str | None:
    """Why no kernel can serve an x of this dtype under this activation; None if they can."""
    if dtype not in KERNEL_DTYPES:
        return f"x of {str(dtype).removeprefix('torch.')}"
    return None if activation in POINTWISE else f"the gate {activation!r}"


def _refuse_if_forced(backend: str, reason: str) -> None:
    if _forced == backend:
        raise ValueError(
            f"experts: the {backend} kernels do not serve {reason}; use backend('auto') or backend('reference')"
        )


def _experts_packed_fake(
    x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, packed: Tensor, hidden_size: int, activation: str
) -> Tensor:
    _check_experts_packed(x, top_k_index, top_k_weights, packed, hidden_size, activation)
    return x.new_empty(x.shape)


def _experts_packed_impl(
    x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, packed: Tensor, hidden_size: int, activation: str
) -> Tensor:
    if (reason := declines_call(x.dtype, activation)) is not None and _forced is None:
        _warn_once(_RUNS_ON_REFERENCE.format("cpu", reason))
    return _experts_impl(x, top_k_index, top_k_weights, *_flatten(unpack(packed)), activation)


_RUNS_ON_REFERENCE = "resmoe_kernels: the {} kernels do not serve {}; such layers run on the slow reference"
_PACKED_ARGUMENTS = "Tensor x, Tensor top_k_index, Tensor top_k_weights, Tensor packed, int hidden_size, str activation"
_define("experts_packed", f"({_PACKED_ARGUMENTS}) -> Tensor", _experts_packed_impl, _experts_packed_fake)


def _experts_packed_backward_impl(
    grad: Tensor, wanted: Sequence[int], x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, packed: Tensor, *rest
) -> list[Tensor]:
    weights = _flatten(unpack(packed))
    return _experts_backward_impl(grad, wanted, x, top_k_index, top_k_weights, *weights, rest[-1])


_define(
    "experts_packed_backward",
    f"(Tensor grad, int[] wanted, {_PACKED_ARGUMENTS}) -> Tensor[]",
    _experts_packed_backward_impl,
    _experts_backward_fake,
)
_differentiable("experts_packed")


def _experts_on_cpu(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *rest) -> Tensor:
    """``resmoe::experts`` by the kernels that read packed weights."""
    from resmoe_kernels.packed import declines

    *flat, activation = rest
    if _forced == "triton":
        return _experts_on_gpu(x, top_k_index, top_k_weights, *rest)
    if _missing("cpu") is not None:
        return _experts_impl(x, top_k_index, top_k_weights, *rest)
    reason = declines_call(x.dtype, activation) or declines(_unflatten(flat))
    if reason is not None:
        _refuse_if_forced("cpu", reason)
        _warn_once(_RUNS_ON_REFERENCE.format("cpu", reason))
        return _experts_impl(x, top_k_index, top_k_weights, *rest)
    _warn_once(
        "resmoe_kernels: weights were packed for one call, which takes longer than the call; "
        "PackedExperts.pack(weights), or FactoredExpertsLayer.pack(), keeps them packed"
    )
    packed = _pack_flat(flat)
    return torch.ops.resmoe.experts_packed(x, top_k_index, top_k_weights, packed, flat[_HIDDEN_SIZE], activation)


# ---- GPUs

for _name in ("low_rank_decode", "block_sparse_decode"):  # one form each, few tokens: see experts_cuda.py
    _lib.define(f"{_name}({_EXPERTS_ARGUMENTS}) -> Tensor")
    torch.library.register_fake(f"resmoe::{_name}", _experts_fake, lib=_lib)


def _experts_on_gpu(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *rest) -> Tensor:
    """``resmoe::experts`` by the CUDA kernel where it is asked for or ``heuristics.CUDA_UP_TO`` says so, else by the
    Triton kernels."""
    *flat, activation = rest
    weights = _unflatten(flat)
    # Kernels start on the current device; autocast would round the float32 operands of torch's products.
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        if _takes_cuda(x, top_k_index, weights, activation):
            from resmoe_kernels.experts_cuda import experts as by_cuda

            return by_cuda(x, top_k_index, top_k_weights, weights, activation)
        if (missing := _missing("triton")) is not None:
            _warn_once(f"resmoe_kernels: {missing}; layers on a GPU run on the slow reference")
            return _experts_impl(x, top_k_index, top_k_weights, *rest)
        from resmoe_kernels.triton_kernels.experts import declines, experts

        reason = declines_call(x.dtype, activation) or declines(weights, activation)
        if reason is not None:
            _refuse_if_forced("triton", reason)
            _warn_once(_RUNS_ON_REFERENCE.format("triton", reason))
            return _experts_impl(x, top_k_index, top_k_weights, *rest)
        return experts(x, top_k_index, top_k_weights, weights, activation)


def _takes_cuda(x: Tensor, top_k_index: Tensor, weights: FactoredExperts, activation: str) -> bool:
    if _forced not in (None, "cuda") or 0 in top_k_index.shape or not x.is_cuda or _missing("cuda") is not None:
        return False
    if _forced is None and x.shape[0] > cuda_up_to(_sm_of(x.device), weights.mask_down is not None).tokens:
        return False
    from resmoe_kernels.experts_cuda import declines

    reason = declines(x, top_k_index, weights, activation)
    if reason is not None:
        _refuse_if_forced("cuda", reason)
    return reason is None


# ---- who runs where

_extension = sorted(Path(__file__).parent.glob("_C*.so"))
if _extension:
    torch.ops.load_library(str(_extension[0]))
else:
    _log.warning("resmoe_kernels: the C++ extension is not built; every op runs on the plain PyTorch reference")
if has_cpu_kernel("experts_packed") or interprets():
    _lib.impl("experts", _experts_on_cpu, "CPU")
_lib.impl("experts", _experts_on_gpu, "CUDA")
_forced = _checked(os.environ.get("RESMOE_BACKEND", "auto"))
