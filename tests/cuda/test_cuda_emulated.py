"""The CUDA kernels against the float64 oracle, through their binding: emulated on CPU tensors, and where there is a GPU
on it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from resmoe_kernels import dispatch, ops
from resmoe_kernels.experts_cuda import declines, experts
from resmoe_kernels.factored import DenseExperts, FactoredExperts
from tests.accuracy import assert_accurate
from tests.cuda import emulated_cuda
from tests.cuda.emulated_cuda import ARRIVALS, OPS, ORDERS, Gpu
from tests.kernels.test_experts import ROUTINGS, inputs
from tests.oracle import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("one_thread")

MOST_TOKENS = 16
BF16, FP16 = torch.bfloat16, torch.float16
SIZES = {"hidden_size": 96, "intermediate_size": 64}  # three chunks of 32 columns, and two
ONE_BASE = {"group": [0] * 6, **SIZES}
RANKS = [16, 32, 16, 48, 16, 32]
LOW_RANK: dict[str, dict] = {
    "shared-base": {**ONE_BASE, "ranks": RANKS},
    # No multiple of the 16 that a product adds up, more than the 64 of a chunk, none.
    "ragged": {**ONE_BASE, "ranks": [16, 0, 3, 70, 1, 33]},
    "low-rank-only": {**SIZES, "ranks": RANKS},
    "some-without-base": {**ONE_BASE, "group": [0, -1, 0, -1, -1, 0], "ranks": RANKS},
    # A base that nobody uses.
    "none-with-base": {**ONE_BASE, "group": [-1, -1, -1, 0, -1, -1], "ranks": [0, 16, 16, 0, 16, 16]},
    "base-only": ONE_BASE,
    "rank-0": {**ONE_BASE, "ranks": [0] * 6},
    "gate-up-only": {**ONE_BASE, "ranks": RANKS, "only": "gate_up"},
    "down-only": {**ONE_BASE, "ranks": RANKS, "only": "down"},
    "gate-up-only-no-base": {**SIZES, "ranks": RANKS, "only": "gate_up"},
    "ungated": {**ONE_BASE, "ranks": RANKS, "gated": False},
    "one-expert": {**SIZES, "num_experts": 1, "group": [0], "ranks": [20]},
}
BLOCK_SPARSE: dict[str, dict] = {
    "block-4": {**ONE_BASE, "sparse": 4},
    "block-8": {**ONE_BASE, "sparse": 8},
    "block-12": {**ONE_BASE, "sparse": 12},
    "block-16": {**ONE_BASE, "sparse": 16},
    "block-only": {**SIZES, "sparse": 8},
    "block-some-without-base": {**ONE_BASE, "group": [0, -1, 0, -1, -1, 0], "sparse": 8},
    "block-ungated": {**ONE_BASE, "sparse": 8, "gated": False},
    "block-one-expert": {**SIZES, "num_experts": 1, "group": [0], "sparse": 8},
}
FORMS = {**LOW_RANK, **BLOCK_SPARSE}
EACH_OP = {"low_rank_decode": LOW_RANK["ragged"], "block_sparse_decode": BLOCK_SPARSE["block-8"]}
# The extremes of what a GPU may do, with any number of blocks, up to more than a phase has tasks.
GPUS = [
    *(Gpu(n, order=order, copies=copies) for n, (order, copies) in enumerate(product(ORDERS, ARRIVALS), start=1)),
    *(Gpu(40, order=order, seed=7) for order in ORDERS),
]


@pytest.fixture(scope="session")
def kernels() -> None:
    """One build, or one failure of it, for all tests."""
    if (reason := emulated_cuda.missing()) is not None:
        pytest.skip(reason)
    emulated_cuda.library()


@pytest.fixture
def emulated(kernels: None) -> Iterator[None]:
    with emulated_cuda.on_cpu():
        yield


@pytest.fixture(params=[pytest.param("cpu", id="emulated"), pytest.param("cuda", id="on-cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where the CUDA kernels run: emulated, on the CPU's tensors."""
    if request.param == "cpu":
        request.getfixturevalue("emulated")
    elif (reason := dispatch.missing("cuda")) is not None:
        pytest.skip(reason)
    return request.param


def bounded(tensor: Tensor) -> Tensor:
    """The same tensor between 256 bytes that no right answer can come from: NaN, or the largest integer."""
    poison = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    beside = 256 // tensor.element_size()
    large = torch.full((tensor.numel() + 2 * beside,), poison, dtype=tensor.dtype)
    view = large[beside : beside + tensor.numel()].view(tensor.shape)
    return view.copy_(tensor)


