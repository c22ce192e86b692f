"""The interpreter that the Triton kernels are tested with: each repair works, and is still needed."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.triton_kernels.interpreter import bfloat16_of, float32_of, gdc_wait, shuffled, stock

pytestmark = pytest.mark.interpreter

NO_LONGER = "this triton is right without it: delete the repair from tests/triton_kernels/interpreter.py"


@triton.jit
def multiply(a_ptr, b_ptr, y_ptr, K: tl.constexpr, PRECISION: tl.constexpr):
    i, k = tl.arange(0, 16), tl.arange(0, K)
    a, b = tl.load(a_ptr + i[:, None] * K + k[None, :]), tl.load(b_ptr + k[:, None] * 16 + i[None, :])
    y = tl.dot(a, b, input_precision=PRECISION)
    tl.store(y_ptr + i[:, None] * 16 + i[None, :], y)


@triton.jit
def cast(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(y_ptr.dtype.element_ty))


@triton.jit
def add(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i) + tl.load(y_ptr + i))


@triton.jit
def copy(x_ptr, y_ptr, count, limit, N: tl.constexpr, FILLED: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    if FILLED:
        x = tl.load(x_ptr + i, mask=i < limit, other=0)
    else:
        x = tl.load(x_ptr + i, mask=i < limit)
    tl.store(y_ptr + i, x, mask=i < count)


def _product_error(dtype: torch.dtype) -> float:
    """The largest error of a product, against float64, in units of the largest entry."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((16, 64), (64, 16)))
    y = torch.empty(16, 16)
    multiply[(1,)](a, b, y, K=64, PRECISION="ieee")
    expected = a.double() @ b.double()
    return float((y - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dot_sums_in_float32(dtype):
    assert _product_error(dtype) < 1e-6


def test_stock_multiplies_the_bits_of_bfloat16():
    with stock():
        assert _product_error(torch.bfloat16) > 1, NO_LONGER


# Halfway cases both ways, just above and below, both signs, subnormals, overflow to infinity.
HALFWAY = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x00018000, 0x00008000, 0x7F7FFFFF, 0])
FLOATS = torch.cat([HALFWAY, HALFWAY + 2**31]).to(torch.uint32).view(torch.float32)
SPECIAL = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, 3.3e38, -3.4e38])


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    cast[(1,)](x, y, N=len(x))
    return y


@pytest.mark.parametrize("x", [FLOATS, SPECIAL], ids=["halfway", "special"])
def test_casts_to_bfloat16_round_to_nearest_even(x):
    expected = x.to(torch.bfloat16)
    got = _cast(x, torch.bfloat16)
    assert torch.equal(got.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(got[numbers].view(torch.int16), expected[numbers].view(torch.int16))


def test_rounding_against_the_bits():
    """1 + 2^-8 lies halfway between 1 and 1 + 2^-7: down to even; 1 + 3 2^-8 halfway again: up to even."""
    x = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20], np.float32)
    assert bfloat16_of(x).tolist() == [0x3F80, 0x3F82, 0x3F81]
    assert float32_of(bfloat16_of(x)).tolist() == [1, 1 + 2**-6, 1 + 2**-7]


def test_stock_truncates_to_bfloat16():
    with stock():
        assert not torch.equal(_cast(FLOATS, torch.bfloat16), FLOATS.to(torch.bfloat16)), NO_LONGER


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_casts_from_bfloat16_are_exact(dtype):
    x = torch.linspace(-3, 3, 16).to(torch.bfloat16)
    assert torch.equal(_cast(x, dtype), x.to(dtype))


def test_bfloat16_adds_values():
    x, y = torch.linspace(-3, 3, 16).to(torch.bfloat16), torch.linspace(1, 2, 16).to(torch.bfloat16)
    expected = x + y
    add[(1,)](x, y, N=16)
    assert torch.equal(y, expected)


def test_float32_dot_must_ask_for_ieee():
    """The interpreter multiplies float32 exactly whatever is asked for; a GPU rounds its operands to tf32."""
    a = torch.zeros(16, 16)
    with pytest.raises(Exception, match="without input_precision"):
        multiply[(1,)](a, a, torch.empty(16, 16), K=16, PRECISION="tf32")


@triton.jit
def promise(x_ptr, y_ptr):
    tl.store(y_ptr, tl.multiple_of(tl.load(x_ptr), 16) + 1)


def test_a_promise_that_is_not_kept_is_an_error():
    y = torch.empty(1, dtype=torch.int32)
    promise[(1,)](torch.tensor([48], dtype=torch.int32), y)
    assert y.item() == 49
    with pytest.raises(Exception, match=r"tl\.multiple_of promises 16, got 40"):
        promise[(1,)](torch.tensor([40], dtype=torch.int32), y)


def test_buffers_come_filled():
    """conftest.py asks torch for it: what a kernel forgets to store must not be zero by chance."""
    assert torch.empty(3).isnan().all() and torch.empty(3, dtype=torch.int32).eq(2**31 - 1).all()


# ---- bounds


def test_bounds_hold_for_views():
    """A tensor's own elements count, not its storage's."""
    x, y = torch.arange(40.0), torch.empty(16)
    copy[(1,)](x[8:24], y, 16, 16, N=16, FILLED=True)
    assert torch.equal(y, torch.arange(8.0, 24))


@pytest.mark.parametrize(
    "count, limit, sentence",
    [
        (16, 17, "load out of bounds of x_ptr (16 elements): element 16 in program 1"),
        (17, 16, "store out of bounds of y_ptr (16 elements): element 16 in program 1"),
    ],
)
def test_an_access_out_of_bounds_is_an_error(count, limit, sentence):
    x, y = torch.zeros(40), torch.zeros(40)  # one element past the view there is memory, so only the check can see it
    with pytest.raises(Exception, match=re.escape(sentence)):
        copy[(2,)](x[8:24], y[8:24], count, limit, N=16, FILLED=True)


