"""The sparse residual: packing, and expanding it on every backend, against loops over single bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from resmoe_kernels.ops import expand_sparse
from resmoe_kernels.sparse import pack_bitmap, pack_block, pack_mask, popcount, unpack_mask
from tests.oracle import expand, float64

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTHS = [1, 3, 31, 32, 33, 63, 64, 65, 100]  # around every word boundary, and several words
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]

# Small integers make ties and zeros common; int8 steps are exact in every dtype.
numbers = st.integers(-3, 3)


@st.composite
def matrices(draw) -> Tensor:
    rows, width = draw(st.integers(1, 4)), draw(st.sampled_from(WIDTHS))
    return torch.tensor(draw(st.lists(numbers, min_size=rows * width, max_size=rows * width))).view(rows, width).float()


def bits(mask: Tensor, width: int) -> list[list[int]]:
    """Columns that each row stores, read bit by bit from the words as unsigned numbers."""
    rows = [[(word % 2**32) for word in row] for row in mask.tolist()]
    return [[c for c in range(32 * len(row)) if row[c // 32] >> (c % 32) & 1] for row in rows]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(matrices(), st.sampled_from([4, 8, 12, 16]))
def test_block_keeps_the_n_largest_of_every_32(dense, n):
    mask, values = pack_block(dense, n)
    width = dense.shape[1]
    assert mask.shape == (len(dense), -(-width // 32)) and mask.dtype == torch.int32
    assert values.shape == (*mask.shape, n) and values.dtype == dense.dtype
    for row, stored, numbers_of_row in zip(dense.tolist(), bits(mask, width), values.tolist(), strict=True):
        assert all(c < width for c in stored)
        for w, kept_values in enumerate(numbers_of_row):
            columns = range(32 * w, min(32 * w + 32, width))
            # Largest first; of equals the lower column.
            largest = sorted(columns, key=lambda c: (-abs(row[c]), c))[:n]
            kept = [c for c in stored if c in columns]
            assert kept == sorted(largest)
            assert kept_values == [row[c] for c in kept] + [0.0] * (n - len(kept))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(matrices(), st.sampled_from([4, 8, 12, 16]))
def test_block_round_trip(dense, n):
    mask, values = pack_block(dense, n)
    expanded = expand_sparse(mask, values, None, dense.shape[1])
    np.testing.assert_array_equal(expanded.double().numpy(), expand(mask, values, None, dense.shape[1]))
    kept = torch.zeros_like(dense, dtype=torch.bool)
    for i, columns in enumerate(bits(mask, dense.shape[1])):
        kept[i, columns] = True
    assert torch.equal(expanded, dense * kept)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(matrices(), st.integers(0, 3))
def test_bitmap_round_trip(dense, above):
    keep = dense.abs() >= above
    mask, values, row_offsets = pack_bitmap(dense, keep)
    assert mask.dtype == torch.int32 and row_offsets.dtype == torch.int64
    assert bits(mask, dense.shape[1]) == [[c for c, k in enumerate(row) if k] for row in keep.tolist()]
    assert values.tolist() == [
        v for row, ks in zip(dense.tolist(), keep.tolist(), strict=True) for v, k in zip(row, ks, strict=True) if k
    ]
    assert row_offsets.diff().tolist() == keep.sum(1).tolist() and int(row_offsets[0]) == 0
    assert torch.equal(expand_sparse(mask, values, row_offsets, dense.shape[1]), dense * keep)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.booleans(), min_size=1, max_size=100))
def test_mask_round_trip(keep):
    row = torch.tensor(keep)
    mask = pack_mask(row)
    assert bits(mask[None], len(keep)) == [[c for c, k in enumerate(keep) if k]]
    assert torch.equal(unpack_mask(mask, len(keep)), row)
    assert popcount(mask).tolist() == [sum(keep[i : i + 32]) for i in range(0, len(keep), 32)]


@pytest.mark.parametrize("bit", range(32))
def test_single_bits(bit):
    """Every bit has its own column; bit 31 is the sign of an int32 word and must not smear over others."""
    keep = torch.zeros(2, 64, dtype=torch.bool)
    keep[1, 32 + bit] = True
    mask = pack_mask(keep)
    assert mask.tolist() == [[0, 0], [0, -(2**31) if bit == 31 else 2**bit]]
    assert torch.equal(unpack_mask(mask, 64), keep)
    assert popcount(mask).tolist() == [[0, 0], [0, 1]]


def test_full_word():
    mask = pack_mask(torch.ones(1, 32, dtype=torch.bool))
    assert mask.tolist() == [[-1]] and popcount(mask).tolist() == [[32]]


def test_packing_takes_leading_dimensions(generator):
    """A layer packs all its experts at once, and each as if it were alone."""
    dense = torch.randn((3, 5, 45), generator=generator)
    mask, values = pack_block(dense, 8)
    assert mask.shape == (3, 5, 2) and values.shape == (3, 5, 2, 8)
    for e in range(3):
        alone_mask, alone_values = pack_block(dense[e], 8)
        assert torch.equal(mask[e], alone_mask) and torch.equal(values[e], alone_values)


# ---- expand_sparse on every backend


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("layout", ["block", "bitmap-int32", "bitmap-int64"])
def test_expand(backend, generator, layout, width, dtype):
    dense = torch.randn((7, width), generator=generator).to(dtype)
    if layout == "block":
        mask, values = pack_block(dense, 8)
        row_offsets = None
    else:
        keep = torch.rand(dense.shape, generator=generator) < 0.3
        keep[2], keep[4] = False, True  # a row of none, a row of all
        mask, values, row_offsets = pack_bitmap(dense, keep)
        row_offsets = row_offsets.to(getattr(torch, layout.removeprefix("bitmap-")))
    arguments = [None if t is None else t.to(backend.device) for t in (mask, values, row_offsets)]
    got = expand_sparse(*arguments, width)
    assert got.dtype == dtype and got.shape == (7, width) and got.is_contiguous()
    np.testing.assert_array_equal(float64(got), expand(mask, values, row_offsets, width))


def test_expand_a_slice_of_a_larger_bitmap(backend, generator):
    """One expert's rows: their offsets begin above 0 and index the values of the whole layer."""
    dense = torch.randn((12, 45), generator=generator)
    mask, values, row_offsets = pack_bitmap(dense, torch.rand(dense.shape, generator=generator) < 0.3)
    assert int(row_offsets[4]) > 0
    part = [t.to(backend.device) for t in (mask[4:8], values, row_offsets[4:9])]
    np.testing.assert_array_equal(float64(expand_sparse(*part, 45)), expand(mask[4:8], values, row_offsets[4:9], 45))