def run(device: str, call: tuple[Tensor, ...], layer: FactoredExperts, activation: str = "silu") -> Tensor:
    if call[1].numel():  # a call without pairs has nothing for kernels to do, and the binding answers it
        assert declines(call[0], call[1], layer, activation) is None
    parts = {name: bounded(t) for name, t in layer.tensors().items()}
    beside = FactoredExperts.from_tensors(parts, **layer.sizes()).to(device)
    return experts(*(bounded(t).to(device) for t in call), beside, activation).cpu()


def run_and_check(
    device: str, call: tuple[Tensor, Tensor, Tensor], layer: FactoredExperts, activation: str = "silu"
) -> Tensor:
    output = run(device, call, layer, activation)
    assert_accurate(output, *call, layer.tensors(), layer.sizes(), activation=activation)
    return output


def random_call(generator: torch.Generator, layer: FactoredExperts, tokens: int, dtype: torch.dtype = BF16):
    """Three slots a token, of different experts; every third token skips one."""
    index = torch.rand((tokens, max(layer.num_experts, 3)), generator=generator).topk(3).indices
    index[2::3, 1] = -1
    return inputs(index, layer.hidden_size, generator, dtype)


# ---- routings, forms, sizes, dtypes


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
def test_routing(device, make_layer, generator, routing, op, index_dtype):
    layer = make_layer(**EACH_OP[op], dtype=BF16)
    index = ROUTINGS[routing](generator, layer.num_experts)[:MOST_TOKENS].to(index_dtype)
    run_and_check(device, inputs(index, layer.hidden_size, generator, BF16), layer)


@pytest.mark.parametrize("op", OPS)
def test_ids_beyond_int32_are_skipped_and_not_wrapped(device, make_layer, generator, op):
    layer = make_layer(**EACH_OP[op], dtype=BF16)
    index = torch.tensor([[2**32, 1], [2, -(2**32)], [2**63 - 1, -(2**63)]])
    run_and_check(device, inputs(index, layer.hidden_size, generator, BF16), layer)


@pytest.mark.parametrize(  # one or two tokens of sparse experts are walked; products have 8 columns, one for each token
    "dtype, tokens", [(BF16, 1), (BF16, 2), (BF16, 3), (BF16, 8), (BF16, 9), (BF16, 16), (FP16, 2), (FP16, 13)], ids=str
)
@pytest.mark.parametrize("form", FORMS)
def test_form(device, make_layer, generator, form, dtype, tokens):
    layer = make_layer(**FORMS[form], dtype=dtype)
    run_and_check(device, random_call(generator, layer, tokens, dtype), layer)


@pytest.mark.parametrize(
    "hidden_size, intermediate_size",
    [
        (32, 32),  # the smallest that both serve
        (32, 160),
        (160, 32),
        (224, 96),
        (64, 544),  # chunks of a row that end within a tile
        (1056, 32),
    ],
)
@pytest.mark.parametrize("tokens", [1, 5, 16])
@pytest.mark.parametrize("op", OPS)
def test_size(device, make_layer, generator, op, tokens, hidden_size, intermediate_size):
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_experts": 3, "group": [0, -1, 0]}
    rest = {"ranks": [70, 0, 3]} if op == "low_rank_decode" else {"sparse": 8}
    layer = make_layer(**{**EACH_OP[op], **rest, **sizes}, dtype=BF16)
    run_and_check(device, random_call(generator, layer, tokens), layer)


@pytest.mark.parametrize("intermediate_size", [16, 48, 112])
def test_intermediate_sizes_that_only_low_rank_serves(device, make_layer, generator, intermediate_size):
    layer = make_layer(**{**LOW_RANK["ragged"], "intermediate_size": intermediate_size}, dtype=BF16)
    run_and_check(device, random_call(generator, layer, 7), layer)


@pytest.mark.parametrize("top_k, tokens", [(1, 16), (16, 16), (256, 1), (128, 2)])
@pytest.mark.parametrize("op", OPS)
def test_as_many_pairs_as_it_takes(device, make_layer, generator, op, top_k, tokens):
    layer = make_layer(**EACH_OP[op], dtype=BF16)
    index = torch.randint(0, layer.num_experts, (tokens, top_k), generator=generator)
    run_and_check(device, inputs(index, layer.hidden_size, generator, BF16), layer)


