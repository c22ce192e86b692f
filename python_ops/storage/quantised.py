"""Weights that a checkpoint stores as codes and scales, and the dense ones that they stand for.

    fp8, by blocks   W[i, j] = q[i, j] s[i // m, j // n]            ``X.weight`` with ``X.weight_scale_inv``
                     q (N, K) float8, or (N, K / 2) int8 of two FP4 codes, lower half first;  s (ceil(N / m),
                     ceil(K / n)) of any float, or uint8 for 2 ** (s - 127);  one scale for all where s is a scalar
    MXFP4            W[e, g 32 + 2 b + h, i] = code(blocks[e, i, g, b] >> 4 h) 2 ** (scales[e, i, g] - 127)
                     ``X_blocks`` uint8 (E, N, K / 32, 16), ``X_scales`` uint8 (E, N, K / 32) -> ``X`` (E, K, N)

Both are multiplied in float32 or exactly, and rounded once to the dtype of the model, as transformers does it: to the
same bits. The format is that of DeepSeek-V3 (its repository's ``weight_dequant``) and of the OCP Microscaling
specification 1.0, as GPT-OSS is published in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

METHODS = ("fp8", "mxfp4")
# E2M1: a sign, two bits of exponent, one of mantissa.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_BIAS = 127  # of an exponent stored in a byte
_CODES = ("F8_E4M3", "F8_E5M2", "I8")
# How the scales of ``X.weight`` are called: DeepSeek-V3, DeepSeek-V4, Mistral Large 4.
_SCALES = ("weight_scale_inv", "scale", "qscale_weight")
_UNUSED = "activation_scale"  # of activations, which are not quantised here


@dataclass(frozen=True)
class Stored:
    """One dense tensor as it is stored.

    codes, scales: names in the checkpoint;  shape: of the dense tensor;  method: of ``METHODS``
    block: (m, n) of fp8, as far as config.json says it
    """

    codes: str
    scales: str
    shape: tuple[int, ...]
    method: str
    block: tuple[int, int] | None = None

    def read(self, load: Callable[[str], Tensor], dtype: torch.dtype) -> Tensor:
        """The dense tensor, given what loads a stored one. Raises ValueError naming it if the two do not fit."""
        codes, scales = load(self.codes), load(self.scales)
        if self.method == "mxfp4":
            return from_mxfp4(codes, scales, dtype)
        return from_fp8(codes, scales, dtype, self._blocks(scales))

    def _blocks(self, scales: Tensor) -> tuple[int, int]:
        return _block(self.codes, self.shape[-2:], tuple(scales.shape[-2:]), self.block)


def quantisation_of(config: Mapping[str, Any]) -> str | None:
    """How the weights of a checkpoint with this config.json are quantised, None where they are not; any name."""
    quantised = config.get("quantization_config")
    return str(quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised) if quantised else None


def stored_tensors(
    header: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any]
) -> tuple[dict[str, Stored], set[str]]:
    """What the tensors of a checkpoint stand for.

    header: name -> {"dtype", "shape"} as safetensors has them, of all shards
    Returns the quantised tensors by the names of the dense ones, and the names that only serve them.
    """
    method = quantisation_of(config)
    if method == "mxfp4":
        return _mxfp4_tensors(header)
    if method == "fp8":
        size = config["quantization_config"].get("weight_block_size")
        return _fp8_tensors(header, None if size is None else (int(size[0]), int(size[1])))
    return {}, set()


def _fp8_tensors(
    header: Mapping[str, Mapping[str, Any]], block: tuple[int, int] | None
) -> tuple[dict[str, Stored], set[str]]:
    found, serving = {}, set()
    for name, tensor in header.items():
        if tensor["dtype"] not in _CODES:
            continue
        owner = name.removesuffix("weight")
        scales = [
            s for s in (f"{name}_scale_inv", *(f"{owner}{kind}" for kind in _SCALES if name != owner)) if s in header
        ]
        if not scales:
            continue
        shape = tuple(tensor["shape"])
        if tensor["dtype"] == "I8":
            shape = (*shape[:-1], 2 * shape[-1])
        found[name] = Stored(name, scales[0], shape, "fp8", block)
        serving |= {scales[0], f"{owner}{_UNUSED}"} & set(header)
    return found, serving


def _mxfp4_tensors(header: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Stored], set[str]]:
    found, serving = {}, set()
    for name, tensor in header.items():
        dense, end, _ = name.rpartition("_blocks")
        scales = f"{dense}_scales"
        if not end or scales not in header or len(tensor["shape"]) != 4:
            continue
        if dense in header:
            raise ValueError(f"{dense}: stands in the checkpoint beside {name}, which says the same; remove one")
        count, rows, groups, half = tensor["shape"]
        found[dense] = Stored(name, scales, (count, groups * half * 2, rows), "mxfp4")
        serving |= {name, scales}
    return found, serving


def _block(name: str, shape: tuple[int, ...], grid: tuple[int, ...], said: tuple[int, int] | None) -> tuple[int, int]:
    """The rows and columns that share a scale: as config.json says where that fits, else as the shapes say."""
    if len(grid) < 2:
        return shape[0], shape[1]
    if said is not None and grid == tuple(-(-n // b) for n, b in zip(shape, said, strict=True)):
        return said
    if all(g and n % g == 0 for n, g in zip(shape, grid, strict=True)):
        return shape[0] // grid[0], shape[1] // grid[1]
    raise ValueError(
        f"{name}: its scales must be a grid of blocks{'' if said is None else f' of {said[0]} x {said[1]}'} over "
        f"{tuple(shape)}, got {tuple(grid)}"
    )


def from_fp8(codes: Tensor, scales: Tensor, dtype: torch.dtype, block: tuple[int, int]) -> Tensor:
    """codes (..., N, K) float8, or (..., N, K / 2) int8;  scales (..., ceil(N / m), ceil(K / n)), or of one number;
    block (m, n) -> (..., N, K) in ``dtype``, rounded once from float32."""
    values = _fp4_values(codes) if codes.dtype == torch.int8 else codes.to(torch.float32)
    scales = (scales.to(torch.float32) - _BIAS).exp2() if scales.dtype == torch.uint8 else scales.to(torch.float32)
    if scales.dim() >= 2:
        for dim, size in ((-2, block[0]), (-1, block[1])):
            scales = scales.repeat_interleave(size, dim=dim).narrow(dim, 0, values.shape[dim])
    return (values * scales).to(dtype)


def _fp4_values(codes: Tensor) -> Tensor:
    """(..., n) of two codes a byte -> (..., 2 n) float32, the lower half of a byte first."""
    table = torch.tensor(_FP4, device=codes.device)
    halves = codes.view(torch.uint8)
    return torch.stack([table[(halves & 15).int()], table[(halves >> 4).int()]], dim=-1).flatten(-2)


def from_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """blocks (E, N, K / 32, 16) uint8, scales (E, N, K / 32) uint8 -> (E, K, N) in ``dtype``; one expert at a time."""
    count, rows, groups, half = blocks.shape
    made = torch.empty(count, groups * half * 2, rows, dtype=dtype, device=blocks.device)
    table = torch.tensor(_FP4, dtype=dtype, device=blocks.device)
    for e in range(count):
        both = torch.stack([table[(blocks[e] & 15).int()], table[(blocks[e] >> 4).int()]], dim=-1).flatten(-2)
        exponent = scales[e].to(torch.int32).sub(_BIAS).unsqueeze(-1)
        made[e] = torch.ldexp(both, exponent).flatten(1).T
    return made
