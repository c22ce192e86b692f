"""Named model shapes, and layers of random weights in those shapes: dense, and in every form that is measured."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from resmoe_kernels import DenseExperts, FactoredExperts
from resmoe_kernels.factored import BLOCK_KEPT, CODED
from resmoe_kernels.parts import payloads_text
from resmoe_kernels.payload import Payload
from resmoe_kernels.sparse import BLOCK, pack_mask

BUNDLED = Path(__file__).resolve().parent.parent / "examples" / "tiny-mixtral"
FORMS = ("dense", "lowrank", "block", "bitmap")
# Stored as codes: every part of a low rank at so many bits; a base and a full residual; experts without a base.
CODE_FORMS = (
    "lowrank@8",
    "lowrank@4",
    "lowrank@3",
    "lowrank@2",
    "base4+full3",
    "base4+full2",
    "full8",
    "full4",
    "full2",
)
CODE_GROUP = 128
DTYPE = torch.bfloat16
RANK_BLOCK = 16  # ranks are multiples of it, as a compressed checkpoint has them


@dataclass(frozen=True)
class Shape:
    """The experts of one layer: sizes, activation, and where the numbers are from.

    shared_size: intermediate size of the shared experts beside the routed ones; for the record, never timed
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    source: str
    shared_size: int = 0
    gated: bool = True
    activation: str = "silu"

    @property
    def expert_parameters(self) -> int:
        return (3 if self.gated else 2) * self.hidden_size * self.intermediate_size

    def sides(self, matrix: str) -> tuple[int, int]:
        """(N, K) of a matrix: gate_up (2I, H), or (I, H) without a gate; down (H, I)."""
        if matrix == "down":
            return self.hidden_size, self.intermediate_size
        return (2 if self.gated else 1) * self.intermediate_size, self.hidden_size


def _bundled() -> Shape:
    config = json.loads((BUNDLED / "config.json").read_text())
    sizes = ("hidden_size", "intermediate_size", "num_local_experts", "num_experts_per_tok")
    return Shape("bundled", *(config[key] for key in sizes), source="examples/tiny-mixtral/config.json")


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("mixtral", 4096, 14336, 8, 2, "config.json of mistralai/Mixtral-8x7B-v0.1"),
        Shape("dsv2lite", 2048, 1408, 64, 6, "config.json of deepseek-ai/DeepSeek-V2-Lite", shared_size=2 * 1408),
        Shape("qwen3", 2048, 768, 128, 8, "config.json of Qwen/Qwen3-30B-A3B"),
        Shape("olmoe", 2048, 1024, 64, 8, "config.json of allenai/OLMoE-1B-7B-0924"),
        Shape("switch32", 768, 3072, 32, 1, "config.json of google/switch-base-32", gated=False, activation="relu"),
        _bundled(),
    )
}
# Small, and odd where every peer allows it: what correctness is checked on before anything is timed.
CHECK = Shape("check", 256, 192, 8, 3, "made up")
CHECK_UNGATED = Shape("check-ungated", 256, 192, 8, 3, "made up", gated=False, activation="relu")


def random_values(*shape: int, seed: int) -> Tensor:
    """Normal bfloat16 values with a standard deviation of 0.02, in memory of their own.

    One block of 2^22 is drawn and repeated: drawing every value of a Mixtral layer would take a minute, and nothing
    that is timed depends on the values.
    """
    size = torch.Size(shape).numel()
    block = torch.randn(min(size, 1 << 22), generator=torch.Generator().manual_seed(seed)).mul_(0.02).to(DTYPE)
    values = torch.empty(size, dtype=DTYPE)
    for piece in values.split(len(block)):
        piece.copy_(block[: len(piece)])
    return values.view(shape)


def dense_layer(shape: Shape, seed: int) -> DenseExperts:
    """A layer of random experts as plain matrices."""
    gate_up, down = (
        random_values(shape.num_experts, *shape.sides(m), seed=2 * seed + i) for i, m in enumerate(("gate_up", "down"))
    )
    return DenseExperts(gate_up, down, gated=shape.gated)