@pytest.mark.parametrize("op", OPS)
def test_many_experts(device, make_layer, generator, op):
    """As many as it takes, more than a block has threads; the last of them hit, and the id behind it skipped."""
    E, rest = (1024, {"ranks": [e % 4 for e in range(1024)]}) if op == "low_rank_decode" else (300, {"sparse": 4})
    layer = make_layer(hidden_size=32, intermediate_size=32, num_experts=E, group=[0] * E, **rest, dtype=BF16)
    index = torch.rand((8, E), generator=generator).topk(9).indices
    index[:, 1], index[:, 2] = E - 1, E
    run_and_check(device, inputs(index, 32, generator, BF16), layer)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("op", OPS)
def test_activation(device, make_layer, generator, op, gated, activation):
    layer = make_layer(**{**EACH_OP[op], "gated": gated}, dtype=BF16)
    x, index, weights = random_call(generator, layer, 4)
    run_and_check(device, (3 * x, index, weights), layer, activation)  # 3 x: well into the curved parts


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("op", OPS)
def test_activation_alone(device, make_layer, op, activation):
    """f(x), of which sums would hide the tails: at -3 the two kinds of gelu differ by a tenth."""
    residual = {"ranks": [0]} if op == "low_rank_decode" else {"sparse": 4}
    layer = make_layer(num_experts=1, hidden_size=32, intermediate_size=32, gated=False, group=[0], **residual)
    parts = {name: t.to(BF16) if t.is_floating_point() else t for name, t in layer.tensors().items()}
    for m in ("gate_up", "down"):
        parts[f"base_{m}"] = torch.eye(32, dtype=BF16)[None]
        if op == "block_sparse_decode":
            parts[f"values_{m}"].zero_()
    layer = FactoredExperts.from_tensors(parts, **layer.sizes())
    x = torch.linspace(-3.5, 3.5, 512).view(16, 32).to(BF16)
    y = run(device, (x, torch.zeros(16, 1).long(), torch.ones(16, 1)), layer, activation)
    expected = torch.tensor([ACTIVATIONS[activation](z) for z in x.flatten().tolist()]).view(16, 32)
    torch.testing.assert_close(y.float(), expected, rtol=0.01, atol=1e-6)  # h and y are rounded: 2^-8 each at most


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, FP16, BF16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_router_weights_of_any_dtype_and_size(device, make_layer, generator, op, dtype):
    """They are not rounded to x's dtype, and sign, zero and scale pass through."""
    layer = make_layer(**EACH_OP[op], dtype=BF16)
    x, index, _ = inputs(ROUTINGS["uniform"](generator, 6)[:5], layer.hidden_size, generator, BF16)
    weights = torch.tensor([[1.0, 0.0, -1.0]]).repeat(5, 1) * torch.tensor([[1e-3], [1.0], [7.0], [-50.0], [0.0]])
    output = run_and_check(device, (x, index, weights.to(dtype)), layer)
    assert torch.count_nonzero(output[4]) == 0


# ---- strides


def strided(t: Tensor) -> Tensor:
    """The same numbers as a view into a larger tensor, its neighbours poison."""
    poison = float("nan") if t.is_floating_point() else torch.iinfo(t.dtype).max
    large = torch.full([2 * n + 1 for n in t.shape], poison, dtype=t.dtype, device=t.device)
    return large[tuple(slice(1, None, 2) for _ in t.shape)].copy_(t)


def misaligned(t: Tensor) -> Tensor:
    """Contiguous, from one element after a multiple of 16 bytes."""
    return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)


@pytest.mark.parametrize("change", [strided, misaligned])
@pytest.mark.parametrize("which", ["x", "top_k_index", "top_k_weights"])
@pytest.mark.parametrize("op", OPS)
def test_inputs_as_they_come(device, make_layer, generator, op, which, change):
    layer = make_layer(**EACH_OP[op], dtype=BF16)
    call = random_call(generator, layer, 9)
    names = ("x", "top_k_index", "top_k_weights")
    on_device = [t.to(device) for t in call]
    changed = [change(t) if n == which else t for n, t in zip(names, on_device, strict=True)]
    assert torch.equal(experts(*changed, layer.to(device)).cpu(), run(device, call, layer))


@pytest.mark.parametrize("op", OPS)
def test_broadcast_inputs(device, make_layer, generator, op):
    layer = make_layer(**EACH_OP[op], dtype=BF16)
    x, index, _ = random_call(generator, layer, 9)
    x, index, weight = x.to(device), index.to(device), torch.tensor([[0.25]], device=device)
    call = (x[:1].expand(9, -1), index.T.contiguous().T, weight.expand(9, 3))
    output = experts(*call, layer.to(device)).cpu()
    assert_accurate(output, *call, layer.tensors(), layer.sizes())


