"""The C++ extension: built, registered, right for every dtype and layout, and plain about what it refuses."""

import random
import re
import shutil
import subprocess
import sys

import pytest
import torch

import resmoe_kernels.ops  # noqa: F401  defines the schema and loads the extension
from resmoe_kernels.experts_cuda import limits

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def expand_sparse(mask, values, row_offsets, width):
    """The op itself: the package's wrapper checks first and would hide the extension's own checks."""
    return torch.ops.resmoe.expand_sparse(mask, values, row_offsets, width)


def make(seed: int, rows: int, width: int, density: float, dtype: torch.dtype):
    """mask, block values, bitmap values, row_offsets and the dense matrix they stand for, by plain loops."""
    rng = random.Random(seed)
    words = -(-width // 32)
    # Rows cycle through: as dense as asked, empty, full.
    stored = [[(rng.random() < density, False, True)[row % 3] for _ in range(width)] for row in range(rows)]
    dense = [[rng.choice([-1, 1]) * rng.randint(1, 200) if s else 0 for s in row] for row in stored]
    mask, by_word, bitmap, row_offsets = [], [], [], [0]
    for row, is_stored in zip(dense, stored, strict=True):
        mask.append([])
        for word in range(words):
            columns = [c for c in range(32 * word, min(32 * word + 32, width)) if is_stored[c]]
            bits = sum(1 << (c - 32 * word) for c in columns)
            mask[-1].append(bits - 2**32 if bits >= 2**31 else bits)
            by_word.append([row[c] for c in columns])
            bitmap += by_word[-1]
        row_offsets.append(len(bitmap))
    n = max(map(len, by_word), default=0)
    block = [values + [0] * (n - len(values)) for values in by_word]
    return (
        torch.tensor(mask, dtype=torch.int32).reshape(rows, words),
        torch.tensor(block, dtype=dtype).reshape(rows, words, n),
        torch.tensor(bitmap, dtype=dtype),
        torch.tensor(row_offsets),
        torch.tensor(dense, dtype=dtype).reshape(rows, width),
    )


def test_the_extension_is_built_and_registered_for_cpu():
    assert torch._C._dispatch_has_kernel_for_dispatch_key("resmoe::expand_sparse", "CPU")


def test_the_extension_says_what_was_built():
    built = torch.ops.resmoe.build_info()
    assert re.fullmatch(r"CPU kernels \(portable.*\)( only: .+| and CUDA kernels \(sm_.*; nvcc [0-9.]+\))", built)
    assert torch.ops.resmoe.cpu_isa() in built


def test_the_limits_of_the_cuda_kernels_are_told_with_or_without_them(repo):
    text = (repo / "csrc" / "cuda" / "decode_call.h").read_text()
    found = re.findall(r"constexpr int32_t kMax(\w+) = (\d+);", text)
    assert found == list(zip(("Tokens", "Pairs", "Experts"), map(str, limits()), strict=True))


@pytest.mark.skipif(not sys.platform.startswith("linux") or not shutil.which("readelf"), reason="needs readelf")
def test_the_extension_needs_no_cuda_and_shows_none(repo):
    """Built with CUDA kernels, it loads where no driver and no CUDA library is, and no other CUDA runtime can take the
    place of the one inside it."""
    (library,) = (repo / "resmoe_kernels").glob("_C*.so")

    def read(*arguments: str) -> list[str]:
        done = subprocess.run(["readelf", *arguments, "--wide", library], capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    needed = [line for line in read("--dynamic") if "(NEEDED)" in line]
    assert any("libtorch_cpu.so" in line for line in needed)
    assert not [line for line in needed if re.search(r"libcud|libtorch_cuda|libc10_cuda|libnv", line)]
    symbols = "\n".join(read("--dyn-syms"))
    assert "aoti_torch_get_dtype" in symbols
    assert not re.search(r" _*(cuda|cu[A-Z])\w*", symbols)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows, width",
    [
        (7, 1),  # one column
        (7, 31),  # a word with one column missing
        (7, 32),  # exactly one word
        (7, 33),  # one column in the last word
        (5, 200),  # odd tail over several words
        (0, 40),  # no rows
        (3, 0),  # no columns
        (3000, 70),  # enough elements for more than one thread
    ],
)
def test_both_layouts_match_plain_loops(dtype, rows, width):
    mask, block, bitmap, row_offsets, dense = make(rows + width, rows, width, 0.3, dtype)
    for out in (
        expand_sparse(mask, block, None, width),
        expand_sparse(mask, bitmap, row_offsets, width),
        expand_sparse(mask, bitmap, row_offsets.int(), width),
    ):
        assert out.dtype == dtype
        assert torch.equal(out, dense)


def test_bitmap_offsets_may_be_a_slice_of_a_larger_array():
    mask, _, bitmap, row_offsets, dense = make(1, 9, 50, 0.5, torch.float32)
    out = expand_sparse(mask[3:6], bitmap, row_offsets[3:7], 50)
    assert row_offsets[3] > 0
    assert torch.equal(out, dense[3:6])


def test_values_are_moved_bit_by_bit():
    special = torch.tensor([float("nan"), float("inf"), -0.0, 5e-324], dtype=torch.float64)
    mask = torch.tensor([[0b100110000001]], dtype=torch.int32)
    out = expand_sparse(mask, special.reshape(1, 1, 4), None, 12)
    assert torch.equal(out[0, [0, 7, 8, 11]].view(torch.int64), special.view(torch.int64))


def one_row(**changed):
    """Arguments of a right call, three bits in one row of 40 columns, with some of them replaced."""
    arguments = {
        "mask": torch.tensor([[0b101, 0b1]], dtype=torch.int32),
        "values": torch.ones(1, 2, 2),
        "row_offsets": None,
        "width": 40,
    }
    return {**arguments, **changed}


def bitmap_row(**changed):
    return one_row(**{"values": torch.ones(3), "row_offsets": torch.tensor([0, 3]), **changed})


@pytest.mark.parametrize(
    "arguments, message",
    [
        (one_row(width=-1), "width must be at least 0, got -1"),
        (one_row(width=70), r"mask must be \(N, 3\) contiguous int32 for width 70, got \(1, 2\) Int"),
        (one_row(mask=torch.zeros(2, dtype=torch.int32)), r"mask must be \(N, 2\) .* got \(2,\) Int"),
        (one_row(mask=torch.zeros(1, 2, dtype=torch.int64)), r"mask must be .* got \(1, 2\) Long"),
        (
            one_row(mask=torch.zeros(2, 4, dtype=torch.int32)[:, ::2]),
            r"mask must be .* got \(2, 2\) Int, not contiguous",
        ),
        (
            one_row(values=torch.ones(1, 2, 2, dtype=torch.int16)),
            r"values must be bfloat16, float16, float32 or float64, got \(1, 2, 2\) Short",
        ),
        (
            one_row(values=torch.ones(3)),
            r"values must be \(1, 2, n\) contiguous where row_offsets is None, got \(3,\) Float",
        ),
        (one_row(values=torch.ones(1, 3, 2)), r"values must be \(1, 2, n\) .* got \(1, 3, 2\) Float"),
        (one_row(values=torch.ones(2, 2, 2)), r"values must be \(1, 2, n\) .* got \(2, 2, 2\) Float"),
        (
            one_row(values=torch.ones(1, 2, 4)[:, :, ::2]),
            r"values must be \(1, 2, n\) .* got \(1, 2, 2\) Float, not contiguous",
        ),
        (
            bitmap_row(values=torch.ones(1, 2, 2)),
            r"values must be \(nnz,\) contiguous where row_offsets are given, got \(1, 2, 2\) Float",
        ),
        (
            bitmap_row(values=torch.ones(6)[::2]),
            r"values must be \(nnz,\) .* got \(3,\) Float, not contiguous",
        ),
        (
            bitmap_row(row_offsets=torch.tensor([0, 2, 3])),
            r"row_offsets must be \(2,\) contiguous int32 or int64, one more than mask has rows, "
            r"got \(3,\) Long",
        ),
        (bitmap_row(row_offsets=torch.tensor([[0], [3]])), r"row_offsets must be .* got \(2, 1\) Long"),
        (bitmap_row(row_offsets=torch.tensor([0.0, 3.0])), r"row_offsets must be .* got \(2,\) Float"),
        (
            bitmap_row(row_offsets=torch.tensor([0, 9, 3])[::2]),
            r"row_offsets must be .* got \(2,\) Long, not contiguous",
        ),
        (
            one_row(width=34, mask=torch.tensor([[0, 0b100]], dtype=torch.int32)),
            "mask must have no bit at or past column 34, the width, got one in row 0",
        ),
        (
            one_row(mask=torch.tensor([[0b111, 0]], dtype=torch.int32)),
            "mask must have at most 2 bits in a word, the places values has for it, got 3 in row 0",
        ),
        (
            bitmap_row(mask=torch.tensor([[-1, 0]], dtype=torch.int32)),
            "mask must have as many bits in a row as row_offsets gives it values, got 32 bits and 3 values in row 0",
        ),
        (
            bitmap_row(row_offsets=torch.tensor([1, 4])),
            "row_offsets must ascend within 0 and 3, the length of values, got 1 and 4 for row 0",
        ),
        (
            bitmap_row(row_offsets=torch.tensor([-3, 0], dtype=torch.int32)),
            "row_offsets must ascend within 0 and 3, the length of values, got -3 and 0 for row 0",
        ),
    ],
)
def test_what_is_wrong_is_refused_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=f"^expand_sparse: {message}$"):
        expand_sparse(**arguments)


@pytest.mark.parametrize(
    "wrong_rows",
    [
        [3, 199_999],  # with threads, the lower row is found first
        [99_990, 100_001],  # the lower row, the end of one thread's share, is found last
    ],
)
def test_the_lowest_wrong_row_is_named_whatever_the_threads(wrong_rows):
    mask = torch.zeros(200_000, 3, dtype=torch.int32)
    mask[wrong_rows, 2] = -1  # 6 columns in the last word, 32 bits
    with pytest.raises(ValueError, match=rf"got one in row {wrong_rows[0]}$"):
        expand_sparse(mask, torch.zeros(200_000, 3, 1, dtype=torch.bfloat16), None, 70)
