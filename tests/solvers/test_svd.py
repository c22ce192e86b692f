"""The truncated SVD: exact against numpy's, filtered against exact."""

import csv
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from resmoe_kernels.python_ops.solvers import subspace, svd
from resmoe_kernels.python_ops.solvers.svd import exact_svd, filtered_svd, truncated_svd


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


@pytest.mark.parametrize("function", [exact_svd, filtered_svd])
def test_svd_is_balanced(function):
    u, v, sigma = function(1e4 * torch.randn(200, 120, generator=torch.Generator().manual_seed(3)), 16)[:3]
    for factor_ in (u, v):
        torch.testing.assert_close(factor_.square().sum(1).double(), sigma, rtol=1e-5, atol=0)


def test_truncated_svd_pads_beyond_full_rank_with_zeros():
    matrix = torch.randn(20, 40, generator=torch.Generator().manual_seed(4))
    u, v, sigma = truncated_svd(matrix, 32)
    assert (u.shape, v.shape) == ((32, 20), (32, 40))
    assert not u[20:].any() and not v[20:].any() and not sigma[20:].any()
    torch.testing.assert_close(u.T @ v, matrix.double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(32, 16), (600, 530)])
@pytest.mark.parametrize(("value", "rank"), [(0, 16), (0, 0), (1, 0)])
def test_svd_of_nothing_is_nothing(shape, value, rank):
    for function in (truncated_svd, filtered_svd):
        u, v, sigma = function(torch.full(shape, float(value)), rank)[:3]
        assert (u.shape, v.shape, sigma.shape) == ((rank, shape[0]), (rank, shape[1]), (rank,))
        assert not u.any() and not v.any() and not sigma.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_svd_of_what_is_not_finite(bad):
    matrix = torch.ones(32, 16)
    matrix[3, 4] = bad
    with pytest.raises(ValueError, match=r"matrix: all entries must be finite to be decomposed, got (nan|inf)"):
        truncated_svd(matrix, 16)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize("function", [exact_svd, filtered_svd])
def test_scale(function, size):
    """Squares of such entries are not numbers in float32."""
    matrix = torch.randn(130, 96, generator=torch.Generator().manual_seed(5))
    u, v, sigma = function(matrix, 16)[:3]
    scaled = [t.double() for t in function(matrix * size, 16)[:3]]
    torch.testing.assert_close(scaled[2], sigma * size, rtol=1e-4, atol=0)
    torch.testing.assert_close(scaled[0].T @ scaled[1] / size, (u.T @ v).double(), rtol=0, atol=1e-3)


# ---- filtered against exact