def test_masked_lanes_without_other_are_not_zero():
    """Stock gives zeros there, so that a mask that forgot its ``other`` looks right."""
    x, y = torch.ones(16), torch.empty(16)
    copy[(1,)](x, y, 16, 5, N=16, FILLED=False)
    assert y[:5].eq(1).all() and y[5:].isnan().all()
    copy[(1,)](x, y, 16, 5, N=16, FILLED=True)
    assert y[:5].eq(1).all() and y[5:].eq(0).all()


# ---- order


@triton.jit
def sum_by_splits(x_ptr, parts_ptr, counter_ptr, y_ptr, FAULT: tl.constexpr):
    """Each program stores a part; the last to arrive adds all of them."""
    program, i = tl.program_id(0), tl.arange(0, 16)
    tl.store(parts_ptr + program * 16 + i, tl.load(x_ptr + program * 16 + i))
    if FAULT != "no barrier":
        tl.debug_barrier()
    if FAULT == "relaxed":
        arrived = tl.atomic_add(counter_ptr, 1, sem="relaxed")
    elif FAULT == "acquire":
        arrived = tl.atomic_add(counter_ptr, 1, sem="acquire")
    else:
        arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel")
    if FAULT == "late store":
        tl.store(parts_ptr + program * 16 + i, tl.load(x_ptr + program * 16 + i))
    if FAULT == "own store":
        tl.store(parts_ptr + program * 16 + i, tl.load(parts_ptr + program * 16 + i))
        tl.load(parts_ptr + program * 16 + i)
    if FAULT == "no counter" or arrived == 3:
        total = tl.zeros((16,), tl.float32)
        for p in range(4):
            total += tl.load(parts_ptr + p * 16 + i)
        tl.store(y_ptr + i, total)


def _sum(fault: str = "none") -> None:
    x, y = torch.arange(64.0).view(4, 16), torch.empty(16)
    sum_by_splits[(4,)](x, torch.empty(4, 16), torch.zeros(1, dtype=torch.int32), y, FAULT=fault)
    assert torch.equal(y, x.sum(0))


def test_programs_ordered_by_an_atomic_are_no_race():
    _sum()
    for seed in range(3):
        with shuffled(seed):
            _sum()


@pytest.mark.parametrize(
    "fault, sentence",
    [
        ("no barrier", "a release without tl.debug_barrier before it"),
        ("relaxed", "race: program 3 reads what program 0 has stored, in parts_ptr (64 elements)"),
        ("acquire", "race: program 3 reads what program 0 has stored, in parts_ptr (64 elements)"),
        ("late store", "race: program 3 reads what program 0 has stored, in parts_ptr (64 elements)"),
        ("no counter", "race: program 1 writes what program 0 has read, in parts_ptr (64 elements)"),
        ("own store", "program 0 reads parts_ptr (64 elements) where it has stored itself, and no tl.debug_barrier"),
    ],
)
def test_a_race_is_an_error(fault, sentence):
    with pytest.raises(Exception, match=re.escape(sentence)):
        _sum(fault)


@triton.jit
def shift(x_ptr, y_ptr, TWICE: tl.constexpr):
    """x[i] = x[i + 16]: each program reads what the next one writes; or all write the first 16 elements of y."""
    program, i = tl.program_id(0), tl.arange(0, 16)
    if TWICE:
        tl.store(y_ptr + i // 2, i)
    else:
        tl.store(x_ptr + program * 16 + i, tl.load(x_ptr + program * 16 + 16 + i))


@pytest.mark.parametrize("seed", range(3))
def test_a_store_after_another_programs_read_is_a_race(seed):
    with shuffled(seed), pytest.raises(Exception, match=r"race: program . (reads|writes) what program . has"):
        shift[(3,)](torch.zeros(64), torch.zeros(16), TWICE=False)


def test_one_store_to_the_same_element_twice_is_an_error():
    with pytest.raises(Exception, match=r"one store writes an element of y_ptr .* more than once"):
        shift[(1,)](torch.zeros(64), torch.zeros(16), TWICE=True)


@triton.jit
def first(x_ptr, y_ptr):
    i = tl.arange(0, 16)
    tl.store(y_ptr + i, tl.load(x_ptr + i))


@triton.jit
def second(x_ptr, y_ptr, z_ptr, FAULT: tl.constexpr):
    i = tl.arange(0, 16)
    x = tl.load(x_ptr + i)  # no launch writes it: it may be read ahead of time
    if FAULT == "read":
        x += tl.load(y_ptr + i)
    if FAULT == "write":
        tl.store(z_ptr + i, x)
    if FAULT != "no wait":
        gdc_wait()
        tl.store(z_ptr + i, x + tl.load(y_ptr + i))


@pytest.mark.parametrize(
    "fault, sentence",
    [
        ("none", None),
        ("read", "second: y_ptr (16 elements) is read before gdc_wait, while a launch ahead may write it"),
        ("write", "second: z_ptr (16 elements) is written before gdc_wait"),
        ("no wait", "second: program 0 ends without gdc_wait"),
    ],
)
def test_overlapping_launches_wait(fault, sentence):
    x, y, z = torch.ones(16), torch.empty(16), torch.empty(16)
    first[(1,)](x, y)
    if sentence is None:
        second[(1,)](x, y, z, FAULT=fault, launch_pdl=True)
        assert z.eq(2).all()
    else:
        with pytest.raises(Exception, match=re.escape(sentence)):
            second[(1,)](x, y, z, FAULT=fault, launch_pdl=True)
