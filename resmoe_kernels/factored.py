"""The weight form: every expert is a shared base, plus a low-rank and a sparse residual of its own.

    W_e = B_g(e) + U_e V_e + S_e        for each of an expert's two matrices, gate_up and down

Letters, here and everywhere in the project: ``T`` tokens, ``H`` hidden size, ``I`` intermediate size, ``E`` routed
experts of a layer, ``top_k`` experts per token, ``G`` base groups, ``R`` sum of the experts' ranks, ``P`` token-expert
pairs. A matrix is (N, K): gate_up is (2I, H), gate rows first, or (I, H) where there is no gate; down is (H, I).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from resmoe_kernels.parts import BLOCK_KEPT as BLOCK_KEPT
from resmoe_kernels.parts import MATRICES as MATRICES
from resmoe_kernels.parts import SCALES, block_kept, check_parts, matrix_of, parse_payloads, part, parts_of, words_of
from resmoe_kernels.payload import CHUNK, Payload, check_padding, check_scales, decode
from resmoe_kernels.products import product
from resmoe_kernels.sparse import BLOCK, expand_sparse_reference, popcount
from resmoe_kernels.sparse_codes import check_block_codes, decode_bitmap, decode_block

FACTORIZATIONS = ("stacked", "separate", "joint")


@dataclass(frozen=True, eq=False)
class DenseExperts:
    """The experts of one layer as plain matrices: what a method compresses and what ``materialize`` gives back.

    gate_up: (E, 2I, H) float, gate rows first; (E, I, H) where ``gated`` is false
    down: (E, H, I) float
    bias_gate_up: (E, 2I) or (E, I) float, optional;  bias_down: (E, H) float, optional
    """

    gate_up: Tensor
    down: Tensor
    bias_gate_up: Tensor | None = None
    bias_down: Tensor | None = None
    gated: bool = True

    def __post_init__(self) -> None:
        if self.gate_up.dim() != 3 or self.down.dim() != 3:
            raise ValueError(
                "DenseExperts: gate_up and down must be 3-D (E, out, in), "
                f"got {tuple(self.gate_up.shape)} and {tuple(self.down.shape)}"
            )
        num_experts, rows, hidden = self.gate_up.shape
        if self.gated and rows % 2:
            raise ValueError(f"DenseExperts: gated gate_up must have an even number of rows (2I), got {rows}")
        intermediate = rows // 2 if self.gated else rows
        expected: dict[str, tuple[int, ...]] = {
            "down": (num_experts, hidden, intermediate),
            "bias_gate_up": (num_experts, rows),
            "bias_down": (num_experts, hidden),
        }
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"DenseExperts: {name} must be {shape}, got {tuple(tensor.shape)}")

    @property
    def num_experts(self) -> int:
        return self.gate_up.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.gate_up.shape[2]

    @property
    def intermediate_size(self) -> int:
        return self.down.shape[2]

    def nbytes(self) -> int:
        """Bytes of every tensor held."""
        tensors = (self.gate_up, self.down, self.bias_gate_up, self.bias_down)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@dataclass(frozen=True, eq=False, kw_only=True)
class FactoredExperts:
    """One layer's experts in compressed form.

        W_e = B_g(e) + U_e V_e + S_e,    U_e V_e = u[o_e:o_{e+1}]^T v[o_e:o_{e+1}],  o = rank_offsets

    Every part is optional. With N, K the sides of a matrix (``gate_up`` or ``down``) and ``<m>`` its name:

    base_<m>: (G, N, K) float, the shared bases; both matrices or neither
    group: (E,) int32, the base of each expert, -1 for none; needed with a base
    u_<m>: (R, N) float, v_<m>: (R, K) float, rank_offsets_<m>: (E + 1,) int32: ragged low rank
    mask_<m>: (E, N, ceil(K/32)) int32, bit j of word w (read as unsigned) says that column 32 w + j is stored
    values_<m>: block layout (E, N, ceil(K/32), n) float, n in 4, 8, 12, 16: exactly n per word (as many as there are
        columns in a last, narrower word; the rest of its values are zero); bitmap layout (nnz,) float; without a mask
        the full residual (E, N, K) float, which keeps every place and without a base is the expert itself
    row_offsets_<m>: bitmap layout only, (E N + 1,) int32, or int64 where nnz does not fit
    bias_gate_up: (E, N) float, bias_down: (E, H) float
    scales_<name>: bfloat16, of a tensor that is stored as codes, below

    ``factorization`` says how the low rank of gate_up is stored (the ways differ only where there is a gate):

    - ``stacked``: as above, v shared by gate and up. What kernels serve.
    - ``separate``: u_gate_up (R, I), v_gate_up (R, H); the first half of an expert's rows makes the gate, the second
      the up matrix.
    - ``joint``: one SVD of [gate | up | down^T], u shared by the three: u_gate_up (R, I), v_gate_up (R, 2H) holding
      [V_gate | V_up] ((R, H) without a gate), u_down (R, H), and W_down = u_down^T u_gate_up. No v_down and no
      rank_offsets_down: they are tied.

    ``payloads`` names the tensors that are stored as codes and how, in the order of the fields, base, u, v and values
    each for itself: ``base_gate_up=int4/128 u_gate_up=int4 v_gate_up=int4/64`` (payload.py has the arithmetic). With g
    columns to a scale such a tensor is codes, uint8, its last side bytes, and has scales of:

    - base (G, N, ceil(K/g)), v (R, ceil(K/g)), full values (E, N, ceil(K/g))
    - values under a mask (E, N, ceil(K/g)), of what is stored in those columns; codes (E, N, bytes), W n of them a
      row, or (bytes,), the stream (sparse_codes.py)
    - u (R,): one a rank, which can be multiplied into V x. Groups along R of the transpose would leave 3 to 20 % less
      of an error that is a fifteenth of what truncation leaves, measured on trained experts at 4 bits and rank 1/4.

    Any K is served: the last group of a row is a narrower one, and padded with code 0.

    Raises ValueError naming the tensor, the rule and what came.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    gated: bool = True
    factorization: str = "stacked"
    payloads: str = ""

    group: Tensor | None = part("E", "int32", "index", "base_gate_up", "base_down")
    base_gate_up: Tensor | None = part("G N K", "weights", "base", "base_down", "group")
    base_down: Tensor | None = part("G N K", "weights", "base", "base_gate_up", "group")
    u_gate_up: Tensor | None = part("R U", "weights", "low_rank", "v", "rank_offsets")
    v_gate_up: Tensor | None = part("R V", "weights", "low_rank", "u", "rank_offsets")
    rank_offsets_gate_up: Tensor | None = part("E+1", "int32", "index", "u", "v")
    u_down: Tensor | None = part("R U", "weights", "low_rank", "v", "rank_offsets")
    v_down: Tensor | None = part("R V", "weights", "low_rank", "u", "rank_offsets")
    rank_offsets_down: Tensor | None = part("E+1", "int32", "index", "u", "v")
    mask_gate_up: Tensor | None = part("E N W", "int32", "index", "values")
    values_gate_up: Tensor | None = part("E N W n", "weights", "sparse")
    row_offsets_gate_up: Tensor | None = part("EN+1", "offsets", "index", "mask", "values")
    mask_down: Tensor | None = part("E N W", "int32", "index", "values")
    values_down: Tensor | None = part("E N W n", "weights", "sparse")
    row_offsets_down: Tensor | None = part("EN+1", "offsets", "index", "mask", "values")
    bias_gate_up: Tensor | None = part("E N", "floats", "bias")
    bias_down: Tensor | None = part("E N", "floats", "bias")
    scales_base_gate_up: Tensor | None = part("", "scales", "base")
    scales_base_down: Tensor | None = part("", "scales", "base")
    scales_u_gate_up: Tensor | None = part("", "scales", "low_rank")
    scales_v_gate_up: Tensor | None = part("", "scales", "low_rank")
    scales_u_down: Tensor | None = part("", "scales", "low_rank")
    scales_v_down: Tensor | None = part("", "scales", "low_rank")
    scales_values_gate_up: Tensor | None = part("", "scales", "sparse")
    scales_values_down: Tensor | None = part("", "scales", "sparse")

    def __post_init__(self) -> None:
        for name in ("num_experts", "hidden_size", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.factorization not in FACTORIZATIONS:
            raise ValueError(f"factorization: must be one of {', '.join(FACTORIZATIONS)}, got {self.factorization!r}")
        tensors = self.tensors()
        if not tensors:
            raise ValueError("FactoredExperts: holds no tensor; give a base, a low-rank, a sparse or a full part")
        sides = {m: self._sides(m) for m in MATRICES}
        check_parts(PARTS, tensors, sides, self.payloads, self.factorization)

    def _sides(self, matrix: str) -> dict[str, int]:
        """The letters of parts.py that sizes tell."""
        E, (N, K) = self.num_experts, self.rows_columns(matrix)
        u, v = N, K
        if self.factorization != "stacked" and matrix == "gate_up":
            u = self.intermediate_size
            v = (2 if self.gated and self.factorization == "joint" else 1) * K
        return {"E": E, "E+1": E + 1, "N": N, "K": K, "W": words_of(K), "EN+1": E * N + 1, "U": u, "V": v}

    # ---- as a mapping of named tensors: what checkpoints store and the op takes

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor held, by field name."""
        return {name: t for name in TENSOR_NAMES if (t := getattr(self, name)) is not None}

    def sizes(self) -> dict[str, int | bool | str]:
        """The fields that are not tensors."""
        return {name: getattr(self, name) for name in SIZE_NAMES}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], **sizes: int | bool | str) -> FactoredExperts:
        """The inverse of ``tensors`` and ``sizes``; unknown names are refused."""
        unknown = sorted(set(tensors) - set(TENSOR_NAMES)) + sorted(set(sizes) - set(SIZE_NAMES))
        if unknown:
            raise ValueError(f"FactoredExperts: unknown name {unknown[0]!r}; known are {', '.join(TENSOR_NAMES)}")
        return cls(**sizes, **tensors)  # type: ignore[arg-type]

    def to(self, *args, **kwargs) -> FactoredExperts:
        """``Tensor.to`` on every tensor; indices, codes and scales keep their dtype."""
        moved = {}
        for name, tensor in self.tensors().items():
            if tensor.is_floating_point() and PARTS[name].holds != "scales":
                moved[name] = tensor.to(*args, **kwargs)
            else:
                moved[name] = tensor.to(tensor.new_empty((), dtype=torch.uint8).to(*args, **kwargs).device)
        return FactoredExperts.from_tensors(moved, **self.sizes())

    # ---- sizes

    def rows_columns(self, matrix: str) -> tuple[int, int]:
        """(N, K) of a matrix: ``gate_up`` (2I, H) or (I, H), ``down`` (H, I)."""
        if matrix == "down":
            return self.hidden_size, self.intermediate_size
        return (2 if self.gated else 1) * self.intermediate_size, self.hidden_size

    def nbytes_by_part(self) -> dict[str, int]:
        """Bytes of ``base``, ``low_rank``, ``sparse`` (values, of the full residual too), ``index`` (masks, offsets,
        groups) and ``bias``; scales and the padding of codes count with what they belong to."""
        counted = dict.fromkeys(("base", "low_rank", "sparse", "index", "bias"), 0)
        for name, tensor in self.tensors().items():
            counted[PARTS[name].counted] += tensor.numel() * tensor.element_size()
        return counted

    def nbytes(self) -> int:
        """Bytes of every tensor held, base and indices included."""
        return sum(self.nbytes_by_part().values())

    def ranks(self, matrix: str) -> list[int]:
        """Rank of each expert's low-rank residual."""
        offsets = self.low_rank_offsets(matrix)
        return [0] * self.num_experts if offsets is None else offsets.diff().tolist()

    def low_rank_offsets(self, matrix: str) -> Tensor | None:
        """``rank_offsets`` of a matrix; the joint factorisation ties those of down to those of gate_up."""
        if self.factorization == "joint":
            return self.rank_offsets_gate_up
        return self.rank_offsets_gate_up if matrix == "gate_up" else self.rank_offsets_down

    # ---- contents

    def payload(self, name: str) -> Payload | None:
        """How a tensor is stored as codes; None for floats."""
        return parse_payloads(self.payloads).get(name)

    def dtypes(self) -> set[torch.dtype]:
        """Of the floating-point tensors, scales apart."""
        named = self.tensors().items()
        return {t.dtype for name, t in named if t.is_floating_point() and PARTS[name].holds != "scales"}

    def read(self, name: str, index: int | slice, dtype: torch.dtype) -> Tensor:
        """The numbers of some of base, u, v or the full values, decoded where they are codes, in ``dtype``."""
        tensor, payload = getattr(self, name), self.payload(name)
        if payload is None:
            return tensor[index].to(dtype)
        sides = self._sides(matrix_of(name))
        length = sides["U"] if name.startswith("u_") else sides["K"]
        return decode(tensor[index], getattr(self, f"scales_{name}")[index], payload, length, dtype)

    def declined_payload(self) -> str | None:
        """What kernels decline that read floats, and no residual without a mask; None where there is no such part."""
        for name, payload in parse_payloads(self.payloads).items():
            return f"{name} of {payload}"
        full = [m for m in MATRICES if self.has_full(m)]
        return f"the full residual values_{full[0]}" if full else None

    def count(self, name: str) -> int:
        """Numbers in a base, u, v or values, 0 where it is not there; of a bitmap's codes with their padding."""
        tensor, payload, matrix = getattr(self, name), self.payload(name), matrix_of(name)
        if tensor is None or payload is None:
            return 0 if tensor is None else tensor.numel()
        if name.startswith("values_") and not self.has_full(matrix):
            kept, (N, K) = self.block_kept(matrix), self.rows_columns(matrix)
            return tensor.numel() * 8 // payload.bits if kept is None else self.num_experts * N * words_of(K) * kept
        return tensor[..., 0].numel() * self._sides(matrix)["U" if name.startswith("u_") else "K"]

    def block_kept(self, matrix: str) -> int | None:
        """n of the block layout; None where the matrix has another residual or none."""
        mask, values = getattr(self, f"mask_{matrix}"), getattr(self, f"values_{matrix}")
        if mask is None or getattr(self, f"row_offsets_{matrix}") is not None:
            return None
        payload = self.payload(f"values_{matrix}")
        if payload is None:
            return values.shape[-1]
        return block_kept(f"values_{matrix}", values.shape[-1], mask.shape[-1], payload)

    def has_full(self, matrix: str) -> bool:
        """Whether the matrix has a residual that keeps every place."""
        return getattr(self, f"values_{matrix}") is not None and getattr(self, f"mask_{matrix}") is None

    def sparse_rows(self, matrix: str, expert: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """(mask, values, row_offsets) of one expert's sparse residual, or None where the matrix has none; values are
        decoded to ``dtype`` where they are codes, and else as they are stored."""
        mask = getattr(self, f"mask_{matrix}")
        if mask is None:
            return None
        values, row_offsets = getattr(self, f"values_{matrix}"), getattr(self, f"row_offsets_{matrix}")
        payload, rows = self.payload(f"values_{matrix}"), mask.shape[1]
        offsets = None if row_offsets is None else row_offsets[expert * rows : (expert + 1) * rows + 1]
        if payload is None:
            return mask[expert], values[expert] if offsets is None else values, offsets
        scales = getattr(self, f"scales_values_{matrix}")[expert]
        if offsets is None:
            kept = self.block_kept(matrix)
            assert kept is not None
            return mask[expert], decode_block(values[expert], scales, payload, mask[expert], kept, dtype), None
        columns = self.rows_columns(matrix)[1]
        own = decode_bitmap(values, scales, payload, mask[expert], offsets, columns, dtype)
        return mask[expert], own, offsets - offsets[0]

    def materialize(self, dtype: torch.dtype = torch.float32) -> DenseExperts:
        """The dense experts B_g(e) + U_e V_e + S_e, summed in ``dtype``; for checks and export, never inference."""
        dense = {
            m: torch.stack([self.materialize_matrix(m, e, dtype) for e in range(self.num_experts)]) for m in MATRICES
        }
        bias_gate_up = None if self.bias_gate_up is None else self.bias_gate_up.to(dtype)
        bias_down = None if self.bias_down is None else self.bias_down.to(dtype)
        return DenseExperts(dense["gate_up"], dense["down"], bias_gate_up, bias_down, self.gated)

    def materialize_matrix(self, matrix: str, expert: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """One matrix (N, K) of one expert, as ``materialize`` makes it."""
        rows, columns = self.rows_columns(matrix)
        device = next(iter(self.tensors().values())).device
        weight = torch.zeros(rows, columns, dtype=dtype, device=device)
        if self.group is not None and (g := int(self.group[expert])) >= 0:
            weight += self.read(f"base_{matrix}", g, dtype)
        offsets = self.low_rank_offsets(matrix)
        if offsets is not None:
            weight += self._low_rank(matrix, slice(int(offsets[expert]), int(offsets[expert + 1])), dtype)
        sparse = self.sparse_rows(matrix, expert, dtype)
        if sparse is not None:
            weight += expand_sparse_reference(*sparse, columns).to(dtype)
        if self.has_full(matrix):
            weight += self.read(f"values_{matrix}", expert, dtype)
        return weight

    def _low_rank(self, matrix: str, own: slice, dtype: torch.dtype) -> Tensor:
        if self.factorization == "joint":
            shared = self.read("u_gate_up", own, dtype)
            if matrix == "down":
                return product(self.read("u_down", own, dtype).T, shared)
            halves = self.read("v_gate_up", own, dtype).split(self.hidden_size, dim=1)
            return torch.cat([product(shared.T, v) for v in halves])
        u, v = self.read(f"u_{matrix}", own, dtype), self.read(f"v_{matrix}", own, dtype)
        if self.factorization == "separate" and matrix == "gate_up" and self.gated:
            half = len(u) // 2
            return torch.cat([product(u[:half].T, v[:half]), product(u[half:].T, v[half:])])
        return product(u.T, v)

    def check_values(self) -> None:
        """Reads the index tensors and refuses contents that would make a kernel read out of bounds.

        Raises ValueError naming the tensor, the rule and the first place that breaks it.
        """
        if self.group is not None and self.base_gate_up is not None:
            groups = self.base_gate_up.shape[0]
            if int(self.group.min()) < -1 or int(self.group.max()) >= groups:
                raise ValueError(f"group: entries must be in [-1, {groups}), got {self.group.tolist()}")
        for name, payload in parse_payloads(self.payloads).items():
            check_scales(f"scales_{name}", getattr(self, f"scales_{name}"))
            if not name.startswith("values_") or self.has_full(matrix_of(name)):
                sides = self._sides(matrix_of(name))
                check_padding(name, getattr(self, name), payload, sides["U" if name.startswith("u_") else "K"])
        for matrix in MATRICES:
            offsets = getattr(self, f"rank_offsets_{matrix}")
            if offsets is not None:
                _check_offsets(f"rank_offsets_{matrix}", offsets, getattr(self, f"u_{matrix}").shape[0])
                ranks = offsets.diff()
                if matrix == "gate_up" and self.gated and self.factorization == "separate" and bool((ranks % 2).any()):
                    raise ValueError(f"rank_offsets_gate_up: 'separate' needs even ranks, got {ranks.tolist()}")
            mask = getattr(self, f"mask_{matrix}")
            if mask is None:
                continue
            columns = self.rows_columns(matrix)[1]
            if columns % BLOCK:
                beyond = torch.tensor(-1 << (columns % BLOCK), dtype=torch.int32, device=mask.device)
                if bool((mask[..., -1] & beyond).any()):
                    raise ValueError(f"mask_{matrix}: bits at columns >= {columns} must be zero")
            self._check_sparse(matrix, columns)

    def _check_sparse(self, matrix: str, columns: int) -> None:
        mask, values, row_offsets = (getattr(self, f"{stem}_{matrix}") for stem in ("mask", "values", "row_offsets"))
        payload, kept = self.payload(f"values_{matrix}"), popcount(mask)
        if row_offsets is not None:
            total = len(values)
            if payload is not None:
                total = int(row_offsets[-1])
                if total < 0 or -(-total // CHUNK) * CHUNK * payload.bits // 8 != len(values):
                    raise ValueError(
                        f"values_{matrix}: {total} codes of {payload}, as row_offsets_{matrix} ends, "
                        f"are not {len(values)} bytes"
                    )
                check_padding(f"values_{matrix}", values, payload, total)
            _check_offsets(f"row_offsets_{matrix}", row_offsets, total)
            if not torch.equal(kept.sum(-1).flatten(), row_offsets.diff().to(torch.int64)):
                raise ValueError(
                    f"row_offsets_{matrix}: differences must equal the bits set in mask_{matrix}, row by row"
                )
            return
        n = self.block_kept(matrix)
        assert n is not None
        width = torch.full((mask.shape[-1],), BLOCK, device=mask.device)
        width[-1] = last = columns - BLOCK * (mask.shape[-1] - 1)
        expected = width.clamp(max=n)
        if bool((kept != expected).any()):
            e, row, word = (kept != expected).nonzero()[0].tolist()
            raise ValueError(
                f"mask_{matrix}: block layout keeps exactly {int(expected[word])} "
                f"of these {int(width[word])} columns, "
                f"got {int(kept[e, row, word])} at expert {e}, row {row}, word {word}"
            )
        if payload is not None:
            check_block_codes(f"values_{matrix}", values, payload, mask.shape[-1], n, columns)
            return
        behind = values[..., -1, last:]
        nonzero = (behind != 0) | behind.signbit()
        if bool(nonzero.any()):
            e, row, _ = nonzero.nonzero()[0].tolist()
            raise ValueError(
                f"values_{matrix}: behind the {last} values of a word all must be zero, "
                f"got another at expert {e}, row {row}, word {mask.shape[-1] - 1}"
            )


PARTS = parts_of(FactoredExperts)
TENSOR_NAMES = tuple(PARTS)
CODED = tuple(name for name, p in PARTS.items() if SCALES + name in PARTS)  # what can be stored as codes
SIZE_TYPES = {f.name: str(f.type) for f in fields(FactoredExperts) if f.name not in PARTS}  # as schemas name them
SIZE_NAMES = tuple(SIZE_TYPES)


def _check_offsets(name: str, offsets: Tensor, total: int) -> None:
    if int(offsets[0]) != 0 or int(offsets[-1]) != total or bool((offsets.diff() < 0).any()):
        raise ValueError(f"{name}: must rise from 0 to {total} without falling, got {_brief(offsets)}")


def _brief(tensor: Tensor) -> str:
    values = tensor.tolist()
    return str(values) if len(values) <= 10 else f"[{', '.join(map(str, values[:4]))}, ..., {values[-1]}]"
