"""Payloads: codes and bytes against loops over single bits, rounding and scales against float64."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from resmoe_kernels.payload import (
    BITS,
    GROUPS,
    Payload,
    check_padding,
    check_scales,
    decode,
    encode,
    encode_at,
    nearest_codes,
    pack_codes,
    search_scales,
    spread,
    unpack_codes,
)

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = [1, 2, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 300]  # around every chunk and group, and several groups
payloads = st.builds(Payload, st.sampled_from(BITS), st.sampled_from((0, *GROUPS)))
some = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def rows_of_codes(draw) -> tuple[Tensor, Payload]:
    payload, shape = draw(payloads), (*draw(st.sampled_from([(), (2,), (2, 3)])), draw(st.sampled_from(LENGTHS)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.randint(0, 2**payload.bits, shape, dtype=torch.uint8, generator=generator), payload


@st.composite
def weights_to_store(draw) -> tuple[Tensor, Payload]:
    codes, payload = draw(rows_of_codes())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randn(codes.shape, generator=generator) * 2.0 ** draw(st.integers(-20, 20))
    zeroed = torch.rand(codes.shape, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    return values.masked_fill(zeroed, 0.0).to(draw(st.sampled_from([torch.float32, torch.bfloat16]))), payload


def read_bits(row: list[int], bits: int, at: int) -> int:
    """Code ``at`` of stored bytes, as the docstring of payload.py lays them out, one bit at a time."""
    if bits == 3:
        chunk = row[12 * (at // 32) :]
        low, high = at % 32 // 4, at % 32 // 8
        return chunk[low] >> 2 * (at % 4) & 3 | (chunk[8 + high] >> at % 8 & 1) << 2
    per_byte = 8 // bits
    return row[at // per_byte] >> bits * (at % per_byte) & 2**bits - 1


@some
@given(rows_of_codes())
def test_stored_bytes_are_what_the_layout_says(case):
    codes, payload = case
    packed = pack_codes(codes, payload)
    length, padded = codes.shape[-1], payload.padded(codes.shape[-1])
    assert packed.shape == payload.codes_shape(tuple(codes.shape)) and packed.dtype == torch.uint8
    assert padded % (payload.group or 32) == 0 and length <= padded < length + (payload.group or 32)
    assert packed.shape[-1] * 8 == padded * payload.bits
    assert torch.equal(unpack_codes(packed, payload, length), codes)
    for row, of_row in zip(packed.view(-1, packed.shape[-1]).tolist(), codes.view(-1, length).tolist(), strict=True):
        assert [read_bits(row, payload.bits, i) for i in range(padded)] == of_row + [0] * (padded - length)
    check_padding("codes", packed, payload, length)


@some
@given(weights_to_store())
def test_every_code_is_the_nearest_and_decoding_is_exact(case):
    values, payload = case
    codes, scales = encode(values, payload)
    length = values.shape[-1]
    assert scales.shape == payload.scales_shape(tuple(values.shape)) and scales.dtype == torch.bfloat16
    check_scales("scales", scales)
    check_padding("codes", codes, payload, length)
    assert codes.numel() + 2 * scales.numel() == payload.nbytes(tuple(values.shape))

    step = spread(scales.double(), payload, length).expand(values.shape).numpy()
    levels = (np.arange(2**payload.bits) - payload.offset)[:, None] * step.reshape(1, -1)
    chosen = decode(codes, scales, payload, length, torch.float64).numpy().reshape(-1)
    got = unpack_codes(codes, payload, length).numpy().reshape(-1)
    np.testing.assert_array_equal(chosen, levels[got, np.arange(chosen.size)])
    wanted = values.double().numpy().reshape(-1)
    least = np.abs(levels - wanted).min(0)
    # Dividing and adding the offset round in float32: by at most 2^-23 of the offset plus the code, in steps.
    slack = step.reshape(-1) * 2 ** (payload.bits + 1) * 2.0**-23
    assert (np.abs(chosen - wanted) <= least + slack).all()
    single = decode(codes, scales, payload, length).double().numpy().reshape(-1)
    np.testing.assert_array_equal(single, chosen)
    assert not np.signbit(chosen[step.reshape(-1) == 0]).any()


@pytest.mark.parametrize("bits", BITS)
def test_scale_is_the_best_of_the_candidates(bits):
    payload = Payload(bits, 32)
    generator = torch.Generator().manual_seed(bits)
    values, counts = torch.randn(6, 70, generator=generator), torch.rand(6, 70, generator=generator)
    for weights in (None, counts):
        found = search_scales(values, payload, weights)
        for row in range(6):
            for group in range(3):
                own = values[row, 32 * group : 32 * group + 32].double()
                count = torch.ones_like(own) if weights is None else weights[row, 32 * group :][: len(own)].double()

                def error(scale, own=own, count=count):
                    steps = (own / scale + payload.offset).round().clamp(0, 2**bits - 1) - payload.offset
                    return float((count * (own - scale * steps) ** 2).sum())

                factors = [0.4 + 0.65 * i / 14 for i in range(15)]
                tried = [(f * own.abs().max().float() / payload.offset).bfloat16().double() for f in factors]
                assert error(found[row, group].double()) <= min(map(error, tried)) * (1 + 1e-5)


def test_error_of_normal_weights():
    """Relative squared error of normal weights in groups of 128. The best uniform quantiser of a normal variable leaves
    0.1188, 0.0374 and 0.0115 at 2, 3 and 4 bits (Max, 1960) with one scale for all of them; a scale for every 128 is
    a little better, a wrong offset or a wrong candidate far off."""
    values = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    found = {}
    for bits in BITS:
        payload = Payload(bits, 128)
        again = decode(*encode(values, payload), payload, 1024)
        found[bits] = float((again - values).square().sum() / values.square().sum())
    assert 0.112 < found[2] < 0.1188 and 0.034 < found[3] < 0.0374 and 0.0095 < found[4] < 0.0115, found
    assert 3e-5 < found[8] < 6e-5, found


def test_weights_decide_what_counts():
    """An outlier that does not count is not seen: neither by the scale nor by the widest magnitude it starts from."""
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    values[:, 5] = 1000.0
    counts = torch.ones(64)
    counts[5] = 0
    without = search_scales(torch.cat([values[:, :5], values[:, 6:]], 1), Payload(4, 0))
    assert torch.equal(search_scales(values, Payload(4, 0), counts), without)


def test_a_short_last_group_has_a_scale_of_its_own():
    values = torch.cat([torch.ones(2, 32), torch.full((2, 3), 8.0)], 1)
    alone, both = Payload(2, 32), Payload(2, 32)
    scales = search_scales(values, both)
    assert torch.equal(scales[:, 1:], search_scales(values[:, 32:], alone))


def test_no_rows():
    codes, scales = encode(torch.zeros(0, 40), Payload(3, 32))
    assert codes.shape == (0, 24) and scales.shape == (0, 2)
    assert decode(codes, scales, Payload(3, 32), 40).shape == (0, 40)
    codes, scales = encode(torch.zeros(0, 40), Payload(4, 0))
    assert codes.shape == (0, 32) and scales.shape == (0,)


def test_pieces_do_not_change_what_is_found():
    """More elements than are searched at a time give what rows by themselves give."""
    values = torch.randn(9, 1 << 17, generator=torch.Generator().manual_seed(2))
    for payload in (Payload(2, 0), Payload(4, 128)):
        whole = encode(values, payload)
        for row in range(9):
            own = encode(values[row], payload)
            assert torch.equal(own.codes, whole.codes[row]) and torch.equal(own.scales, whole.scales[row])


def test_codes_at_given_scales():
    values, scales = torch.tensor([[-9.0, -0.6, -0.4, 0.4, 0.6, 9.0]]), torch.tensor([[1.0]])
    codes, stored = encode_at(values, scales, Payload(2, 32))
    assert unpack_codes(codes, Payload(2, 32), 6).tolist() == [[0, 1, 1, 2, 2, 3]]
    assert stored.dtype == torch.bfloat16
    codes, _ = encode_at(values, torch.zeros(1, 1), Payload(2, 32))
    again = decode(codes, torch.zeros(1, 1), Payload(2, 32), 6)
    assert torch.equal(again, torch.zeros(1, 6)) and not again.signbit().any()
    assert nearest_codes(values, torch.ones(1, 6), Payload(2, 32)).tolist() == [[0, 1, 1, 2, 2, 3]]


@given(payloads)
def test_text(payload):
    assert Payload.parse(str(payload)) == payload
    assert str(payload) == (f"int{payload.bits}/{payload.group}" if payload.group else f"int{payload.bits}")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Payload(5, 128), "payload: bits must be one of 8, 4, 3, 2, got 5"),
        (lambda: Payload(4, 48), "payload: group must be one of 32, 64, 128 columns, or 0 for one scale a row, got 48"),
        (lambda: Payload.parse("q4"), "payload: must be like 'int4/128', or 'int4' with one scale a row, got 'q4'"),
        (lambda: Payload.parse("int16/128"), "payload: bits must be one of 8, 4, 3, 2, got 16"),
        (
            lambda: encode(torch.tensor([[1.0, torch.nan]]), Payload(4, 32)),
            "encode: values must be finite, got nan at (0, 1)",
        ),
        (
            lambda: encode_at(torch.tensor([[1.0, torch.inf]]), torch.ones(1, 1), Payload(4, 32)),
            "encode: values must be finite, got inf at (0, 1)",
        ),
        (
            lambda: check_scales("scales_u_down", torch.tensor([1.0, torch.inf]).bfloat16()),
            "scales_u_down: scales must be finite and at least +0, got inf at (1,)",
        ),
        (
            lambda: check_scales("scales_u_down", torch.tensor([[1.0, -0.0]]).bfloat16()),
            "scales_u_down: scales must be finite and at least +0, got -0.0 at (0, 1)",
        ),
        (
            lambda: check_padding("u_down", torch.tensor([[0] * 15 + [32]], dtype=torch.uint8), Payload(4, 0), 31),
            "u_down: codes behind the 31 of a row must be 0, got 2 at (0, 31)",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()
