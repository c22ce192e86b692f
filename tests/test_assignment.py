"""Assignment against all permutations."""

import itertools

import torch

from resmoe_kernels.python_ops.assignment import assign


def test_assign_is_the_best_of_all_permutations():
    generator = torch.Generator().manual_seed(5)
    target, source = torch.randn(6, 3, generator=generator), torch.randn(6, 3, generator=generator)
    cost = {p: float((target - source[list(p)]).square().sum()) for p in itertools.permutations(range(6))}
    assert tuple(assign(target, source).tolist()) == min(cost, key=cost.__getitem__)


def test_assign_keeps_the_current_order_among_equals():
    twins = torch.ones(4, 3)  # every permutation is as good
    current = torch.tensor([2, 0, 3, 1])
    assert torch.equal(assign(twins, twins, current), current)
    apart = torch.eye(4)
    assert torch.equal(assign(apart, apart, current), torch.arange(4))