@pytest.mark.parametrize("op", OPS)
def test_strided_layer(device, make_layer, generator, op):
    layer = make_layer(**EACH_OP[op], dtype=BF16)
    views = FactoredExperts.from_tensors(
        {n: strided(t.to(device)) for n, t in layer.tensors().items()}, **layer.sizes()
    )
    call = random_call(generator, layer, 9)
    assert torch.equal(experts(*(t.to(device) for t in call), views).cpu(), run(device, call, layer))


# ---- bits


@pytest.mark.parametrize("tokens", [1, 2, 7, 16])
@pytest.mark.parametrize("form", ["ragged", "base-only", "block-8"])
def test_the_same_bits_on_every_gpu(emulated, make_layer, generator, form, tokens):
    """Whatever runs first, arrives first and however many blocks there are; and again."""
    layer = make_layer(**FORMS[form], dtype=BF16)
    call = random_call(generator, layer, tokens)
    first = run_and_check("cpu", call, layer)
    for gpu in (*GPUS, Gpu()):
        gpu.use()
        assert torch.equal(run("cpu", call, layer), first), gpu


@pytest.mark.parametrize("op", OPS)
def test_repeated_calls_give_the_same_bits(device, make_layer, generator, op):
    """And write none of their arguments."""
    layer = make_layer(**EACH_OP[op], dtype=BF16).to(device)
    call = [t.to(device) for t in random_call(generator, layer, 16)]
    arguments = [*call, *layer.tensors().values()]
    before = [t.clone() for t in arguments]
    first = experts(*call, layer)
    assert all(torch.equal(experts(*call, layer), first) for _ in range(5))
    assert all(torch.equal(b, t) for b, t in zip(before, arguments, strict=True))


def shared_bytes(call: tuple[Tensor, ...], layer: FactoredExperts, gpu: Gpu) -> int:
    """What a launch asks for, as one without blocks says."""
    gpu._replace(units=0).use()
    with pytest.raises(RuntimeError, match=r"0 blocks of 256 threads, \d+ bytes of shared memory") as raised:
        experts(*call, layer)
    gpu.use()
    return int(re.findall(r"(\d+) bytes", str(raised.value))[0])


@pytest.mark.parametrize("tokens", [1, 2])
def test_a_gpu_with_little_shared_memory(emulated, make_layer, generator, tokens):
    """Where activations do not fit beside the ring, one or two tokens are not walked."""
    layer = make_layer(hidden_size=1056, intermediate_size=32, num_experts=2, group=[0, 0], sparse=8, dtype=BF16)
    call = inputs(torch.tensor([[1, 0]] * tokens), 1056, generator, BF16)
    walked = shared_bytes(call, layer, Gpu())
    assert shared_bytes(call, layer, Gpu(shared_bytes=walked)) == walked
    assert shared_bytes(call, layer, Gpu(shared_bytes=walked - 1)) < walked
    run_and_check("cpu", call, layer)


# ---- what must not reach the output


@pytest.mark.parametrize("op", OPS)
def test_a_token_reaches_no_other_token(device, make_layer, generator, op):
    layer = make_layer(**EACH_OP[op], dtype=BF16)
    x, index, weights = inputs(ROUTINGS["uniform"](generator, 6), layer.hidden_size, generator, BF16)
    x[4] = float("nan")
    output = run(device, (x, index, weights), layer)
    assert output[4].isnan().all() and output[torch.arange(len(x)) != 4].isfinite().all()


@pytest.mark.parametrize("tokens", [2, 11])
@pytest.mark.parametrize("op", OPS)
def test_what_is_not_routed_is_not_read(device, make_layer, generator, op, tokens):
    """Weights of skipped slots may be anything, and so may experts that no token hit."""
    layer = make_layer(**EACH_OP[op], dtype=BF16)
    index = ROUTINGS["uniform"](generator, 3)[:tokens] + 3  # never experts 0, 1 and 2
    index[0, 1] = -1
    x, index, weights = inputs(index, layer.hidden_size, generator, BF16)
    weights[0, 1] = float("nan")
    parts = layer.tensors()
    for m in ("gate_up", "down"):
        if op == "low_rank_decode":
            for name in (f"u_{m}", f"v_{m}"):
                parts[name][: parts[f"rank_offsets_{m}"][3]] = float("nan")
        else:
            parts[f"values_{m}"][:3] = float("nan")
    output = run(device, (x, index, weights), layer)
    clean = weights.nan_to_num(0.0)
    cleared = FactoredExperts.from_tensors(
        {n: t.nan_to_num(0.0) if t.is_floating_point() else t for n, t in parts.items()}, **layer.sizes()
    )
    assert_accurate(output, x, index, clean, cleared.tensors(), cleared.sizes())


