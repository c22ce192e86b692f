"""The ops have first derivatives, backwards; the others are errors, not zeros."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

import resmoe_kernels as rk
from resmoe_kernels.ops import expand_sparse


@pytest.fixture
def call(make_layer):
    """A layer as a function of x and the router's weights."""
    layer = make_layer(group=[0, 0, 1, 1, 0, 1], ranks=[4] * 6)
    index = torch.tensor([[0, 1], [2, 3], [4, 5]])
    return lambda x, w: rk.experts(x, index, w, layer, "silu")


@pytest.fixture
def inputs(generator):
    return torch.randn(3, 45, generator=generator), torch.rand(3, 2, generator=generator)


@pytest.mark.parametrize("which", [0, 1])
def test_no_forward_mode(which, call, inputs):
    tangents = [torch.zeros_like(t) for t in inputs]
    tangents[which] += 1
    with pytest.raises(ValueError, match=r"experts: has no forward-mode derivative \(jvp\); run the layer on"):
        torch.func.jvp(call, inputs, tuple(tangents))
    duals = list(inputs)
    with forward_ad.dual_level():
        duals[which] = forward_ad.make_dual(inputs[which], tangents[which])
        with pytest.raises(ValueError, match="forward-mode"):
            call(*duals)
        call(*inputs)  # without a tangent it runs


@pytest.mark.parametrize("by", [0, 1])
def test_no_second_derivative(by, call, inputs):
    leaves = [t.clone().requires_grad_() for t in inputs]
    (first,) = torch.autograd.grad(call(*leaves).square().sum(), leaves[0], create_graph=True)
    (plain,) = torch.autograd.grad(call(*leaves).square().sum(), leaves[0])
    assert torch.equal(first, plain) and first.any()
    with pytest.raises(ValueError, match=r"experts: has no second derivative \(create_graph\); run the layer on"):
        torch.autograd.grad(first.sum(), leaves[by])


def test_expand_sparse_is_linear_and_says_so(make_layer):
    """Its gradient can be differentiated in what comes back; a tangent is refused."""
    layer = make_layer(sparse=8)
    values = layer.values_down[0].clone().requires_grad_()
    back = torch.randn(45, 37, requires_grad=True)
    (grad,) = torch.autograd.grad(expand_sparse(layer.mask_down[0], values, None, 37), values, back, create_graph=True)
    (again,) = torch.autograd.grad(grad.sum(), back)
    kept = expand_sparse(layer.mask_down[0], torch.ones_like(values), None, 37)
    assert torch.equal(again, kept)
    with pytest.raises(ValueError, match="expand_sparse: has no forward-mode derivative"):
        torch.func.jvp(
            lambda v: expand_sparse(layer.mask_down[0], v, None, 37), (values.detach(),), (back.new_ones(values.shape),)
        )
