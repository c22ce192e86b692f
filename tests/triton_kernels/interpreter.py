"""Triton's interpreter, made fit to test kernels with: bfloat16 repaired, and blind spots turned into errors.

The interpreter runs a kernel's programs one after another as numpy operations. As it comes it takes bfloat16 for the
uint16 its bits are stored in, gives zeros where a masked load leaves the hardware free to give anything, and sees
neither a read out of bounds nor a race (interpreter_memory.py). It patches private classes of Triton, so
test_triton_interpreter.py holds each repair to what it is for, and says when one is needed no longer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

from tests.triton_kernels.interpreter_memory import Memory

FLOATS = (tl.float16, tl.float32, tl.float64)
_np_dtypes: dict[str, np.dtype] = {}
_shapes: dict[str, tuple] = {}
_block_types: dict[tuple, dict] = {}
_memory = Memory("")
_patched: set[Callable]  # the device functions whose module is patched for the running launch
_order: Callable[[int], np.ndarray] = np.arange


def float32_of(bits: np.ndarray) -> np.ndarray:
    """bfloat16, stored as uint16 -> its values."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def bfloat16_of(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 stored as uint16, rounded to nearest, ties to even; torch's own conversion."""
    rounded = torch.from_numpy(np.array(values, dtype=np.float32)).to(torch.bfloat16)
    return rounded.view(torch.uint16).numpy()


def _is_bfloat16(*handles: TensorHandle) -> bool:
    return any(h.dtype.scalar == tl.bfloat16 for h in handles)


def _values(handle: TensorHandle) -> np.ndarray:
    return float32_of(handle.data) if _is_bfloat16(handle) else handle.data


# ---- arithmetic


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    assert a.dtype.scalar != tl.float32 or input_precision == interpreter._ir.INPUT_PRECISION.IEEE, (
        'dot of float32 operands without input_precision="ieee": a GPU would round them to tf32'
    )
    if _is_bfloat16(a, b):
        return TensorHandle(np.matmul(_values(a), _values(b)) + d.data, d.dtype.scalar)
    return _stock["create_dot"](self, a, b, d, input_precision, max_num_imprecise_acc)


def _binary(self, lhs, rhs, op):
    if not _is_bfloat16(lhs, rhs):
        return _stock["binary_op"](self, lhs, rhs, op)
    result = op(_values(lhs), _values(rhs))
    return TensorHandle(result, tl.int1) if result.dtype == bool else TensorHandle(bfloat16_of(result), tl.bfloat16)


def _cast(self, src, dst_type):
    source, target = src.dtype.scalar, dst_type.scalar
    if source == tl.bfloat16 and target in FLOATS:
        return TensorHandle(float32_of(src.data).astype(interpreter._get_np_dtype(target)), target)
    if target == tl.bfloat16 and source in FLOATS:
        return TensorHandle(bfloat16_of(src.data.astype(np.float32)), target)
    assert source == target or tl.bfloat16 not in (source, target), f"{source} -> {target} is not repaired"
    return _stock["cast_impl"](self, src, dst_type)


def _refuse_bfloat16(name: str) -> Callable:
    def op(self, *arguments):
        assert not _is_bfloat16(*(a for a in arguments if isinstance(a, TensorHandle))), (
            f"{name} of bfloat16 is not repaired: cast to float32 first"
        )
        return _stock[name](self, *arguments)

    return op


# ---- memory


def _load(self, ptrs, mask, other, cache_modifier, eviction_policy, is_volatile):
    handle = TensorHandle(_memory.load(ptrs.data, mask.data), ptrs.dtype)
    if other is None:  # what masked lanes hold is for the hardware to choose
        other = _poison(ptrs.get_element_ty(), ptrs.data.shape)
    return _stock["create_masked_load"](self, handle, mask, other, cache_modifier, eviction_policy, is_volatile)


def _poison(dtype: tl.dtype, shape: tuple[int, ...]) -> TensorHandle:
    numbers = interpreter._get_np_dtype(dtype)
    if dtype == tl.bfloat16:
        value = 0x7FC0
    elif dtype.is_floating():
        value = np.nan
    else:
        value = dtype == tl.int1 or np.iinfo(numbers).max // 3
    return TensorHandle(np.full(shape, value, numbers), dtype)


def _store(self, ptrs, value, mask, cache_modifier, eviction_policy):
    handle = TensorHandle(_memory.store(ptrs.data, mask.data, value.data), ptrs.dtype)
    return _stock["create_masked_store"](self, handle, value, mask, cache_modifier, eviction_policy)


def _atomic_rmw(self, rmw_op, ptr, value, mask, sem, scope):
    handle = TensorHandle(_memory.atomic(ptr.data, mask.data, sem), ptr.dtype)
    return _stock["create_atomic_rmw"](self, rmw_op, handle, value, mask, sem, scope)


def _atomic_cas(self, ptr, cmp, value, sem, scope):
    handle = TensorHandle(_memory.atomic(ptr.data, np.ones_like(ptr.data, bool), sem), ptr.dtype)
    return _stock["create_atomic_cas"](self, handle, cmp, value, sem, scope)


def gdc_wait() -> None:
    """In the place of Triton's, which is inline assembly; see ``Memory``."""
    _memory.wait()


