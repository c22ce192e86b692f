"""Weights stored as codes and scales: the same bits as transformers' own dequantisation, and what does not fit."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from resmoe_kernels.python_ops.storage.quantised import from_fp8, from_mxfp4, quantisation_of, stored_tensors

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
WEIGHTS = "model.layers.0.mlp.down_proj.weight"


def quantizer(block, **settings):
    return SimpleNamespace(quantization_config=FineGrainedFP8Config(weight_block_size=block, **settings))


def entry(tensor):
    names = {torch.float8_e4m3fn: "F8_E4M3", torch.int8: "I8", torch.uint8: "U8", torch.float32: "F32"}
    return {"dtype": names[tensor.dtype], "shape": list(tensor.shape)}


def read(tensors, config, dtype):
    """Everything that stands for something, dense."""
    found, serving = stored_tensors({name: entry(t) for name, t in tensors.items()}, config)
    return {name: stored.read(tensors.__getitem__, dtype) for name, stored in found.items()}, serving


def fp8_config(block):
    return {"quantization_config": {"quant_method": "fp8", "weight_block_size": block}}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scales", ["float", "ue8m0"])
@pytest.mark.parametrize(("shape", "block"), [((32, 48), (16, 16)), ((32, 48), (8, 24)), ((3, 16, 32), (16, 16))])
def test_fp8_is_bit_equal_to_transformers(shape, block, scales, dtype, generator):
    weights = torch.randn(shape, generator=generator) * torch.rand(shape[-1], generator=generator) * 3
    weights[..., 0, 0] = 0
    made = Fp8Quantize(quantizer(block, scale_fmt=scales)).convert({WEIGHTS: weights})
    codes, grid = made[WEIGHTS], made[f"{WEIGHTS}_scale_inv"]
    expected = Fp8Dequantize(None)._dequantize_one(codes, grid, output_dtype=dtype)
    assert torch.equal(from_fp8(codes, grid, dtype, block), expected)
    torch.testing.assert_close(expected.float(), weights, rtol=2**-4, atol=0.02)  # 3 bits of mantissa

    as_bytes = grid.view(torch.uint8) if scales == "ue8m0" else grid  # how some checkpoints hold powers of two
    dense, serving = read({WEIGHTS: codes, f"{WEIGHTS}_scale_inv": as_bytes}, fp8_config(list(block)), dtype)
    assert torch.equal(dense[WEIGHTS], expected) and serving == {f"{WEIGHTS}_scale_inv"}


def test_blocks_at_the_edges_are_narrower():
    """576 rows are four and a half blocks of 128 in DeepSeek-V3; transformers knows whole blocks only."""
    codes = torch.ones(10, 6).to(torch.float8_e4m3fn)
    scales = torch.arange(6.0).view(3, 2)
    dense, _ = read({WEIGHTS: codes, f"{WEIGHTS}_scale_inv": scales}, fp8_config([4, 4]), torch.float32)
    expected = torch.tensor([[scales[i // 4, j // 4] for j in range(6)] for i in range(10)])
    assert torch.equal(dense[WEIGHTS], expected)


def test_one_scale_for_all_of_a_tensor():
    codes = torch.tensor([[1.0, -2.0, 448.0]]).to(torch.float8_e4m3fn)
    tensors = {
        WEIGHTS: codes,
        f"{WEIGHTS}_scale_inv": torch.tensor(0.5),
        WEIGHTS.replace("weight", "activation_scale"): torch.tensor(1.0),
    }
    dense, serving = read(tensors, fp8_config(None), torch.float32)
    assert dense[WEIGHTS].tolist() == [[0.5, -1.0, 224.0]]
    assert serving == set(tensors) - {WEIGHTS}
    for name in ("weight_scale_inv", "scale", "qscale_weight"):  # DeepSeek-V3, DeepSeek-V4, Mistral Large 4
        found, serving = stored_tensors(
            {"a.weight": entry(codes), f"a.{name}": entry(torch.zeros(1, 3))}, fp8_config(None)
        )
        assert list(found) == ["a.weight"] and serving == {f"a.{name}"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp4_by_blocks_is_bit_equal_to_transformers(dtype, generator):
    codes = torch.randint(-128, 128, (6, 32), generator=generator, dtype=torch.int8)
    scales = torch.randint(120, 134, (6, 2), generator=generator).to(torch.uint8)
    expected = Fp8Dequantize(None)._dequantize_one(codes, scales, output_dtype=dtype)
    dense, _ = read({WEIGHTS: codes, f"{WEIGHTS}_scale_inv": scales}, fp8_config([128, 128]), dtype)
    assert torch.equal(dense[WEIGHTS], expected) and expected.shape == (6, 64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mxfp4_is_bit_equal_to_transformers(dtype, generator):
    blocks = torch.randint(0, 256, (3, 10, 2, 16), generator=generator).to(torch.uint8)
    spread = 12 if dtype == torch.float16 else 126  # as far as the dtype goes
    scales = torch.randint(127 - spread, 127 + spread, (3, 10, 2), generator=generator).to(torch.uint8)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    assert torch.equal(from_mxfp4(blocks, scales, dtype), expected) and expected.shape == (3, 64, 10)
    tensors = {"experts.gate_up_proj_blocks": blocks, "experts.gate_up_proj_scales": scales}
    config = {"quantization_config": {"quant_method": "mxfp4"}}
    dense, serving = read(tensors, config, dtype)
    assert torch.equal(dense["experts.gate_up_proj"], expected) and serving == set(tensors)


def test_every_code_of_mxfp4_means_its_number():
    blocks = torch.arange(16, dtype=torch.uint8).mul(17).view(1, 1, 1, 16)  # both halves of byte i are i
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    got = from_mxfp4(blocks, torch.tensor([[[128]]], dtype=torch.uint8), torch.float32)
    assert got.flatten().tolist() == [2 * s * v for s in (1, -1) for v in values for _ in range(2)]


def test_scales_that_do_not_fit_are_refused():
    codes, scales = torch.zeros(32, 32).to(torch.float8_e4m3fn), torch.ones(5, 3)
    message = f"{WEIGHTS}: its scales must be a grid of blocks of 16 x 16 over (32, 32), got (5, 3)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        read({WEIGHTS: codes, f"{WEIGHTS}_scale_inv": scales}, fp8_config([16, 16]), torch.float32)


def test_what_is_not_quantised_stands_for_itself():
    header = {"a.weight": entry(torch.zeros(2, 2)), "a.scale": entry(torch.zeros(1, 1))}
    assert stored_tensors(header, fp8_config([1, 1])) == ({}, set())
    assert stored_tensors({"a.weight": {"dtype": "F8_E4M3", "shape": [2, 2]}}, fp8_config([1, 1])) == ({}, set())
    assert stored_tensors(header, {}) == ({}, set())
    assert quantisation_of({}) is None and quantisation_of(fp8_config(None)) == "fp8"
