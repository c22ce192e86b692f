"""``experts`` on every backend against the float64 oracle: routings, forms, dtypes, strides, gradients."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import resmoe_kernels
from resmoe_kernels import ops
from resmoe_kernels.activations import register_gate
from resmoe_kernels.experts_reference import experts as experts_reference
from resmoe_kernels.factored import FactoredExperts
from resmoe_kernels.packed import declines
from tests.accuracy import assert_accurate
from tests.conftest import INTERPRETED
from tests.oracle import dense_experts, oracle

pytestmark = pytest.mark.usefixtures("one_thread")

GROUPS = [0, 1, 0, 2, 1, 0]
RAGGED = [16, 0, 4, 32, 2, 8]
EVERYTHING = {"group": [0, 1, -1, 0, 1, 0], "ranks": RAGGED, "sparse": 8, "bias": True}

LOW_RANK = {"group": [0, 1, -1, 0, 1, 0], "ranks": RAGGED, "bias": True}
_CODES = "base_gate_up=int4/128 base_down=int8/64 u_gate_up=int3 v_gate_up=int4/32 u_down=int2 v_down=int8/32"

# ---- routings: what a router can send


def _uniform(generator: torch.Generator, tokens: int, experts: int) -> Tensor:
    return torch.rand((tokens, experts), generator=generator).topk(3).indices


def _zipf(generator: torch.Generator, tokens: int, experts: int) -> Tensor:
    share = 1 / torch.arange(1, experts + 1, dtype=torch.float64) ** 1.5
    return torch.multinomial(share.expand(tokens, -1), 3, generator=generator)


def _skipping(generator: torch.Generator, tokens: int, experts: int) -> Tensor:
    index = _uniform(generator, tokens, experts)
    index[0::4, 0], index[1::4, 1], index[2::4, 2] = -1, experts, 2**31 - 1
    index[3] = -(2**31)
    return index


ROUTINGS: dict[str, Callable[[torch.Generator, int], Tensor]] = {
    # The ordinary case: distinct experts, about evenly.
    "uniform": lambda g, E: _uniform(g, 11, E),
    # More tokens than any tile is tall, and not a multiple of one.
    "many-tokens": lambda g, E: _uniform(g, 133, E),
    # All tokens to one expert: the longest run of one, all others empty.
    "one-hot": lambda g, E: torch.full((11, 1), 3),
    # Very uneven runs, as trained routers give.
    "zipf": lambda g, E: _zipf(g, 40, E),
    # First and last expert get nothing: empty runs at both ends of a sort.
    "empty-experts": lambda g, E: _uniform(g, 11, E - 2) + 1,
    # Decode.
    "one-token": lambda g, E: _uniform(g, 1, E),
    # An expert-parallel rank can be left with no token at all.
    "no-token": lambda g, E: torch.empty((0, 3), dtype=torch.int64),
    # No slot at all: the output is zero, not uninitialised.
    "no-slot": lambda g, E: torch.empty((4, 0), dtype=torch.int64),
    # Every id outside [0, E) skips its slot: -1, E, both ends of int32 (threshold routing, parallel experts).
    "skipped-slots": lambda g, E: _skipping(g, 11, E),
    # Zeros out, also from uninitialised memory.
    "all-skipped": lambda g, E: torch.tensor([[-1, E, E + 1]]).repeat(5, 1),
    # Merged experts put one expert twice into a token's slots; its base is still applied once.
    "expert-twice": lambda g, E: torch.tensor([[2, 2, 0], [1, 3, 1], [4, 4, 4]]),
    # Dense routing: every token meets every expert.
    "all-experts": lambda g, E: torch.arange(E).repeat(7, 1),
}

# ---- forms: which parts a layer has

FORMS: dict[str, dict] = {
    # Each expert its own base and nothing else is the plain dense layer.
    "dense": {"group": [0, 1, 2, 3, 4, 5]},
    # Permuted: an expert's base is group[e], not e.
    "dense-permuted": {"group": [4, 2, 0, 5, 1, 3]},
    "base-only": {"group": [0] * 6},
    # Some experts keep no base.
    "groups-with-none": {"group": [1, -1, 0, -1, 1, 0], "ranks": RAGGED},
    # A base that nobody uses.
    "no-group-used": {"group": [0, -1, -1, -1, -1, -1], "ranks": RAGGED},
    # Pruned to low rank (MoE-I2): no base.
    "low-rank-only": {"ranks": [16] * 6},
    # Ranks of no common size, among them none at all and odd ones.
    "ragged": {"ranks": [16, 0, 3, 33, 1, 8]},
    "rank-0": {"group": GROUPS, "ranks": [0] * 6},
    "base-low-rank": {"group": GROUPS, "ranks": RAGGED},
    "block-4": {"group": GROUPS, "sparse": 4},
    "block-8": {"group": GROUPS, "sparse": 8},
    "block-12": {"group": GROUPS, "sparse": 12},
    # In the last word of 37 or 45 columns there are 5 or 13 columns: fewer than 16 to keep.
    "block-16": {"group": GROUPS, "sparse": 16},
    "block-only": {"sparse": 16},
    "bitmap": {"group": GROUPS, "sparse": "bitmap"},
    "bitmap-only": {"sparse": "bitmap"},
    "empty-sparse": {"group": GROUPS, "sparse": "empty"},
    "both": {"group": GROUPS, "ranks": RAGGED, "sparse": "bitmap"},
    # A method may compress one matrix only.
    "gate-up-only": {"group": GROUPS, "ranks": RAGGED, "sparse": 8, "only": "gate_up"},
    "down-only": {"group": GROUPS, "ranks": RAGGED, "sparse": "bitmap", "only": "down"},
    "bias": {"group": GROUPS, "bias": True},
    "everything": EVERYTHING,
    # Where there is no residual in one matrix and no base, that matrix is zero and only its bias speaks.
    "bias-alone": {"bias": True, "ranks": RAGGED, "only": "gate_up"},
    "one-expert": {"num_experts": 1, "group": [0], "ranks": [4], "sparse": 8},
    # A residual of every place, beside everything else and alone: a plain expert.
    "full": {"group": [0, 1, -1, 0, 1, 0], "ranks": RAGGED, "full": True, "bias": True},
    "full-only": {"full": True},
    # Codes of base and factors, at every number of bits and with groups that end within a row.
    "codes": {**LOW_RANK, "payloads": _CODES},
    "codes-full": {**LOW_RANK, "full": True, "payloads": f"{_CODES} values_gate_up=int3/32 values_down=int2/64"},
    "codes-only": {"full": True, "payloads": "values_gate_up=int4/32 values_down=int8/128"},
    # Some parts as codes beside floats, and a base of codes under a sparse residual, which is not added to it.
    "codes-and-floats": {**EVERYTHING, "payloads": "base_down=int2/32 v_gate_up=int4/64 u_down=int8"},
    "codes-of-one": {"num_experts": 1, "group": [0], "ranks": [40], "payloads": _CODES},
    # Codes under a mask: for the reference.
    "codes-block": {**EVERYTHING, "payloads": "values_gate_up=int4/32 values_down=int2/64"},
}


def inputs(
    index: Tensor, hidden_size: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """x, index and router weights that sum to one, as a softmax over the slots gives them."""
    x = torch.randn((len(index), hidden_size), generator=generator).to(dtype)
    weights = torch.rand(index.shape, generator=generator) + 0.1
    return x, index, (weights / weights.sum(-1, keepdim=True)).to(dtype)


def run_and_check(
    backend, call: tuple[Tensor, Tensor, Tensor], layer: FactoredExperts, activation: str = "silu", **how
) -> Tensor:
    x, index, weights = (t.to(backend.device) for t in call)
    # The kernels of every backend serve the same, but codes and full residuals.
    floats_only = layer.declined_payload() if backend.name == "triton" else None
    reason = ops.declines_call(x.dtype, activation) or floats_only or declines(layer)
    if backend.name in ("cpu", "triton") and reason is not None:  # forced, it refuses; under auto the reference runs
        with pytest.raises(
            ValueError, match=f"^experts: the {backend.name} kernels do not serve {re.escape(reason)}; "
        ):
            resmoe_kernels.experts(x, index, weights, layer, activation)
        return x
    output = resmoe_kernels.experts(x, index, weights, layer.to(backend.device), activation)
    assert output.device == x.device
    how.setdefault("rounded_weights", bool(layer.payloads))  # codes, as AMX multiplies them; no more on other sets
    assert_accurate(output, *call, layer.tensors(), layer.sizes(), activation=activation, **how)
    return output


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
def test_routing(backend, make_layer, generator, routing, index_dtype):
    layer = make_layer(**EVERYTHING)
    index = ROUTINGS[routing](generator, layer.num_experts).to(index_dtype)
    run_and_check(backend, inputs(index, layer.hidden_size, generator), layer)


def test_ids_beyond_int32_are_skipped_and_not_wrapped(backend, make_layer, generator):
    """2^32 is 0 when cut to 32 bits: such an id must skip its slot, not hit expert 0."""
    layer = make_layer(**EVERYTHING)
    index = torch.tensor([[2**32, 1], [2, -(2**32)], [2**63 - 1, -(2**63)]])
    run_and_check(backend, inputs(index, layer.hidden_size, generator), layer)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_form(backend, make_layer, generator, form, dtype):
    layer = make_layer(**FORMS[form], dtype=dtype)
    index = torch.randint(-1, layer.num_experts + 1, (17, 3), generator=generator)
    run_and_check(backend, inputs(index, layer.hidden_size, generator, dtype), layer)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routing_of_codes(backend, make_layer, generator, routing):
    layer = make_layer(**FORMS["codes-full"], dtype=torch.bfloat16)
    index = ROUTINGS[routing](generator, layer.num_experts)
    run_and_check(backend, inputs(index, layer.hidden_size, generator, torch.bfloat16), layer)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_codes(backend, make_layer, generator, bits, group):
    """Several groups a row, more than a block of columns, few tokens and many; sides that no unit divides."""
    grouped = f"int{bits}/{group}"
    stored = {"base": grouped, "u": f"int{bits}", "v": grouped, "values": grouped}
    names = ("base_gate_up", "base_down", "u_gate_up", "v_gate_up", "u_down", "v_down", "values_gate_up", "values_down")
    payloads = " ".join(f"{name}={stored[name.partition('_')[0]]}" for name in names)
    sizes = {"num_experts": 2, "hidden_size": 283, "intermediate_size": 150}
    layer = make_layer(group=[0, 0], ranks=[40, 7], full=True, payloads=payloads, dtype=torch.bfloat16, **sizes)
    for tokens in (1, 3, 30):
        index = torch.arange(2).repeat(tokens, 1)
        run_and_check(backend, inputs(index, layer.hidden_size, generator, torch.bfloat16), layer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["everything", "both", "codes-full", "codes-only"])
def test_dtype(backend, make_layer, generator, form, dtype):
    layer = make_layer(**FORMS[form], dtype=dtype)
    run_and_check(backend, inputs(_uniform(generator, 40, 6), layer.hidden_size, generator, dtype), layer)


def test_router_weights_may_be_more_precise_than_x(backend, make_layer, generator):
    """Routers work in float32: their weights must not be rounded to x's dtype before they are used."""
    layer = make_layer(**EVERYTHING, dtype=torch.bfloat16)
    x, index, _ = inputs(_uniform(generator, 40, 6), layer.hidden_size, generator, torch.bfloat16)
    weights = torch.rand(index.shape, generator=generator)
    output = run_and_check(backend, (x, index, weights), layer)
    on_device = (t.to(backend.device) for t in (x, index, weights.bfloat16()))
    assert not torch.equal(output, resmoe_kernels.experts(*on_device, layer.to(backend.device)))


