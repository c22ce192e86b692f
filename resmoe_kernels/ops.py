"""Ops: one schema each, one check shared by wrapper and fake; what runs them is chosen above, in dispatch.py.

Every op is registered twice: ``resmoe::<op>``, where compiled kernels override the reference per device, and
``resmoe::<op>_reference``, which is always plain PyTorch. C++ only adds implementations of the first. The order of the
weight form's tensors and sizes in every schema is that of the fields of FactoredExperts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from resmoe_kernels.activations import POINTWISE, check_activation
from resmoe_kernels.derivatives import refuse_forward_mode
from resmoe_kernels.factored import CODED, SIZE_NAMES, SIZE_TYPES, TENSOR_NAMES, FactoredExperts
from resmoe_kernels.parts import payloads_text
from resmoe_kernels.payload import Payload
from resmoe_kernels.sparse import BLOCK, expand_sparse_reference

log = logging.getLogger("resmoe_kernels")
lib = torch.library.Library("resmoe", "DEF")
forced: str | None = None  # by dispatch.backend, process-wide; dynamo guards on it, so a compiled model follows
HIDDEN_SIZE = len(TENSOR_NAMES) + SIZE_NAMES.index("hidden_size")


def define(name: str, schema: str, fake: Callable) -> None:
    for op in (name, f"{name}_reference"):
        lib.define(op + schema)
        torch.library.register_fake(f"resmoe::{op}", fake, lib=lib)


def implement(name: str, reference: Callable) -> None:
    for op in (name, f"{name}_reference"):
        lib.impl(op, reference, "CompositeExplicitAutograd")


def op(name: str) -> Callable:
    return getattr(torch.ops.resmoe, f"{name}_reference" if forced == "reference" else name)


def has_cpu_kernel(op: str) -> bool:
    """Whether the extension, where it is built, has this op."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"resmoe::{op}", "CPU")


lib.define("cpu_isa() -> str")
lib.define("build_info() -> str")
lib.define("decode_limits() -> int[]")  # see experts_cuda.limits
lib.define("assignment(Tensor score, Tensor prices, bool exact) -> (Tensor, Tensor, float, float)")


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
    return op("expand_sparse")(mask.contiguous(), values.contiguous(), offsets, width)  # what compiled kernels read


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


define("expand_sparse", "(Tensor mask, Tensor values, Tensor? row_offsets, int width) -> Tensor", _expand_sparse_fake)
implement("expand_sparse", _expand_sparse_impl)


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
        lib=lib,
    )


# ---- experts: schemas, checks and fakes; implementations are in dispatch.py

_WEIGHTS_ARGUMENTS = ", ".join(
    [f"Tensor? {name}" for name in TENSOR_NAMES] + [f"{kind} {name}" for name, kind in SIZE_TYPES.items()]
)
_EXPERTS_ARGUMENTS = f"Tensor x, Tensor top_k_index, Tensor top_k_weights, {_WEIGHTS_ARGUMENTS}, str activation"


def flatten(weights: FactoredExperts) -> list:
    return [getattr(weights, name) for name in (*TENSOR_NAMES, *SIZE_NAMES)]


def unflatten(flat: Sequence) -> FactoredExperts:
    return FactoredExperts(**dict(zip((*TENSOR_NAMES, *SIZE_NAMES), flat, strict=True)))


def check_experts(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, weights: Sequence, activation: str) -> None:
    """What a call can get wrong; the weights themselves were checked when their FactoredExperts was made."""
    _check_call(x, top_k_index, top_k_weights, weights[HIDDEN_SIZE], activation)
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
    check_experts(x, top_k_index, top_k_weights, flat, activation)
    return x.new_empty(x.shape)


def _experts_backward_fake(grad: Tensor, wanted: Sequence[int], *inputs) -> list[Tensor]:
    return [torch.empty_like(inputs[i]) for i in wanted]


define("experts", f"({_EXPERTS_ARGUMENTS}) -> Tensor", _experts_fake)
# The backward pass is an op of its own, so that a compiled model may contain it: it reads which experts were hit.
define("experts_backward", f"(Tensor grad, int[] wanted, {_EXPERTS_ARGUMENTS}) -> Tensor[]", _experts_backward_fake)
for _name in ("low_rank_decode", "block_sparse_decode"):  # one form each, few tokens: see experts_cuda.py
    lib.define(f"{_name}({_EXPERTS_ARGUMENTS}) -> Tensor")
    torch.library.register_fake(f"resmoe::{_name}", _experts_fake, lib=lib)


# ---- packed: one block of memory that compiled kernels read, see csrc/packed.h

lib.define(f"pack({_WEIGHTS_ARGUMENTS}) -> Tensor")
# sizes: E, H, I, gated, then bits and group of each of CODED, 0 and 0 where it is floats
lib.define("unpack(Tensor packed) -> (Tensor[] tensors, int[] arguments_of_pack, int[] sizes)")
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # of x, and of weights


def pack(weights: FactoredExperts) -> Tensor:
    """The block (bytes,) uint8 of a layer. Raises ValueError where ``check_values`` does, with the same sentences."""
    return pack_flat(flatten(weights))


def pack_flat(weights: Sequence) -> Tensor:
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


def check_experts_packed(
    x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, packed: Tensor, hidden_size: int, activation: str
) -> None:
    _check_call(x, top_k_index, top_k_weights, hidden_size, activation)
    if packed.device != x.device:
        raise ValueError(f"experts: packed must be on x's device {x.device}, got {packed.device}")


def _experts_packed_fake(
    x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, packed: Tensor, hidden_size: int, activation: str
) -> Tensor:
    check_experts_packed(x, top_k_index, top_k_weights, packed, hidden_size, activation)
    return x.new_empty(x.shape)


_PACKED_ARGUMENTS = "Tensor x, Tensor top_k_index, Tensor top_k_weights, Tensor packed, int hidden_size, str activation"
define("experts_packed", f"({_PACKED_ARGUMENTS}) -> Tensor", _experts_packed_fake)
define(
    "experts_packed_backward", f"(Tensor grad, int[] wanted, {_PACKED_ARGUMENTS}) -> Tensor[]", _experts_backward_fake
)


def declines_call(dtype: torch.dtype, activation: str) -> str | None:
    """Why no kernel can serve an x of this dtype under this activation; None if they can."""
    if dtype not in KERNEL_DTYPES:
        return f"x of {str(dtype).removeprefix('torch.')}"
    return None if activation in POINTWISE else f"the gate {activation!r}"


_extension = sorted(Path(__file__).parent.glob("_C*.so"))
if _extension:
    torch.ops.load_library(str(_extension[0]))
else:
    log.warning("resmoe_kernels: the C++ extension is not built; every op runs on the plain PyTorch reference")
