"""Bits do not depend on the number of threads, shown with a library of which every product and sum does."""

from __future__ import annotations

import pytest
import torch

from resmoe_kernels import products
from resmoe_kernels.products import product, symmetric, total
from tests.threaded_library import threads


def test_the_library_does_what_is_said_of_it():
    a = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    for function in (
        lambda: a @ a,
        lambda: torch.addmm(a, a, a),
        lambda: a[None] @ a[None],
        lambda: torch.linalg.eigh(a @ a.T)[0],
        lambda: torch.linalg.cholesky(a @ a.T + 100 * torch.eye(64)),
        lambda: a.repeat(8, 8).sum(),
        lambda: torch.nn.functional.silu(a.repeat(8, 8)),
    ):
        results = []
        for count in (1, 2, 3):
            with threads(count):
                results.append(function())
        assert not torch.equal(results[0], results[1]) and not torch.equal(results[1], results[2])


# ---- the functions

SHAPES = [
    (7, 5, 3),  # on this thread
    (300, 500, 2100),  # blocks of both
    (600, 4096, 40),  # long sums and a small result: what libraries share out by columns
    (1, 3000, 3000),
    (0, 5, 3),
    (3, 0, 5),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product(shape, dtype):
    M, K, N = shape
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(s, generator=generator).to(dtype) for s in ((M, K), (N, K)))
    results = []
    for count in (1, 2, 5):
        with threads(count):
            results.append(product(left, right.T))
    assert all(torch.equal(results[0], other) for other in results[1:])
    expected = left.double() @ right.double().T
    torch.testing.assert_close(results[0].double(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-3)


def test_product_of_batches_and_into_a_view():
    generator = torch.Generator().manual_seed(2)
    left, right = torch.randn(700, 3, 8, generator=generator), torch.randn(700, 8, 5, generator=generator)
    with threads(3):
        found = product(left, right)
    torch.testing.assert_close(found, left @ right)
    large = torch.full((40, 60), torch.nan)
    with threads(2):
        assert product(left[0], right[0], out=large[3:6, 10:15]) is not None
    torch.testing.assert_close(large[3:6, 10:15], left[0] @ right[0])
    assert large.isnan().sum() == 40 * 60 - 15


@pytest.mark.parametrize("size", [1, 100, 512, 1100])
def test_symmetric(size):
    left = torch.randn(300, size, generator=torch.Generator().manual_seed(3))
    results = []
    for count in (1, 3):
        with threads(count):
            results.append(symmetric(left, left))
    assert torch.equal(*results) and torch.equal(results[0], results[0].T)
    torch.testing.assert_close(results[0], left.T @ left, rtol=1e-4, atol=1e-4)


def test_total():
    values = torch.randn(5, 30_001, generator=torch.Generator().manual_seed(4))
    found = []
    for count in (1, 2, 3):
        with threads(count):
            found.append(total(values))
    assert found[0] == found[1] == found[2] == pytest.approx(float(values.double().sum()), rel=1e-9)
    assert total(torch.tensor([])) == 0 and total(torch.tensor(3.0)) == 3


def test_where_a_gradient_is_wanted_it_is_kept():
    left = torch.randn(300, 4000, generator=torch.Generator().manual_seed(5)).requires_grad_()
    right = torch.ones(4000, 40)
    product(left, right).sum().backward()
    torch.testing.assert_close(left.grad, torch.full((300, 4000), 40.0))


def test_inference_mode_is_that_of_the_caller():
    with torch.inference_mode(), threads(3):
        assert product(torch.ones(300, 4000), torch.ones(4000, 40)).is_inference()


def test_a_fault_in_a_block_is_raised():
    with pytest.raises(RuntimeError, match="same dtype"), threads(3):
        product(torch.ones(600, 4096), torch.ones(4096, 40).double())


def test_blocks_run_on_the_threads_there_are(monkeypatch):
    made = []
    monkeypatch.setattr(products, "_pool", lambda count: made.append(count) or pool)
    pool = products.ThreadPoolExecutor(3, initializer=lambda: torch.set_num_threads(1))
    with threads(3):
        product(torch.ones(1000, 100), torch.ones(100, 2000))
        product(torch.ones(300, 4000), torch.ones(4000, 40))  # two blocks
        product(torch.ones(8, 8), torch.ones(8, 8))
    assert made == [3, 2]
