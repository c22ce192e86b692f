"""Payload: how the numbers of one tensor are stored. Floats, or codes of 8, 4, 3 or 2 bits and scales:

    w = scale * (c - (2^bits - 1) / 2),    c = 0 ... 2^bits - 1

Levels are the odd multiples of half a step: symmetric, without a zero. One bfloat16 scale serves ``group`` elements
along the last dimension, which is the one summed over; ``group`` 0 means the whole row (u, whose scale folds into V x).
Scales are finite and not negative; 0 makes its group zero. A weight is exact in float32: 8 bits of scale times 8.

Stored codes do not depend on the machine. A row of L codes is padded with 0 to a multiple of the group (32 where group
is 0); every 32 of them are 4 * bits bytes, with | joining bits:

    8   byte i = c[i]
    4   byte i = c[2i] | c[2i+1] << 4
    2   byte i = c[4i] | c[4i+1] << 2 | c[4i+2] << 4 | c[4i+3] << 6
    3   8 bytes of the low two bits of every code, as 2; then 4 bytes of the high bits, bit j of byte i that of c[8i+j]
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

BITS = (8, 4, 3, 2)
GROUPS = (32, 64, 128)
CHUNK = 32  # codes that make a whole number of bytes at any bits
# Of the scale whose outermost level is the largest magnitude. The least squared error of 128 normal weights lies at
# 0.55 of it with 2 bits and at 0.95 with 8; above 1 is for the rounding of the scale itself.
_CANDIDATES = tuple(0.4 + 0.65 * i / 14 for i in range(15))
_SEARCHED = 1 << 19  # elements searched at a time: 2 MiB, which stays in the cache for the candidates


@dataclass(frozen=True)
class Payload:
    """``bits`` of a code, and how many elements share a scale. Raises ValueError listing what there is."""

    bits: int
    group: int

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"payload: bits must be one of {', '.join(map(str, BITS))}, got {self.bits}")
        if self.group not in (0, *GROUPS):
            raise ValueError(
                f"payload: group must be one of {', '.join(map(str, GROUPS))} columns, "
                f"or 0 for one scale a row, got {self.group}"
            )

    def __str__(self) -> str:
        """``int4/128``, or ``int4`` with one scale a row."""
        return f"int{self.bits}/{self.group}" if self.group else f"int{self.bits}"

    @classmethod
    def parse(cls, text: str) -> Payload:
        """The inverse of ``str``."""
        found = re.fullmatch(r"int(\d+)(?:/(\d+))?", text)
        if found is None:
            raise ValueError(f"payload: must be like 'int4/128', or 'int4' with one scale a row, got {text!r}")
        return cls(int(found[1]), int(found[2] or 0))

    @property
    def offset(self) -> float:
        """(2^bits - 1) / 2: what a code is counted from."""
        return (2**self.bits - 1) / 2

    def padded(self, length: int) -> int:
        """Codes stored for a row of ``length``."""
        unit = self.group or CHUNK
        return -(-length // unit) * unit

    def codes_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the stored codes, uint8, of a tensor of this shape."""
        return (*shape[:-1], self.padded(shape[-1]) * self.bits // 8)

    def scales_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scales, bfloat16: one per group, one per row where group is 0."""
        return (*shape[:-1], -(-shape[-1] // self.group)) if self.group else shape[:-1]

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of codes and scales of a tensor of this shape, padding included."""
        codes, scales = torch.Size(self.codes_shape(shape)), torch.Size(self.scales_shape(shape))
        return codes.numel() + 2 * scales.numel()


class Encoded(NamedTuple):
    """A tensor as codes and scales.

    codes: (..., bytes) uint8, as stored;  scales: (..., ceil(K / group)) bfloat16, (...) where group is 0
    """

    codes: Tensor
    scales: Tensor


def encode(values: Tensor, payload: Payload, weights: Tensor | None = None) -> Encoded:
    """Rounds to nearest, with the scale of every group that leaves the least squared error among 15 candidates.

        scale = argmin over s of  sum_k weights_k (w_k - s q_k(s))^2,    s = f max|w| / ((2^bits - 1) / 2) in bfloat16

    with f from 0.4 to 1.05. Such a scale shrinks what it rounds, at 2 bits by a tenth: who has a better one, or better
    codes, passes them to ``encode_at`` or ``pack_codes``.

    values: (..., K) float, finite;  weights: what broadcasts to them, >= 0, how much an element's error counts
    """
    return encode_at(values, search_scales(values, payload, weights), payload)


def search_scales(values: Tensor, payload: Payload, weights: Tensor | None = None) -> Tensor:
    """The scales of ``encode``: (..., K) float -> (..., ceil(K / group)) bfloat16, (...) where group is 0."""
    _check_finite(values)
    length = values.shape[-1]
    run = payload.group or length
    if weights is None and length % run:  # the padding of the last group must not pull at its scale
        weights = values.new_ones(length, dtype=torch.float32)
    groups = _grouped(values, run)
    counts = None if weights is None else _grouped(weights.to(torch.float32).expand(values.shape), run)
    found = groups.new_zeros(len(groups), dtype=torch.bfloat16)
    step = max(1, _SEARCHED // run)
    for start in range(0, len(groups), step):
        part = slice(start, start + step)
        found[part] = _searched(groups[part].to(torch.float32), payload, None if counts is None else counts[part])
    return found.view(payload.scales_shape(tuple(values.shape)))


def _searched(groups: Tensor, payload: Payload, weights: Tensor | None) -> Tensor:
    """(groups, run) float32 -> (groups,) bfloat16"""
    seen = groups if weights is None else groups * (weights > 0)
    widest = seen.abs().amax(-1) / payload.offset
    best = torch.zeros_like(widest, dtype=torch.bfloat16)
    least = torch.full_like(widest, torch.inf)
    for factor in _CANDIDATES:
        scale = (factor * widest).to(torch.bfloat16)
        wide = scale.to(torch.float32).unsqueeze(-1)
        wrong = _nearest(groups, wide, payload).sub_(payload.offset).mul_(wide).sub_(groups).square_()
        if weights is not None:
            wrong *= weights
        error = wrong.sum(-1)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, scale, best)
    return best


def encode_at(values: Tensor, scales: Tensor, payload: Payload) -> Encoded:
    """Rounds to nearest at given scales; where a scale is 0 every code is 2^(bits - 1), so that the weight is +0.

    values: (..., K) float, finite;  scales: (..., ceil(K / group)), (...) where group is 0, rounded to bfloat16
    """
    _check_finite(values)
    scales = scales.to(torch.bfloat16)
    codes = nearest_codes(values, spread(scales, payload, values.shape[-1]), payload)
    return Encoded(pack_codes(codes, payload), scales.contiguous())


def nearest_codes(values: Tensor, scales: Tensor, payload: Payload) -> Tensor:
    """The codes, uint8, nearest to float values; scales: what broadcasts to them, see ``spread``."""
    return _nearest(values.to(torch.float32), scales.to(torch.float32), payload).to(torch.uint8)


def _nearest(values: Tensor, scales: Tensor, payload: Payload) -> Tensor:
    middle = 2.0 ** (payload.bits - 1)
    safe = torch.where(scales > 0, scales, torch.inf)  # 0 / inf: the offset, which rounds to even
    at = values.div(safe).add_(payload.offset)
    return torch.where(scales > 0, at, middle).clamp_(0, 2**payload.bits - 1).round_()


def spread(scales: Tensor, payload: Payload, length: int) -> Tensor:
    """The scale of every element of a row: (..., ceil(length / group)) -> (..., length); (...) -> (..., 1)."""
    if not payload.group:
        return scales.unsqueeze(-1)
    return scales.repeat_interleave(payload.group, -1)[..., :length]


def decode(codes: Tensor, scales: Tensor, payload: Payload, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights (..., length) that codes (..., bytes) and scales stand for, computed in float32 (float64 for it)."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    steps = unpack_codes(codes, payload, length).to(compute) - payload.offset
    return (steps * spread(scales.to(compute), payload, length)).to(dtype)


# ---- codes and the bytes that store them


def pack_codes(codes: Tensor, payload: Payload) -> Tensor:
    """One code a byte, (..., K) uint8, to stored bytes (..., bytes), padded with code 0. Who made the codes answers
    for their being below 2^bits."""
    return pack_bits(
        torch.nn.functional.pad(codes, (0, payload.padded(codes.shape[-1]) - codes.shape[-1])), payload.bits
    )


def unpack_codes(packed: Tensor, payload: Payload, length: int) -> Tensor:
    """The inverse: (..., bytes) uint8 -> (..., length) uint8."""
    return unpack_bits(packed, payload.bits)[..., :length]


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """(..., K) uint8 -> (..., K bits / 8) uint8; K fills whole bytes, with 3 bits whole chunks of 32."""
    if bits == 8:
        return codes.contiguous()
    if bits == 3:
        low, high = pack_bits(codes & 3, 2), _joined(codes >> 2, 1)
        joined = torch.cat([low.unflatten(-1, (-1, 8)), high.unflatten(-1, (-1, 4))], -1)
        return joined.flatten(-2)
    return _joined(codes, bits)


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """The inverse: (..., bytes) uint8 -> (..., 8 bytes / bits) uint8."""
    if bits == 8:
        return packed
    if bits == 3:
        low, high = packed.unflatten(-1, (-1, 12)).split([8, 4], -1)
        return _split(low.flatten(-2), 2) | _split(high.flatten(-2), 1) << 2
    return _split(packed, bits)


def _joined(codes: Tensor, bits: int) -> Tensor:
    """Codes to bytes, the first lowest."""
    apart = codes.unflatten(-1, (-1, 8 // bits))
    joined = apart[..., 0].clone()
    for i in range(1, 8 // bits):
        joined |= apart[..., i] << bits * i
    return joined


def _split(packed: Tensor, bits: int) -> Tensor:
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-1) >> shifts & 2**bits - 1).flatten(-2)


# ---- what contents must be


def check_scales(name: str, scales: Tensor) -> None:
    """Raises ValueError naming the tensor and the first place unless every scale is finite and not negative."""
    bad = ~(torch.isfinite(scales) & ~scales.signbit())
    if bool(bad.any()):
        place = tuple(bad.nonzero()[0].tolist())
        raise ValueError(f"{name}: scales must be finite and at least +0, got {scales[place].item()} at {place}")


def check_padding(name: str, codes: Tensor, payload: Payload, length: int) -> None:
    """Raises ValueError naming the tensor and the first place if a code behind a row of ``length`` is not 0."""
    whole = length // CHUNK * CHUNK * payload.bits // 8
    behind = unpack_bits(codes[..., whole:], payload.bits)[..., length % CHUNK :]
    bad = behind != 0
    if bool(bad.any()):
        *row, column = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{name}: codes behind the {length} of a row must be 0, "
            f"got {int(behind[(*row, column)])} at {(*row, length + column)}"
        )


def _check_finite(values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        bad = (~torch.isfinite(values)).nonzero()[0].tolist()
        raise ValueError(f"encode: values must be finite, got {values[tuple(bad)].item()} at {tuple(bad)}")


def _grouped(values: Tensor, run: int) -> Tensor:
    """(..., K) -> (groups, run), every row padded with 0"""
    return torch.nn.functional.pad(values, (0, -values.shape[-1] % run)).reshape(-1, run)