# ---- the op


@pytest.mark.parametrize("op", OPS)
def test_opcheck(device, make_layer, generator, op):
    layer = make_layer(**EACH_OP[op], dtype=BF16).to(device)
    arguments = (*(t.to(device) for t in random_call(generator, layer, 5)), *ops.flatten(layer), "silu")
    torch.library.opcheck(getattr(torch.ops.resmoe, op).default, arguments)


@pytest.mark.parametrize("op", OPS)
def test_a_launch_that_fails_is_named(emulated, make_layer, generator, op):
    layer = make_layer(**EACH_OP[op], dtype=BF16)
    call = random_call(generator, layer, 5)
    said = rf"^{op} \({{}} blocks of 256 threads, \d+ bytes of shared memory\): {{}}: invalid argument$"
    Gpu(units=0).use()
    with pytest.raises(RuntimeError, match=said.format(0, "launch")):
        experts(*call, layer)
    Gpu(units=7, shared_bytes=1024).use()
    with pytest.raises(RuntimeError, match=said.format(7, "shared memory")):
        experts(*call, layer)
    Gpu().use()
    assert experts(*call, layer).isfinite().all()


def test_what_the_emulation_finds_is_raised(emulated, make_layer, generator):
    """Here, more shared memory than any GPU has."""
    layer = make_layer(**BLOCK_SPARSE["block-8"], dtype=BF16)
    call = inputs(torch.zeros((2, 128), dtype=torch.int64), layer.hidden_size, generator, BF16)
    Gpu(shared_bytes=1 << 20).use()
    with pytest.raises(RuntimeError, match=r"^block_sparse_decode .*: launch: CUDA emulation: .* GPUs have 232448$"):
        experts(*call, layer)


# ---- a trained model


def trained(file: Any, layer: int, num_experts: int) -> DenseExperts:
    def read(e: int, w: str) -> Tensor:
        return file.get_tensor(f"model.layers.{layer}.mlp.experts.{e}.{w}_proj.weight")

    gate_up = [torch.cat([read(e, "gate"), read(e, "up")]) for e in range(num_experts)]
    return DenseExperts(torch.stack(gate_up), torch.stack([read(e, "down") for e in range(num_experts)]))


@pytest.mark.parametrize("residual", ["lowrank", "sparse"])
def test_experts_of_a_trained_model(device, generator, shared, residual):
    """Learned weights, as the method compresses them."""
    from resmoe_kernels.python_ops.methods.resmoe import resmoe

    with safe_open(shared("models/tiny-deepseek") / "model.safetensors", "pt") as file:
        layer = resmoe(trained(file, 1, 6), residual=residual, retain=0.25)[0]
    assert layer.hidden_size == 256 and layer.intermediate_size == 128
    for tokens in (1, 6, 16):
        index = ROUTINGS["zipf"](generator, 6)[:tokens]
        run_and_check(device, inputs(index, layer.hidden_size, generator, BF16), layer)


@pytest.mark.parametrize(
    "name, replacement, reason",
    [
        ("platform.machine", lambda: "arm64", "the emulation of CUDA is for Linux on x86-64, this is Linux on arm64"),
        ("shutil.which", lambda name: None, "there is no g++"),
        ("header_folders", list, "cuda_runtime.h is in no CUDA_HOME, not in /usr/local/cuda, and there is no triton"),
    ],
)
def test_what_the_emulation_needs_is_named(monkeypatch, name, replacement, reason):
    monkeypatch.setattr(f"tests.cuda.emulated_cuda.{name}", replacement)
    assert str(emulated_cuda.missing()).startswith(reason)


def test_the_headers_that_triton_brings_will_do(kernels):
    """So the kernels are emulated where there is no toolkit."""
    pytest.importorskip("triton")
    headers = emulated_cuda.header_folders()[-1]
    assert "triton" in headers.parts
    command = [*emulated_cuda.compiler(headers), "-fsyntax-only", "csrc/cuda/low_rank_decode.cu"]
    subprocess.run(command, cwd=emulated_cuda.REPO, check=True)