def _set_attr(self, key, value):
    """tl.multiple_of: a promise that a GPU builds wide loads on, and that nobody checks."""
    if key == "tt.divisibility":
        assert self.data.size == 1, "only promises about one number are checked"
        assert self.data.item() % value[0] == 0, f"tl.multiple_of promises {value[0]}, got {self.data.item()}"
    _stock["set_attr"](self, key, value)


# ---- launches


def _run(self, *arguments, **keywords):
    global _memory, _patched
    overlaps = keywords.get("launch_pdl", False)
    unfinished = _memory.unfinished | _memory.stored if overlaps else set()
    _memory, _patched = Memory(self.fn.__name__, overlaps, unfinished), set()
    for name, argument in zip(self.arg_names, arguments, strict=False):
        if isinstance(argument, torch.Tensor):
            _memory.names[argument.data_ptr()] = name
    _stock["__call__"](self, *arguments, **keywords)
    _memory.end_program()


def _convert(argument):
    converted = _stock["_implicit_cvt"](argument)
    if isinstance(argument, torch.Tensor):
        converted.handle.data = _memory.pointer(argument)
    return converted


def _patch_lang(fn):
    """Once per device function and launch: stock does it at every call, also of tl.sum."""
    if fn in _patched:
        return None
    _patched.add(fn)
    return _stock["_patch_lang"](fn)


def _set_grid_idx(self, *index):
    count = int(np.prod(self.grid_dim))
    program = int(_order(count)[np.ravel_multi_index(index, self.grid_dim)])
    _memory.start(program)
    _stock["set_grid_idx"](self, *(int(i) for i in np.unravel_index(program, self.grid_dim)))


def _np_dtype(dtype: tl.dtype) -> np.dtype:
    """Stock builds the whole table at every call."""
    if dtype.name not in _np_dtypes:
        _np_dtypes[dtype.name] = _stock["_get_np_dtype"](dtype)
    return _np_dtypes[dtype.name]


def _init_tensor(self, handle, type):
    """What it derives from its type, once for each type; so for block types below."""
    if type.name not in _shapes:
        _stock["tensor"](self, handle, type)
        _shapes[type.name] = self.numel, self.shape
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.numel, self.shape = _shapes[type.name]


def _init_block_type(self, element_ty, shape):
    key = (element_ty.name, *(getattr(n, "value", n) for n in shape))
    if key not in _block_types:
        _stock["block_type"](self, element_ty, shape)
        _block_types[key] = dict(self.__dict__)
    self.__dict__.update(_block_types[key])


@contextmanager
def shuffled(seed: int) -> Iterator[None]:
    """Runs the programs of every launch in another order: results must not depend on it, nor may a race hide."""
    global _order
    before, _order = _order, lambda count: np.random.default_rng(seed).permutation(count)
    try:
        yield
    finally:
        _order = before


# (of what, what) -> its repair
_REPAIRS: dict[tuple[object, str], object] = {
    (InterpreterBuilder, "create_dot"): _dot,
    (InterpreterBuilder, "binary_op"): _binary,
    (InterpreterBuilder, "cast_impl"): _cast,
    (InterpreterBuilder, "unary_op"): _refuse_bfloat16("unary_op"),
    (InterpreterBuilder, "create_fma"): _refuse_bfloat16("create_fma"),
    (InterpreterBuilder, "create_masked_load"): _load,
    (InterpreterBuilder, "create_masked_store"): _store,
    (InterpreterBuilder, "create_atomic_rmw"): _atomic_rmw,
    (InterpreterBuilder, "create_atomic_cas"): _atomic_cas,
    (InterpreterBuilder, "create_barrier"): lambda self: _memory.barrier(),
    (InterpreterBuilder, "set_grid_idx"): _set_grid_idx,
    (TensorHandle, "set_attr"): _set_attr,
    (GridExecutor, "__call__"): _run,
    (interpreter, "_implicit_cvt"): _convert,
    # For speed alone, from here on: it halves the time of a launch.
    (interpreter, "_patch_lang"): _patch_lang,
    (interpreter, "_get_np_dtype"): _np_dtype,
    (GridExecutor, "_restore_args_dev"): lambda self, *_: None,  # copies CPU memory onto itself
    # Without a check of integers for overflow, whose finding is dropped.
    (interpreter.interpreter_builder, "options"): interpreter.InterpreterOptions(sanitize_overflow=False),
    (tl.tensor, "__init__"): _init_tensor,
    (tl.block_type, "__init__"): _init_block_type,
}
_stock = {owner.__name__ if name == "__init__" else name: getattr(owner, name) for owner, name in _REPAIRS}


def repair() -> None:
    """From here on, for the whole process."""
    np.seterr(over="ignore")  # infinity, as on a GPU
    for (owner, name), repaired in _REPAIRS.items():
        setattr(owner, name, repaired)


@contextmanager
def stock() -> Iterator[None]:
    """The interpreter as it comes, to see what is still wrong with it."""
    for (owner, name), as_it_comes in zip(_REPAIRS, _stock.values(), strict=True):
        setattr(owner, name, as_it_comes)
    try:
        yield
    finally:
        repair()
