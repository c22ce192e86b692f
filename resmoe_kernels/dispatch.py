"""The choice of backends: which implementation runs an op where, why, and the words for it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial

import torch
from torch import Tensor

from resmoe_kernels import experts_reference, ops
from resmoe_kernels.derivatives import only_first, refuse_forward_mode
from resmoe_kernels.factored import FactoredExperts
from resmoe_kernels.heuristics import cuda_up_to
from resmoe_kernels.packed import PackedExperts
from resmoe_kernels.packed import declines as packed_declines

BACKENDS_OF = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}  # device -> backends of its kernels


@cache
def interprets() -> bool:
    """Whether Triton's kernels run on the CPU, by its interpreter: TRITON_INTERPRET=1 when they are imported."""
    if "TRITON_INTERPRET" not in os.environ or importlib.util.find_spec("triton") is None:
        return False
    from resmoe_kernels.triton_kernels.launch import INTERPRETED

    return INTERPRETED


def missing(backend: str) -> str | None:
    """Why a backend cannot run anything here, None if it can."""
    if backend == "cpu":
        return None if ops.has_cpu_kernel("experts_packed") else "the C++ extension is not built"
    if backend == "cuda":
        if not torch._C._dispatch_has_kernel_for_dispatch_key("resmoe::low_rank_decode", "CUDA"):
            return "the C++ extension is built without CUDA kernels"
        if not torch.cuda.is_available():
            return "torch finds no GPU and its driver"
        major, minor = torch.cuda.get_device_capability()
        if major < 8:
            return f"this GPU is an sm_{major}{minor}, and the kernels need sm_80 or later"
        # These have 99 KiB of shared memory; what they would run, code of sm_80 or PTX of sm_100, fills more.
        if (major, minor) in ((8, 6), (8, 7)) or major == 12:
            return f"this GPU is an sm_{major}{minor}, and no kernel is compiled for its shared memory"
        return None
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if interprets():
        return None
    if not torch.cuda.is_available():
        return "torch finds no GPU and its driver"
    if torch.version.hip is not None:
        # A barrier there does not wait for stores, so that the sums of several programs may miss some of them.
        return "this is an AMD GPU, where the sums that programs share are not ordered yet"
    return None


@cache
def _warn_once(sentence: str) -> None:
    ops.log.warning(sentence)


# ---- backends