def test_router_weights_of_any_sign_and_size(backend, make_layer, generator):
    """The weight multiplies after the activation, so sign, zero and scale must pass through linearly."""
    layer = make_layer(**EVERYTHING)
    x, index, _ = inputs(_uniform(generator, 5, 6), layer.hidden_size, generator)
    weights = torch.tensor([[1.0, 0.0, -1.0]]).repeat(5, 1) * torch.tensor([[1e-3], [1.0], [7.0], [-50.0], [0.0]])
    output = run_and_check(backend, (x, index, weights), layer)
    assert torch.count_nonzero(output[4]) == 0


@pytest.mark.parametrize(
    "x_dtype, layer_dtype", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str
)
def test_layer_and_x_may_differ_in_dtype(backend, make_layer, generator, x_dtype, layer_dtype):
    layer = make_layer(**EVERYTHING, dtype=layer_dtype)
    run_and_check(backend, inputs(_uniform(generator, 20, 6), layer.hidden_size, generator, x_dtype), layer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_reference_rounds_once(make_layer, generator, dtype):
    """The reference promises float32 sums and one rounding: half an ulp, whatever error PyTorch makes."""
    layer = make_layer(**EVERYTHING, dtype=dtype)
    x, index, weights = inputs(_uniform(generator, 30, 6), layer.hidden_size, generator, dtype)
    with resmoe_kernels.backend("reference"):
        got = resmoe_kernels.experts(x, index, weights, layer).double().numpy()
    expected = oracle(x, index, weights, layer.tensors(), layer.sizes())
    half_ulp = 0.5 * torch.finfo(dtype).eps * 2 ** np.floor(np.log2(np.abs(expected)))
    assert (np.abs(got - expected) <= half_ulp + 1e-5).all()


@pytest.mark.parametrize("factorization", ["stacked", "separate", "joint"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize(
    "form", [{"ranks": [16, 0, 4, 32, 2, 8]}, {**EVERYTHING, "sparse": "bitmap"}], ids=["alone", "everything"]
)
def test_factorization(backend, make_layer, generator, factorization, gated, form):
    layer = make_layer(**form, factorization=factorization, gated=gated)
    run_and_check(backend, inputs(_uniform(generator, 12, 6), layer.hidden_size, generator), layer)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "relu2", "identity"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
def test_activation(backend, make_layer, generator, activation, gated):
    layer = make_layer(**EVERYTHING, gated=gated)
    x, index, weights = inputs(_uniform(generator, 12, 6), layer.hidden_size, generator)
    run_and_check(backend, (3 * x, index, weights), layer, activation)  # 3 x: well into the curved parts


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
def test_registered_gate(backend, make_layer, generator, gated):
    """A model's own gate sees the whole z, so it may interleave gate and up, clamp and shift."""

    def gate(z: Tensor) -> Tensor:
        if not gated:
            return z.clamp(max=1.5) * torch.sigmoid(1.702 * z)
        glu, linear = z[..., ::2].clamp(max=1.5), z[..., 1::2].clamp(-1.5, 1.5)
        return glu * torch.sigmoid(1.702 * glu) * (linear + 1)

    def same_in_numpy(z: np.ndarray) -> np.ndarray:
        glu = np.minimum(z[::2] if gated else z, 1.5)
        return glu / (1 + np.exp(-1.702 * (glu if gated else z))) * (np.clip(z[1::2], -1.5, 1.5) + 1 if gated else 1)

    register_gate("test_experts_gate", gate)
    layer = make_layer(**EVERYTHING, gated=gated)
    call = inputs(_uniform(generator, 12, 6), layer.hidden_size, generator)
    run_and_check(backend, call, layer, "test_experts_gate", gates={"test_experts_gate": same_in_numpy})


@pytest.mark.parametrize(
    "hidden_size, intermediate_size",
    [
        (1, 1),  # the smallest there is
        (31, 33),  # one column below and above a word
        (32, 64),  # whole words, so no narrow last one
        (8, 100),  # less than a word wide, so block 16 of 32 keeps all columns
        (130, 7),
    ],
)
@pytest.mark.parametrize("sparse", [16, "bitmap"])
def test_size(backend, make_layer, generator, hidden_size, intermediate_size, sparse):
    form = {
        **EVERYTHING,
        "sparse": sparse,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
    }
    layer = make_layer(**form)
    run_and_check(backend, inputs(_uniform(generator, 12, 6), hidden_size, generator), layer)


# ---- strides


def _strided(t: Tensor) -> Tensor:
    """The same numbers as a view into a larger tensor, its neighbours poison."""
    poison = float("nan") if t.is_floating_point() else torch.iinfo(t.dtype).max
    large = torch.full([2 * n + 1 for n in t.shape], poison, dtype=t.dtype)
    view = large[tuple(slice(1, None, 2) for _ in t.shape)]
    view.copy_(t)
    assert not view.is_contiguous() or t.numel() <= 1
    return view


@pytest.mark.parametrize("which", ["x", "top_k_index", "top_k_weights", "all"])
def test_strided_inputs(backend, make_layer, generator, which):
    layer = make_layer(**EVERYTHING)
    call = inputs(_uniform(generator, 13, 6), layer.hidden_size, generator)
    names = ("x", "top_k_index", "top_k_weights")
    run_and_check(
        backend,
        tuple(_strided(t) if which in (n, "all") else t for n, t in zip(names, call, strict=True)),
        layer,
    )


def test_transposed_and_broadcast_inputs(backend, make_layer, generator):
    layer = make_layer(**EVERYTHING)
    x, index, _ = inputs(_uniform(generator, 13, 6), layer.hidden_size, generator)
    broadcast = torch.tensor([[0.25]]).expand(13, 3)
    run_and_check(backend, (x.T.contiguous().T, index.T.contiguous().T, broadcast), layer)
    run_and_check(backend, (x[:1].expand(13, -1), index, broadcast), layer)


@pytest.mark.parametrize("form", ["everything", "both"])
def test_strided_layer(backend, make_layer, generator, form):
    """A checkpoint may hand out views of larger tensors (one rank's slice, a transposed matrix)."""
    layer = make_layer(**FORMS[form])
    views = FactoredExperts.from_tensors({n: _strided(t) for n, t in layer.tensors().items()}, **layer.sizes())
    run_and_check(backend, inputs(_uniform(generator, 13, 6), layer.hidden_size, generator), views)


# ---- identities


def test_dense_layer_equals_plain_experts(backend, make_layer, generator):
    """G = E and no residual: nothing is compressed, nothing may be lost."""
    layer = make_layer(group=[0, 1, 2, 3, 4, 5])
    x, index, weights = inputs(_uniform(generator, 9, 6), layer.hidden_size, generator)
    output = run_and_check(backend, (x, index, weights), layer)
    assert layer.base_gate_up is not None and layer.base_down is not None
    for t in range(9):
        expected = torch.zeros(layer.hidden_size)
        for e, w in zip(index[t].tolist(), weights[t], strict=True):
            gate, up = (layer.base_gate_up[e] @ x[t]).chunk(2)
            expected += w * (layer.base_down[e] @ (torch.nn.functional.silu(gate) * up))
        torch.testing.assert_close(output[t].cpu(), expected)


def test_full_rank_without_base_is_exact(backend, make_layer, generator):
    """U = I, V = W: the low rank holds the whole matrix and the answer is the dense layer's."""
    dense = make_layer(group=[0, 1, 2, 3, 4, 5])
    parts = {}
    for matrix in ("gate_up", "down"):
        base = dense.tensors()[f"base_{matrix}"]
        rows = base.shape[1]
        parts[f"u_{matrix}"] = torch.eye(rows).repeat(6, 1)
        parts[f"v_{matrix}"] = base.flatten(0, 1)
        parts[f"rank_offsets_{matrix}"] = torch.arange(0, 6 * rows + 1, rows, dtype=torch.int32)
    layer = FactoredExperts.from_tensors(parts, **dense.sizes())
    x, index, weights = (t.to(backend.device) for t in inputs(_uniform(generator, 9, 6), 45, generator))
    got = resmoe_kernels.experts(x, index, weights, layer.to(backend.device))
    torch.testing.assert_close(got, resmoe_kernels.experts(x, index, weights, dense.to(backend.device)))


def test_a_part_that_is_empty_changes_no_bit(backend, make_layer, generator):
    """Rank 0 everywhere and an S that keeps nothing are the layer without them."""
    full = make_layer(group=GROUPS, ranks=[0] * 6, sparse="empty", bias=True)
    bare = {n: t for n, t in full.tensors().items() if n.startswith(("group", "base", "bias"))}
    x, index, weights = (t.to(backend.device) for t in inputs(_uniform(generator, 9, 6), 45, generator))
    got = resmoe_kernels.experts(x, index, weights, full.to(backend.device))
    without = FactoredExperts.from_tensors(bare, **full.sizes()).to(backend.device)
    assert torch.equal(got, resmoe_kernels.experts(x, index, weights, without))


@pytest.mark.parametrize("form", ["everything", "both"])
def test_two_calls_give_equal_bits(backend, make_layer, generator, form):
    layer = make_layer(**FORMS[form], dtype=torch.bfloat16).to(backend.device)
    index = _zipf(generator, 200 if not INTERPRETED else 20, 6)  # interpreted, 200 take half a minute a call
    call = [t.to(backend.device) for t in inputs(index, layer.hidden_size, generator, torch.bfloat16)]
    first = resmoe_kernels.experts(*call, layer)
    assert all(torch.equal(first, resmoe_kernels.experts(*call, layer)) for _ in range(3))


def test_arguments_are_not_written(backend, make_layer, generator):
    layer = make_layer(**EVERYTHING).to(backend.device)
    call = [t.to(backend.device) for t in inputs(_skipping(generator, 11, 6), layer.hidden_size, generator)]
    before = [t.clone() for t in (*call, *layer.tensors().values())]
    resmoe_kernels.experts(*call, layer)
    assert all(torch.equal(b, t) for b, t in zip(before, (*call, *layer.tensors().values()), strict=True))


# ---- what must not reach the output


def test_a_token_reaches_no_other_token(backend, make_layer, generator):
    layer = make_layer(**EVERYTHING).to(backend.device)
    x, index, weights = (t.to(backend.device) for t in inputs(_uniform(generator, 11, 6), layer.hidden_size, generator))
    x[4] = float("nan")
    output = resmoe_kernels.experts(x, index, weights, layer)
    assert output[4].isnan().all() and output[torch.arange(11) != 4].isfinite().all()


def test_weights_of_skipped_slots_are_not_read(backend, make_layer, generator):
    """A router may leave anything in the slots it skips."""
    layer = make_layer(**EVERYTHING).to(backend.device)
    x, index, weights = (
        t.to(backend.device) for t in inputs(_skipping(generator, 11, 6), layer.hidden_size, generator)
    )
    clean = resmoe_kernels.experts(x, index, weights, layer)
    weights[(index < 0) | (index >= 6)] = float("nan")
    assert torch.equal(resmoe_kernels.experts(x, index, weights, layer), clean)


@pytest.mark.parametrize("form", ["everything", "both"])
def test_experts_that_no_token_hit_are_not_read(backend, make_layer, generator, form):
    layer = make_layer(**FORMS[form])
    index = _uniform(generator, 11, 3) + 3  # never experts 0, 1, 2, that is: never the first rows of a ragged part
    for name, tensor in layer.tensors().items():
        matrix = "gate_up" if name.endswith("gate_up") else "down"
        if name.startswith(("u_", "v_")):
            tensor[: layer.tensors()[f"rank_offsets_{matrix}"][3]] = float("nan")
        elif name.startswith("values_") and tensor.dim() == 1:
            tensor[: layer.tensors()[f"row_offsets_{matrix}"][3 * layer.rows_columns(matrix)[0]]] = float("nan")
        elif name.startswith(("values_", "bias_")):
            tensor[:3][tensor[:3] != 0] = float("nan")  # not the zeros behind the values of a narrower last word
    run_and_check(backend, inputs(index, layer.hidden_size, generator), layer)


# ---- cost


def _flops(layer: FactoredExperts, call: tuple[Tensor, Tensor, Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        experts_reference(*call, layer)
    return counter.get_total_flops()


def test_base_products_are_computed_once_per_token_and_group(make_layer, generator):
    """The reference's FLOPs: 2 N K per token and group; 2 R (N + K) and 2 N K (S, expanded) per pair."""
    group = [0, 1, -1, 0, 1, 0]
    layer = make_layer(group=group, ranks=RAGGED, sparse=8)
    index = torch.cat([_uniform(generator, 20, 6), torch.tensor([[0, 0, 3], [2, 2, -1], [1, 4, 6]])])
    call = inputs(index, layer.hidden_size, generator)
    hit = [[e for e in slots if 0 <= e < 6] for slots in index.tolist()]

    expected = 0
    for matrix, ranks in (("gate_up", RAGGED), ("down", RAGGED[::-1])):
        rows, columns = layer.rows_columns(matrix)
        token_groups = sum(len({group[e] for e in slots} - {-1}) for slots in hit)
        expected += 2 * rows * columns * token_groups
        expected += sum(2 * ranks[e] * (rows + columns) + 2 * rows * columns for slots in hit for e in slots)
    assert _flops(layer, call) == expected


@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_cost_of_a_shared_base_does_not_grow_with_top_k(make_layer, generator, top_k):
    shared, dense = make_layer(group=[0] * 6), make_layer(group=[0, 1, 2, 3, 4, 5])
    index = torch.rand((8, 6), generator=generator).topk(top_k).indices
    call = inputs(index, 45, generator)
    one_expert = 2 * 8 * (2 * 37 * 45 + 45 * 37)
    assert _flops(shared, call) == one_expert
    assert _flops(dense, call) == top_k * one_expert


# ---- gradients

SMALL = {"num_experts": 3, "hidden_size": 6, "intermediate_size": 5, "dtype": torch.float64, "bias": True}
GRADIENT_FORMS: dict[str, dict] = {
    "block": {**SMALL, "group": [0, 1, -1], "ranks": [2, 0, 4], "sparse": 4},
    "bitmap": {**SMALL, "group": [0, 0, 0], "ranks": [2, 0, 4], "sparse": "bitmap"},
    "separate": {**SMALL, "ranks": [2, 0, 4], "factorization": "separate"},
    "joint": {**SMALL, "group": [0, 0, 1], "ranks": [2, 0, 4], "factorization": "joint"},
    "ungated": {**SMALL, "group": [0, 0, 1], "ranks": [2, 0, 4], "gated": False},
}
SMALL_INDEX = torch.tensor([[0, 2], [1, 1], [2, -1], [3, 0]])  # twice the same, and two kinds of skipped


def _floats(layer: FactoredExperts) -> tuple[list[str], list[Tensor]]:
    named = {n: t for n, t in layer.tensors().items() if t.is_floating_point()}
    return list(named), [t.clone().requires_grad_() for t in named.values()]


@pytest.mark.parametrize("form", GRADIENT_FORMS)
def test_gradcheck(backend, make_layer, generator, form):
    """x, the router weights and every float factor, through the op."""
    if backend.name in ("cpu", "triton"):
        pytest.skip(f"needs float64, which the {backend.name} kernels do not serve")
    layer = make_layer(**GRADIENT_FORMS[form]).to(backend.device)
    index = SMALL_INDEX.to(backend.device)
    x = torch.randn((4, 6), generator=generator, dtype=torch.float64).to(backend.device).requires_grad_()
    weights = torch.rand((4, 2), generator=generator, dtype=torch.float64).to(backend.device).requires_grad_()
    names, factors = _floats(layer)

    def run(x: Tensor, weights: Tensor, *factors: Tensor) -> Tensor:
        changed = {**layer.tensors(), **dict(zip(names, factors, strict=True))}
        return resmoe_kernels.experts(x, index, weights, FactoredExperts.from_tensors(changed, **layer.sizes()))

    assert torch.autograd.gradcheck(run, (x, weights, *factors), fast_mode=True)


@pytest.mark.parametrize("form", ["everything", "both"])
def test_gradients_are_those_of_the_reference(backend, make_layer, generator, form):
    layer = make_layer(**FORMS[form]).to(backend.device)
    call = [t.to(backend.device) for t in inputs(_skipping(generator, 11, 6), layer.hidden_size, generator)]
    grad = torch.randn(call[0].shape, generator=generator).to(backend.device)

    def gradients(experts: Callable) -> list[Tensor]:
        names, factors = _floats(layer)
        x, weights = (t.clone().requires_grad_() for t in (call[0], call[2]))
        changed = {**layer.tensors(), **dict(zip(names, factors, strict=True))}
        output = experts(x, call[1], weights, FactoredExperts.from_tensors(changed, **layer.sizes()))
        return list(torch.autograd.grad(output, [x, weights, *factors], grad))

    for got, expected in zip(gradients(resmoe_kernels.experts), gradients(experts_reference), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("wanted", ["x", "top_k_weights", "base_down"])
def test_gradient_of_one_input_alone(backend, make_layer, generator, wanted):
    """What needs no gradient gets none, and its absence disturbs no other."""
    layer = make_layer(**EVERYTHING).to(backend.device)
    x, index, weights = (t.to(backend.device) for t in inputs(_uniform(generator, 7, 6), layer.hidden_size, generator))
    tensors = {"x": x, "top_k_weights": weights, **layer.tensors()}
    tensors[wanted].requires_grad_()
    output = resmoe_kernels.experts(x, index, weights, layer)
    (grad,) = torch.autograd.grad(output.sum(), tensors[wanted])
    assert grad.shape == tensors[wanted].shape and grad.abs().sum() > 0


def test_bfloat16_gradients_have_the_dtype_of_their_input(backend, make_layer, generator):
    layer = make_layer(**EVERYTHING, dtype=torch.bfloat16).to(backend.device)
    x, index, _ = (t.to(backend.device) for t in inputs(_uniform(generator, 7, 6), 45, generator, torch.bfloat16))
    weights = torch.rand(index.shape, device=backend.device, requires_grad=True)
    resmoe_kernels.experts(x.requires_grad_(), index, weights, layer).float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    assert weights.grad is not None and weights.grad.dtype == torch.float32


def test_nothing_is_saved_without_gradients(backend, make_layer, generator):
    layer = make_layer(**EVERYTHING).to(backend.device)
    call = [t.to(backend.device) for t in inputs(_uniform(generator, 7, 6), 45, generator)]
    assert resmoe_kernels.experts(*call, layer).grad_fn is None
    with torch.inference_mode():
        assert resmoe_kernels.experts(*call, layer).is_inference()


def test_autocast_does_not_lower_the_arithmetic(backend, make_layer, generator):
    """Inside autocast every matmul would be bfloat16; the op promises float32 sums whatever surrounds it."""
    layer = make_layer(**EVERYTHING).to(backend.device)
    call = [t.to(backend.device) for t in inputs(_uniform(generator, 7, 6), 45, generator)]
    plain = resmoe_kernels.experts(*call, layer)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        inside = resmoe_kernels.experts(*call, layer)
    assert torch.equal(inside, plain)


def test_dense_matrices_of_the_oracle_are_those_of_materialize(make_layer):
    """Oracle and package agree on the weights, so a disagreement above is one of the forward pass."""
    layer = make_layer(**FORMS["both"], dtype=torch.float64)
    dense = layer.materialize(torch.float64)
    for got, expected in zip((dense.gate_up, dense.down), dense_experts(layer.tensors(), layer.sizes()), strict=True):
        np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-12)