def matrix_of(spectrum: torch.Tensor, rows: int, seed: int = 0) -> torch.Tensor:
    """(rows, n) with singular values ``spectrum`` (n,)."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(r, len(spectrum), generator=generator)).Q for r in (rows, len(spectrum)))
    return left * spectrum @ right.T


def spectra(n: int) -> dict[str, torch.Tensor]:
    i = torch.arange(1, n + 1).float()
    spiked = torch.linspace(2, 0.5, n)
    spiked[:3] = torch.tensor([900.0, 300.0, 20.0])
    return {
        "all equal": torch.ones(n),
        "falling slowly": i**-0.25,
        "falling": i**-0.5,
        "falling fast": i**-2,
        "exponential": torch.exp(-i / 40),
        "a few spikes": spiked,
        "clusters": torch.where(i <= n / 8, 10.0, torch.where(i <= n / 2, 1.0, 0.1)),
        "near-ties at the cut": 1 + 1e-4 * torch.cos(i),
        "rank below": torch.where(i <= n / 16, 1.0, 0.0),
        "rank 1": torch.where(i <= 1, 1.0, 0.0),
    }


@pytest.mark.parametrize("rank", [16, 48, 112])
@pytest.mark.parametrize("name", [*spectra(8), "normal"])
def test_the_bound_holds_and_is_not_far_off(name, rank):
    rows, n = (300, 256)
    matrix = torch.randn(rows, n, generator=torch.Generator().manual_seed(6))
    if name != "normal":
        matrix = matrix_of(spectra(n)[name], rows)
    energy = torch.linalg.svdvals(matrix.double()).square()
    least, total = float(energy[rank:].sum()), float(energy.sum())
    for given in (matrix, matrix.T):
        found = filtered_svd(given, rank)
        if found is None:
            # Giving up is allowed, and seen, only where float32 hardly tells what is left from what it rounds.
            assert name in ("falling fast", "a few spikes", "rank 1")
            continue
        u, v, sigma = (t.double() for t in found[:3])
        lost = float((given.double() - u.T @ v).square().sum())
        assert lost - least <= (found.bound + 1e-9) * total
        assert found.bound * total <= 5.1e-3 * lost + 1.1e-5 * total
        assert lost - least <= 2e-3 * least + 1e-6 * total  # what is reached is much better than what is shown
        assert sigma.square().sum() + lost == pytest.approx(total, rel=1e-5)
        assert bool((sigma.diff() <= 0).all())


def test_a_subspace_that_misses_something_is_not_shown():
    """The check alone, given pairs with one of the leading ones exchanged for a lower one."""
    n, rank = 128, 16
    vectors = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(7))).Q
    theta = torch.linspace(2, 0.1, n).double()
    gram = (vectors * theta.float()) @ vectors.T

    def shown(kept: list[int], bound: float) -> bool:
        residual = torch.full((len(kept),), 1e-12, dtype=torch.float64)
        return subspace._shown(gram, rank, vectors[:, kept], theta[kept], residual, bound)

    found = list(range(32))
    assert shown(found, 1e-2)
    for missing in (0, 7, 15):
        kept = [i for i in range(33) if i != missing]
        loss = float(theta[missing] - theta[16])  # the best 16 of those kept end with one that is lower
        assert not shown(kept, 0.9 * loss)
    assert shown([i for i in range(33) if i != 15], 3 * float(theta[15] - theta[16]))


def test_large_matrices_are_filtered_and_small_ones_and_high_ranks_are_not(monkeypatch):
    asked = []
    monkeypatch.setattr(svd, "filtered_svd", lambda matrix, rank: asked.append((matrix.shape, rank)))
    generator = torch.Generator().manual_seed(8)
    for shape, rank in [((520, 640), 16), ((520, 640), 240), ((500, 640), 16)]:
        matrix = torch.randn(shape, generator=generator)
        u, v, _ = truncated_svd(matrix, rank)  # nothing was shown, so it is exact
        lost = float((matrix.double() - u.T @ v).square().sum())
        least = float(torch.linalg.svdvals(matrix.double())[rank:].square().sum())
        assert lost == pytest.approx(least, rel=1e-9)
    assert asked == [((520, 640), 16)]
    monkeypatch.undo()
    assert truncated_svd(torch.randn(520, 640, generator=generator), 16)[0].dtype == torch.float32


@pytest.mark.parametrize(("shape", "rank"), [((700, 520), 80), ((512, 640), 16), ((5000, 528), 192)])
def test_bits_do_not_depend_on_threads(shape, rank):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(filtered_svd(matrix, rank))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0][:3], other[:3], strict=True))


def test_one_column():
    column = torch.arange(1.0, 601.0).unsqueeze(1)
    for matrix in (column, column.T):
        u, v, sigma = truncated_svd(matrix, 16)
        torch.testing.assert_close(u.T @ v, matrix.double(), rtol=1e-12, atol=0)
        assert sigma[0] == pytest.approx(float(column.double().norm())) and not sigma[1:].any()


@pytest.mark.parametrize("name", ["tiny-deepseek", "tiny-mixtral"])
def test_trained_weights(name, shared):
    """What users give up, on two experts' weights: well below a thousandth of the least error."""
    from safetensors.torch import load_file

    tensors = load_file(next(shared(f"models/{name}").glob("*.safetensors")))
    weights = [w.float() for k, w in tensors.items() if ".experts.1." in k and w.dim() == 2][:6]
    assert weights
    for weight in weights:
        energy = torch.linalg.svdvals(weight.double()).square()
        found = filtered_svd(weight, 32)
        lost = float((weight.double() - found.u.double().T @ found.v.double()).square().sum())
        assert lost <= 1.001 * float(energy[32:].sum())


def test_the_benchmark_tells_what_a_model_gives_up(repo, tmp_path):
    command = ["-m", "benchmarks.compression.bench_svd", "--models", "examples/tiny-mixtral", "--shape"]
    command += ["--csv", tmp_path / "svd.csv", "--threads", "1", "--quick"]
    subprocess.run([sys.executable, *map(str, command)], cwd=repo, check=True, capture_output=True)
    with (tmp_path / "svd.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["matrix"] for row in rows} == {"tiny-mixtral gate_up", "tiny-mixtral down"}
    for row in rows:
        assert row["of"] == row["shown"] and float(row["captured"]) > 0.999
        assert float(row["excess"]) < float(row["bound"]) < 0.01
