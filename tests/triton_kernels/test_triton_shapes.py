"""The Triton kernels at odd shapes, every tensor between bands of poison, and in tensors beyond 2^31 elements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import resmoe_kernels
from resmoe_kernels import heuristics
from resmoe_kernels.factored import FactoredExperts
from resmoe_kernels.heuristics import Problem, Tile
from tests.accuracy import assert_accurate
from tests.conftest import INTERPRETED
from tests.kernels.test_experts import FORMS, inputs

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("one_thread")

BAND = 64  # elements on both sides: what is between them stays 16-byte aligned


def poison(dtype: torch.dtype) -> float | int:
    """NaN; or an id, an offset and a mask that lead far away and select everything."""
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max if dtype != torch.int32 else -(2**29) - 1


class Bands(TorchDispatchMode):
    """Puts bands around every buffer allocated inside, and fills all of it with poison."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[tuple[Tensor, int]] = []

    def guarded(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        size = shape.numel()
        whole = torch.full((size + 2 * BAND,), poison(dtype), dtype=dtype, device=device)
        self.buffers.append((whole, size))
        return whole[BAND : BAND + size].view(shape)

    def copy(self, tensor: Tensor) -> Tensor:
        return self.guarded(tensor.shape, tensor.dtype, tensor.device).copy_(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.new_empty, torch.ops.aten.empty_like):
            return self.guarded(result.shape, result.dtype, result.device)
        return result

    def check(self) -> None:
        """No band has changed."""
        assert self.buffers
        for whole, size in self.buffers:
            expected = torch.full((BAND,), poison(whole.dtype), dtype=whole.dtype, device=whole.device)
            for band in (whole[:BAND], whole[BAND + size :]):
                torch.testing.assert_close(band, expected, rtol=0, atol=0, equal_nan=True)


def run_between_bands(
    on_triton, call: tuple[Tensor, Tensor, Tensor], layer: FactoredExperts, activation: str = "silu"
) -> None:
    from resmoe_kernels.triton_kernels.experts import experts

    bands = Bands()
    x, index, weights = (bands.copy(t.to(on_triton.device)) for t in call)
    tensors = {name: bands.copy(t.to(on_triton.device)) for name, t in layer.tensors().items()}
    inside = FactoredExperts.from_tensors(tensors, **layer.sizes())
    given = len(bands.buffers)
    with bands:
        output = experts(x, index, weights, inside, activation)
    assert len(bands.buffers) > given, "no buffer was allocated inside the bands"
    bands.check()
    assert_accurate(output, *call, layer.tensors(), layer.sizes(), activation=activation)


def _index(generator: torch.Generator, tokens: int, top_k: int, num_experts: int) -> Tensor:
    """Any ids, also repeated ones, and some to skip."""
    return torch.randint(-1, num_experts + 1, (tokens, top_k), generator=generator)


def _layer(**how) -> dict:
    """Every part at once: two groups and an expert without one, ragged ranks, sparse, biases."""
    E = how["num_experts"]
    group = [(0, 1, -1)[e % 3] for e in range(E)] if E > 1 else [0]
    return {"group": group, "ranks": [(5, 0, 1, 33)[e % 4] for e in range(E)], "sparse": 8, "bias": True, **how}


SHAPES: dict[str, tuple[int, int, dict]] = {
    # (tokens, top_k, layer)
    "ones": (1, 1, _layer(num_experts=1, hidden_size=1, intermediate_size=1)),
    # Fewer rows and columns than the smallest tile.
    "below-a-tile": (13, 2, _layer(num_experts=2, hidden_size=7, intermediate_size=5)),
    # One more, one less than a word of a mask.
    "around-a-word": (2, 3, _layer(num_experts=3, hidden_size=33, intermediate_size=31, sparse="bitmap")),
    # Whole tiles: no mask is ever false along them.
    "whole-tiles": (16, 2, _layer(num_experts=4, hidden_size=64, intermediate_size=32, sparse="bitmap")),
    # Rows and columns that end in the middle of the third tile, in the other order.
    "wide": (5, 2, _layer(num_experts=2, hidden_size=70, intermediate_size=9)),
    "tall": (5, 2, _layer(num_experts=2, hidden_size=9, intermediate_size=70, gated=False)),
    # top_k is no power of two, and more than there are experts.
    "more-slots-than-experts": (4, 7, _layer(num_experts=2, hidden_size=20, intermediate_size=12)),
    # E is one above a power of two, and most experts are not hit.
    "many-experts": (2, 1, _layer(num_experts=17, hidden_size=20, intermediate_size=12)),
    "one-expert": (17, 1, _layer(num_experts=1, hidden_size=20, intermediate_size=12, ranks=[3])),
    # Ranks beyond every tile, and beyond min(N, K), where more rank is of no use but legal.
    "high-rank": (3, 2, _layer(num_experts=3, hidden_size=20, intermediate_size=12, ranks=[0, 67, 16])),
    "low-rank-of-one": (3, 2, {"num_experts": 3, "ranks": [1, 1, 1], "hidden_size": 20, "intermediate_size": 12}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_shape(on_triton, make_layer, generator, shape, dtype):
    tokens, top_k, form = SHAPES[shape]
    layer = make_layer(**form, dtype=dtype)
    index = _index(generator, tokens, top_k, layer.num_experts)
    run_between_bands(on_triton, inputs(index, layer.hidden_size, generator, dtype), layer)


@pytest.mark.parametrize("tokens", [1, 2, 3, 15, 16, 17, 63, 64, 65])
def test_number_of_tokens(on_triton, make_layer, generator, tokens):
    """Around the sizes of token tiles, and around the last call that decode takes."""
    layer = make_layer(**_layer(num_experts=3, hidden_size=40, intermediate_size=20))
    call = inputs(_index(generator, tokens, 2, 3), layer.hidden_size, generator)
    run_between_bands(on_triton, call, layer)


def test_fewer_pairs_than_experts_and_some_share_one(on_triton, make_layer, generator):
    """Decode then looks at pairs, not at experts, and one pair of each expert must do its work."""
    layer = make_layer(**_layer(num_experts=17, hidden_size=20, intermediate_size=12))
    index = torch.tensor([[0, 3], [3, 0], [-1, 3], [17, 4]])
    run_between_bands(on_triton, inputs(index, layer.hidden_size, generator), layer)


@pytest.mark.parametrize("form", ["everything", "both"])
@pytest.mark.parametrize(
    "changed",
    [{"depth": 64}, {"rows": 16, "depth": 128}, {"rows": 64, "depth": 64, "splits": 4}, {"splits": 1}, {"splits": 3}],
    ids=lambda changed: "-".join(f"{name}{n}" for name, n in changed.items()),
)
def test_tile(on_triton, make_layer, generator, monkeypatch, form, changed):
    """Where a tile has several words of a mask, and where no sum is split."""
    tile_of = heuristics.tile_of
    _set_tiles(monkeypatch, lambda *call: replace(tile_of(*call), **changed))
    layer = make_layer(**FORMS[form])
    run_between_bands(on_triton, inputs(_index(generator, 9, 3, 6), layer.hidden_size, generator), layer)


@pytest.mark.interpreter
@pytest.mark.parametrize("form", ["everything", "both"])
@pytest.mark.parametrize("target", heuristics.TARGETS)
def test_tiles_of_a_gpu(on_triton, make_layer, generator, monkeypatch, form, target):
    """What is started there, run here."""
    tile_of = heuristics.tile_of
    _set_tiles(monkeypatch, lambda kernel, problem, _: tile_of(kernel, problem, target))
    layer = make_layer(**FORMS[form], dtype=torch.bfloat16)
    call = inputs(_index(generator, 20, 3, 6), layer.hidden_size, generator, torch.bfloat16)
    run_between_bands(on_triton, call, layer)


def _set_tiles(monkeypatch: pytest.MonkeyPatch, tile_of: Callable[[str, Problem, str], Tile]) -> None:
    for module in ("decode", "prefill"):
        monkeypatch.setattr(f"resmoe_kernels.triton_kernels.{module}.tile_of", tile_of)


@pytest.mark.parametrize("form", ["dense", "base-low-rank", "bitmap", "everything"])
def test_form_between_bands(on_triton, make_layer, generator, form):
    layer = make_layer(**FORMS[form], dtype=torch.float16)
    call = inputs(_index(generator, 9, 3, layer.num_experts), layer.hidden_size, generator, torch.float16)
    run_between_bands(on_triton, call, layer)


def test_bands_notice(make_layer):
    """A store, and a load, one element outside."""
    bands = Bands()
    inside = bands.copy(torch.zeros(4))
    bands.check()
    beyond = inside.as_strided((5,), (1,), inside.storage_offset())
    assert beyond[4].isnan()
    beyond[4] = 0
    with pytest.raises(AssertionError):
        bands.check()
    with bands:
        assert torch.empty(3).isnan().all() and len(bands.buffers) == 2


# ---- beyond 2^31 elements

BEYOND = 2**31


def _behind(ahead: int, tensor: Tensor) -> Tensor:
    """tensor as the last elements of ``ahead`` more; on the CPU those are never touched, so they take no memory."""
    size = ahead + tensor.numel()
    if INTERPRETED:
        try:
            zeros = np.zeros(size * tensor.element_size(), np.uint8)  # mapped when touched, unlike torch.empty's here
        except MemoryError:
            pytest.skip("the system promises no more memory than it has")
        whole = torch.from_numpy(zeros).view(tensor.dtype)
    else:
        whole = torch.empty(size, dtype=tensor.dtype, device="cuda")
    whole[ahead:] = tensor.flatten()
    return whole


def _enlarge(parts: dict[str, Tensor], *names: str) -> int:
    """Puts as many copies of their shape ahead of these tensors as make the largest exceed 2^31 elements."""
    copies = -(-BEYOND // max(parts[name].numel() for name in names))
    for name in names:
        small = parts[name]
        parts[name] = _behind(copies * small.numel(), small).view((copies + 1) * small.shape[0], *small.shape[1:])
    return copies


def _many_groups(parts: dict[str, Tensor]) -> int:
    parts["group"] = torch.full_like(parts["group"], _enlarge(parts, "base_gate_up", "base_down"))
    return 1


def _many_ranks(parts: dict[str, Tensor]) -> int:
    own = parts["u_gate_up"].shape[0]
    ahead = own * _enlarge(parts, "u_gate_up", "v_gate_up")
    parts["rank_offsets_gate_up"] = torch.tensor([0, ahead, ahead + own], dtype=torch.int32)
    return 2


def _many_experts(parts: dict[str, Tensor]) -> int:
    return 1 + _enlarge(parts, "mask_gate_up", "values_gate_up")


def _many_values(parts: dict[str, Tensor]) -> int:
    parts["values_gate_up"] = _behind(BEYOND, parts["values_gate_up"])
    parts["row_offsets_gate_up"] = parts["row_offsets_gate_up"].to(torch.int64) + BEYOND
    return 1


@pytest.mark.parametrize(
    "form, hidden_size, intermediate_size, enlarge",
    [
        ({}, 2**16, 32, _many_groups),
        ({"ranks": [5], "only": "gate_up"}, 2**16, 32, _many_ranks),
        ({"sparse": 16, "only": "gate_up"}, 512, 512, _many_experts),
        ({"sparse": "bitmap", "only": "gate_up"}, 64, 32, _many_values),
    ],
    ids=["base", "low-rank", "block", "bitmap"],
)
def test_beyond_2_31_elements(
    on_triton, make_layer, generator, monkeypatch, form, hidden_size, intermediate_size, enlarge
):
    """The last expert, whose offsets do not fit in 32 bits, and the same expert alone: the same numbers."""
    if INTERPRETED:  # where time is per operation, of any size
        _set_tiles(monkeypatch, _large_tile)
    sizes = {"num_experts": 1, "hidden_size": hidden_size, "intermediate_size": intermediate_size}
    alone = make_layer(group=[0], **form, **sizes, dtype=torch.bfloat16)
    x = torch.randn((1, hidden_size), generator=generator).to(torch.bfloat16)
    weights = torch.ones(1, 1)

    parts = dict(alone.tensors())
    num_experts = enlarge(parts)
    parts["group"] = parts["group"].repeat(num_experts)
    large = FactoredExperts.from_tensors(parts, **{**alone.sizes(), "num_experts": num_experts})
    outputs = []
    for layer in (alone, large):
        index = torch.full((1, 1), layer.num_experts - 1)
        call = (t.to(on_triton.device) for t in (x, index, weights))
        outputs.append(resmoe_kernels.experts(*call, layer.to(on_triton.device)).cpu())
    assert outputs[0].abs().max() > 0
    torch.testing.assert_close(outputs[1], outputs[0])


def _large_tile(kernel: str, problem: Problem, target: str) -> Tile:
    over_hidden = kernel in ("decode_x", "decode_gate_up", "prefill_gate_up", "prefill_shrink")
    rows, depth = (64, 4096) if over_hidden else (4096, 64)
    return Tile(tokens=16, rows=rows, depth=min(depth, 512) if problem.sparse else depth)
