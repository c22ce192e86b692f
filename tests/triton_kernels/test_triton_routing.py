"""The sort of token-expert pairs that prefill begins with, against a stable sort."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.test_experts import ROUTINGS

pytest.importorskip("triton")


@pytest.mark.parametrize("counts", [8, 8192], ids=["many-passes", "one-pass"])
@pytest.mark.parametrize("tokens, top_k, num_experts", [(1, 1, 1), (300, 3, 6), (129, 2, 17), (50, 8, 8)])
def test_sorted_pairs(on_triton, generator, monkeypatch, tokens, top_k, num_experts, counts):
    """counts: of those the scan takes at a time; more than one pass takes 10^5 pairs, or few counts."""
    from resmoe_kernels.triton_kernels import routing

    monkeypatch.setattr(routing, "COUNTS", counts)
    index = torch.randint(-2, num_experts + 2, (tokens, top_k), generator=generator)
    _check(index.to(on_triton.device), num_experts)


@pytest.mark.parametrize("routing", [r for r in ROUTINGS if not r.startswith("no-")])
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
def test_routing(on_triton, generator, routing, index_dtype):
    _check(ROUTINGS[routing](generator, 6).to(on_triton.device, index_dtype), 6)


def _check(index: torch.Tensor, num_experts: int) -> None:
    from resmoe_kernels.triton_kernels.routing import sort_pairs

    offsets, pairs = sort_pairs(index.contiguous(), num_experts)
    flat = index.flatten().cpu()
    kept = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    expected_offsets = torch.tensor([int((kept < e).sum()) for e in range(num_experts + 1)], dtype=torch.int32)
    assert torch.equal(offsets.cpu(), expected_offsets)
    count = int(expected_offsets[-1])
    assert torch.equal(pairs[:count].cpu(), kept.sort(stable=True).indices[:count].int())