@pytest.mark.parametrize("layout", ["block", "bitmap"])
def test_expand_no_rows(backend, layout):
    dense = torch.zeros((0, 45), device=backend.device)
    if layout == "block":
        got = expand_sparse(*pack_block(dense, 8), None, 45)
    else:
        got = expand_sparse(*pack_bitmap(dense, dense > 0), 45)
    assert got.shape == (0, 45)


@pytest.mark.parametrize("layout", ["block", "bitmap"])
def test_expand_reads_strided_tensors(backend, generator, layout):
    dense = torch.randn((14, 45), generator=generator).to(backend.device)
    mask, values, *offsets = pack_block(dense, 8) if layout == "block" else pack_bitmap(dense, dense > 0.5)
    row_offsets = offsets[0] if offsets else None
    expected = expand_sparse(mask, values, row_offsets, 45)
    strided_values = values.repeat_interleave(2, dim=-1)[..., ::2]
    strided_offsets = None if row_offsets is None else row_offsets.repeat_interleave(2)[::2]
    assert torch.equal(expand_sparse(mask.T.contiguous().T, strided_values, strided_offsets, 45), expected)


@pytest.mark.parametrize("layout", ["block", "bitmap"])
def test_expand_gradient(backend, generator, layout):
    dense = torch.randn((3, 37), generator=generator, dtype=torch.float64).to(backend.device)
    mask, values, *offsets = pack_block(dense, 8) if layout == "block" else pack_bitmap(dense, dense > 0.5)
    row_offsets = offsets[0] if offsets else None
    assert torch.autograd.gradcheck(lambda v: expand_sparse(mask, v, row_offsets, 37), values.requires_grad_())