def factored_layer(shape: Shape, form: str, retain: float, seed: int) -> FactoredExperts:
    """A layer of random weights in one of FORMS, of the sizes that compression to ``retain`` gives.

    dense: G = E bases and no residual, which is what the kernels make of an uncompressed layer
    lowrank: one base and ranks that spend ``retain`` of each matrix's parameters, to the block of 16 that still fits,
        so ragged
    block: one base and the largest n of {4, 8, 12, 16} of every 32 weights with n <= 32 retain, at least 4
    bitmap: one base and each weight kept with probability ``retain``
    Raises ValueError where a side of the shape is not a multiple of 32. One of CODE_FORMS is ``coded_layer``.
    """
    if form in CODE_FORMS:
        return coded_layer(shape, form, retain, seed)
    E = shape.num_experts
    groups = E if form == "dense" else 1
    tensors = {"group": torch.arange(E, dtype=torch.int32) % groups}
    for i, matrix in enumerate(("gate_up", "down")):
        N, K = shape.sides(matrix)
        if N % BLOCK or K % BLOCK:
            raise ValueError(f"{shape.name}: {matrix} is ({N}, {K}); random layers need multiples of {BLOCK}")
        seeds = range(8 * seed + 4 * i, 8 * seed + 4 * i + 4)
        tensors[f"base_{matrix}"] = random_values(groups, N, K, seed=seeds[0])
        if form == "lowrank":
            offsets = rank_offsets(E, N, K, retain)
            tensors[f"rank_offsets_{matrix}"] = offsets
            tensors[f"u_{matrix}"] = random_values(int(offsets[-1]), N, seed=seeds[1])
            tensors[f"v_{matrix}"] = random_values(int(offsets[-1]), K, seed=seeds[2])
        elif form in ("block", "bitmap"):
            kept = kept_of(retain) if form == "block" else None
            mask, counts = random_masks(E, N, K // BLOCK, kept, retain, seed=seeds[1])
            tensors[f"mask_{matrix}"] = mask
            if kept is not None:
                tensors[f"values_{matrix}"] = random_values(*mask.shape, kept, seed=seeds[2])
            else:
                row_offsets = torch.zeros(E * N + 1, dtype=torch.int64)
                torch.cumsum(counts.view(E * N, -1).sum(1), 0, out=row_offsets[1:])
                nnz = int(row_offsets[-1])
                tensors[f"values_{matrix}"] = random_values(nnz, seed=seeds[2])
                tensors[f"row_offsets_{matrix}"] = row_offsets.int() if nnz < 1 << 31 else row_offsets
    return FactoredExperts(
        num_experts=E,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        gated=shape.gated,
        **tensors,
    )


def coded_layer(shape: Shape, form: str, retain: float, seed: int) -> FactoredExperts:
    """A layer of random codes in one of CODE_FORMS; ``lowrank`` has the ranks of ``factored_layer``."""
    low, base, full = re.fullmatch(r"(?:lowrank@(\d)|(?:base(\d)\+)?full(\d))", form).groups()  # type: ignore[union-attr]
    E, tensors, payloads = shape.num_experts, {}, {}

    def add(name: str, bits: str, *sizes: int, seed: int) -> None:
        payload = payloads[name] = Payload(int(bits), 0 if name.startswith("u_") else CODE_GROUP)
        codes = torch.empty(payload.codes_shape(sizes), dtype=torch.uint8).view(-1)
        block = torch.randint(256, (min(codes.numel(), 1 << 22),), generator=torch.Generator().manual_seed(seed)).byte()
        for piece in codes.split(len(block)):
            piece.copy_(block[: len(piece)])
        tensors[name] = codes.view(payload.codes_shape(sizes))
        tensors[name][..., sizes[-1] * payload.bits // 8 :] = 0  # what fills a row up; sides are multiples of 32
        # As wide as the values of factored_layer: the root mean square of 2^bits levels a step apart is 0.29 2^bits.
        step = torch.full(payload.scales_shape(sizes), 0.02 / 0.29 / 2**payload.bits)
        tensors[f"scales_{name}"] = step.to(torch.bfloat16)

    for i, matrix in enumerate(("gate_up", "down")):
        N, K = shape.sides(matrix)
        seeds = range(8 * seed + 4 * i, 8 * seed + 4 * i + 4)
        if low or base:
            tensors["group"] = torch.zeros(E, dtype=torch.int32)
            add(f"base_{matrix}", low or base, 1, N, K, seed=seeds[0])
        if low:
            offsets = tensors[f"rank_offsets_{matrix}"] = rank_offsets(E, N, K, retain)
            add(f"u_{matrix}", low, int(offsets[-1]), N, seed=seeds[1])
            add(f"v_{matrix}", low, int(offsets[-1]), K, seed=seeds[2])
        else:
            add(f"values_{matrix}", full, E, N, K, seed=seeds[1])
    return FactoredExperts(
        num_experts=E,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        gated=shape.gated,
        payloads=payloads_text({name: payloads[name] for name in CODED if name in payloads}),
        **tensors,
    )


def layer_sizes(shape: Shape, form: str, retain: float) -> FactoredExperts:
    """``factored_layer`` without its memory: tensors on the meta device, but for groups and offsets, which say how much
    each expert has. A bitmap keeps the same number of every row's weights, rounded."""
    E, tensors = shape.num_experts, {}
    groups = E if form == "dense" else 1
    tensors["group"] = torch.arange(E, dtype=torch.int32) % groups

    def empty(*sizes: int, dtype: torch.dtype = DTYPE) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    for matrix in ("gate_up", "down"):
        N, K = shape.sides(matrix)
        tensors[f"base_{matrix}"] = empty(groups, N, K)
        if form == "lowrank":
            offsets = tensors[f"rank_offsets_{matrix}"] = rank_offsets(E, N, K, retain)
            tensors[f"u_{matrix}"], tensors[f"v_{matrix}"] = empty(int(offsets[-1]), N), empty(int(offsets[-1]), K)
        elif form in ("block", "bitmap"):
            mask = tensors[f"mask_{matrix}"] = empty(E, N, K // BLOCK, dtype=torch.int32)
            if form == "block":
                tensors[f"values_{matrix}"] = empty(*mask.shape, kept_of(retain))
            else:
                offsets = torch.arange(E * N + 1) * round(retain * K)
                tensors[f"values_{matrix}"] = empty(int(offsets[-1]))
                tensors[f"row_offsets_{matrix}"] = offsets.int() if offsets[-1] < 1 << 31 else offsets
    return FactoredExperts(
        num_experts=E,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        gated=shape.gated,
        **tensors,
    )


def kept_of(retain: float) -> int:
    """The largest n of the block layout with n <= 32 retain, at least 4."""
    return max(n for n in BLOCK_KEPT if n <= max(32 * retain, 4))


def rank_offsets(num_experts: int, rows: int, columns: int, retain: float) -> Tensor:
    """(E + 1,) int32: as many blocks of 16 ranks as retain * E * N * K parameters buy, spread evenly."""
    blocks = int(retain * num_experts * rows * columns) // ((rows + columns) * RANK_BLOCK)
    ends = [RANK_BLOCK * (blocks * e // num_experts) for e in range(num_experts + 1)]
    return torch.tensor(ends, dtype=torch.int32)


def random_masks(
    num_experts: int, rows: int, words: int, kept: int | None, retain: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Masks (E, N, W) int32 of ``kept`` bits per word, or of each bit with probability ``retain``; and their bits.

    Words are drawn from a pool of 2^16, for the reason that values are repeated.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(1 << 16, BLOCK, generator=generator)
    keep = draws < retain if kept is None else draws.argsort(1) < kept
    chosen = torch.randint(len(keep), (num_experts, rows, words), generator=generator, dtype=torch.int32)
    return pack_mask(keep).squeeze(1)[chosen], keep.sum(1, dtype=torch.int16)[chosen]