def backends() -> tuple[str, ...]:
    """Names of the backends that can run ``resmoe::experts`` here: ``reference``, ``cpu`` where the extension is built,
    ``triton`` where triton is installed and there is a GPU (or TRITON_INTERPRET=1, on CPU tensors and very slowly),
    ``cuda`` where the extension is built with CUDA kernels and there is a GPU that runs them."""
    return ("reference", *(b for device in BACKENDS_OF.values() for b in device if missing(b) is None))


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Runs every op of the block, in every thread, on one backend; ``auto`` is the default choice by device.

    The environment variable RESMOE_BACKEND does the same for a whole process. Raises ValueError, listing what is
    there, if the backend cannot run ``resmoe::experts`` here.
    """
    before, ops.forced = ops.forced, _checked(name)
    try:
        yield
    finally:
        ops.forced = before


def _checked(name: str) -> str | None:
    known = ("auto", *backends())
    if name not in known:
        reason = f" ({missing(name)})" if any(name in names for names in BACKENDS_OF.values()) else ""
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
    backend = ops.forced if ops.forced in BACKENDS_OF["cuda"] else next(iter(BACKENDS_OF.get(device, ())), None)
    if ops.forced == "reference":
        runs = "reference (forced)"
    elif backend is None:
        runs = f"reference (there are no kernels for {device})"
    elif (lacking := missing(backend)) is not None:
        runs = f"reference ({lacking})"
    elif (reason := _declines(backend, form, activation, device, packed)) is not None:
        refused = "refused" if ops.forced == backend else "reference"
        runs = f"{refused} (the {backend} kernels do not serve {reason})"
    elif backend in BACKENDS_OF["cuda"]:
        where = next(iter(form.tensors().values())).device
        return f"resmoe::experts on {device}: {_explain_gpu(backend, form, activation, where)}"
    else:
        anew = "" if packed else "; packed anew for every call, PackedExperts.pack does it once"
        return f"resmoe::experts on {device}: cpu ({ops.cpu_isa()}{anew})"
    lines = [f"resmoe::experts on {device}: {runs}"]
    if any(name.startswith("mask") for name in form.tensors()):
        compiled = device == "cpu" and ops.has_cpu_kernel("expand_sparse") and ops.forced != "reference"
        lines.append(f"resmoe::expand_sparse on {device}: {'cpu' if compiled else runs}")
    return "\n".join(lines)


def _explain_gpu(backend: str, form: FactoredExperts, activation: str, device: torch.device) -> str:
    """The backend that serves a layer, its target, and where both were free to take it, what decides."""
    if backend == "cuda":
        return f"cuda ({_sm_of(device)})"
    from resmoe_kernels.triton_kernels.launch import target_of

    if ops.forced is not None or device.type != "cuda":
        return f"triton ({target_of(device)})"
    if (lacking := missing("cuda")) is not None:
        return f"triton ({target_of(device)}; no cuda: {lacking})"
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
    return packed_declines(form, activation)


def _elsewhere(device: str, packed: bool) -> str | None:
    """Why the Triton kernels cannot read a layer where it is."""
    if packed:
        return "weights packed for the CPU"
    return f"tensors on {device}" if device == "cpu" and not interprets() else None


# ---- the expert layer


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
        return experts_flat(x, top_k_index, top_k_weights, ops.flatten(weights), activation)
    return experts_packed(x, top_k_index, top_k_weights, weights.block, weights.form.hidden_size, activation)


def experts_flat(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, weights: Sequence, activation: str) -> Tensor:
    """``experts`` on the fields of FactoredExperts, in the order TENSOR_NAMES, SIZE_NAMES: a call builds nothing."""
    ops.check_experts(x, top_k_index, top_k_weights, weights, activation)
    if x.device.type != "cpu":
        _refuse_if_forced("cpu", f"x on {x.device}")
    else:
        _refuse_if_forced("cuda", f"x on {x.device}")
    if ops.forced == "triton" and x.device.type == "cpu" and (reason := _elsewhere("cpu", packed=False)) is not None:
        _refuse_if_forced("triton", reason)
    return ops.op("experts")(x, top_k_index, top_k_weights, *weights, activation)


def _experts_impl(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *rest) -> Tensor:
    *flat, activation = rest
    with torch.autocast(x.device.type, enabled=False):  # whose bfloat16 products would break the float32 sums
        return experts_reference.experts(x, top_k_index, top_k_weights, ops.unflatten(flat), activation)


def experts_packed(
    x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, packed: Tensor, hidden_size: int, activation: str
) -> Tensor:
    """``experts`` on a block that ``pack`` returned."""
    ops.check_experts_packed(x, top_k_index, top_k_weights, packed, hidden_size, activation)
    for backend in BACKENDS_OF["cuda"]:
        _refuse_if_forced(backend, "weights packed for the CPU")
    op = ops.op("experts_packed")
    reason = ops.declines_call(x.dtype, activation)
    if reason is not None:
        _refuse_if_forced("cpu", reason)
        op = torch.ops.resmoe.experts_packed_reference
    return op(x, top_k_index, top_k_weights, packed, hidden_size, activation)


def _refuse_if_forced(backend: str, reason: str) -> None:
    if ops.forced == backend:
        raise ValueError(
            f"experts: the {backend} kernels do not serve {reason}; use backend('auto') or backend('reference')"
        )


def _experts_packed_impl(
    x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, packed: Tensor, hidden_size: int, activation: str
) -> Tensor:
    if (reason := ops.declines_call(x.dtype, activation)) is not None and ops.forced is None:
        _warn_once(_RUNS_ON_REFERENCE.format("cpu", reason))
    return _experts_impl(x, top_k_index, top_k_weights, *ops.flatten(ops.unpack(packed)), activation)


_RUNS_ON_REFERENCE = "resmoe_kernels: the {} kernels do not serve {}; such layers run on the slow reference"


# ---- the reference, and its gradients


def _experts_backward_impl(grad: Tensor, wanted: Sequence[int], *inputs) -> list[Tensor]:
    inputs = tuple(i.detach() if isinstance(i, Tensor) else i for i in inputs)
    leaves = [inputs[i].requires_grad_() for i in wanted]
    with torch.enable_grad():
        output = _experts_impl(*inputs)
    grads = torch.autograd.grad(output, leaves, grad, allow_unused=True)  # unused: no token reached that part
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, grads, strict=True)]


def _experts_packed_backward_impl(
    grad: Tensor, wanted: Sequence[int], x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, packed: Tensor, *rest
) -> list[Tensor]:
    weights = ops.flatten(ops.unpack(packed))
    return _experts_backward_impl(grad, wanted, x, top_k_index, top_k_weights, *weights, rest[-1])


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
        torch.library.register_autograd(f"resmoe::{name}", gradients, setup_context=_save_for_backward, lib=ops.lib)


ops.implement("experts", _experts_impl)
ops.implement("experts_backward", _experts_backward_impl)
ops.implement("experts_packed", _experts_packed_impl)
ops.implement("experts_packed_backward", _experts_packed_backward_impl)
_differentiable("experts")
_differentiable("experts_packed")


# ---- kernels


def _experts_on_cpu(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *rest) -> Tensor:
    """``resmoe::experts`` by the kernels that read packed weights."""
    *flat, activation = rest
    if ops.forced == "triton":
        return _experts_on_gpu(x, top_k_index, top_k_weights, *rest)
    if missing("cpu") is not None:
        return _experts_impl(x, top_k_index, top_k_weights, *rest)
    reason = ops.declines_call(x.dtype, activation) or packed_declines(ops.unflatten(flat))
    if reason is not None:
        _refuse_if_forced("cpu", reason)
        _warn_once(_RUNS_ON_REFERENCE.format("cpu", reason))
        return _experts_impl(x, top_k_index, top_k_weights, *rest)
    _warn_once(
        "resmoe_kernels: weights were packed for one call, which takes longer than the call; "
        "PackedExperts.pack(weights), or FactoredExpertsLayer.pack(), keeps them packed"
    )
    packed = ops.pack_flat(flat)
    return torch.ops.resmoe.experts_packed(x, top_k_index, top_k_weights, packed, flat[ops.HIDDEN_SIZE], activation)


def _experts_on_gpu(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *rest) -> Tensor:
    """``resmoe::experts`` by the CUDA kernel where it is asked for or ``heuristics.CUDA_UP_TO`` says so, else by the
    Triton kernels."""
    *flat, activation = rest
    weights = ops.unflatten(flat)
    # Kernels start on the current device; autocast would round the float32 operands of torch's products.
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        if _takes_cuda(x, top_k_index, weights, activation):
            from resmoe_kernels.experts_cuda import experts as by_cuda

            return by_cuda(x, top_k_index, top_k_weights, weights, activation)
        if (lacking := missing("triton")) is not None:
            _warn_once(f"resmoe_kernels: {lacking}; layers on a GPU run on the slow reference")
            return _experts_impl(x, top_k_index, top_k_weights, *rest)
        from resmoe_kernels.triton_kernels.experts import declines, experts

        reason = ops.declines_call(x.dtype, activation) or declines(weights, activation)
        if reason is not None:
            _refuse_if_forced("triton", reason)
            _warn_once(_RUNS_ON_REFERENCE.format("triton", reason))
            return _experts_impl(x, top_k_index, top_k_weights, *rest)
        return experts(x, top_k_index, top_k_weights, weights, activation)


def _takes_cuda(x: Tensor, top_k_index: Tensor, weights: FactoredExperts, activation: str) -> bool:
    if ops.forced not in (None, "cuda") or 0 in top_k_index.shape or not x.is_cuda or missing("cuda") is not None:
        return False
    if ops.forced is None and x.shape[0] > cuda_up_to(_sm_of(x.device), weights.mask_down is not None).tokens:
        return False
    from resmoe_kernels.experts_cuda import declines

    reason = declines(x, top_k_index, weights, activation)
    if reason is not None:
        _refuse_if_forced("cuda", reason)
    return reason is None


if ops.has_cpu_kernel("experts_packed") or interprets():
    ops.lib.impl("experts", _experts_on_cpu, "CPU")
ops.lib.impl("experts", _experts_on_gpu, "CUDA")
ops.forced = _checked(os.environ.get("RESMOE_BACKEND", "auto"))
