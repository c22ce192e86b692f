"""The truncated SVD against numpy's."""

import numpy as np
import pytest
import torch

from resmoe_kernels.python_ops.svd import truncated_svd


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (64, 64)])
@pytest.mark.parametrize("rank", [16, 48, 64])
def test_truncated_svd_is_as_good_as_numpys_in_float64(shape, rank):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, v, sigma = truncated_svd(matrix, rank)
    exact = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(sigma.numpy(), exact[:rank], rtol=1e-10)
    lost = float((matrix.double() - u.T @ v).square().sum())
    assert lost == pytest.approx(float((exact[rank:] ** 2).sum()), rel=1e-10, abs=1e-20)


def test_truncated_svd_finds_triplets_far_below_the_largest():
    # In float32 a Gram matrix would lose all below 3e-4 of the largest.
    generator = torch.Generator().manual_seed(2)
    left, right = (torch.linalg.qr(torch.randn(n, 16, generator=generator).double()).Q for n in (80, 64))
    scale = torch.logspace(0, -6, 16, dtype=torch.float64)
    u, v, sigma = truncated_svd(left * scale @ right.T, 16)
    torch.testing.assert_close(sigma, scale, rtol=1e-3, atol=0)
    torch.testing.assert_close(u.T @ v, left * scale @ right.T, rtol=0, atol=1e-9)


def test_truncated_svd_is_balanced():
    u, v, sigma = truncated_svd(1e4 * torch.randn(40, 24, generator=torch.Generator().manual_seed(3)), 16)
    for factor_ in (u, v):
        torch.testing.assert_close(factor_.square().sum(1), sigma)


def test_truncated_svd_pads_beyond_full_rank_with_zeros():
    matrix = torch.randn(20, 40, generator=torch.Generator().manual_seed(4))
    u, v, sigma = truncated_svd(matrix, 32)
    assert (u.shape, v.shape) == ((32, 20), (32, 40))
    assert not u[20:].any() and not v[20:].any() and not sigma[20:].any()
    torch.testing.assert_close(u.T @ v, matrix.double(), rtol=0, atol=1e-12)


def test_truncated_svd_of_zeros_is_zeros():
    u, v, _ = truncated_svd(torch.zeros(32, 16), 16)
    assert not u.any() and not v.any()
