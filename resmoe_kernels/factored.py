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

from resmoe_kernels.sparse import BLOCK, expand_sparse_reference, popcount

MATRICES = ("gate_up", "down")
FACTORIZATIONS = ("stacked", "separate", "joint")
BLOCK_KEPT = (4, 8, 12, 16)  # n of 32; above 16 the bitmap is smaller


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
        columns in a last, narrower word; the rest of its values are zero); bitmap layout (nnz,) float
    row_offsets_<m>: bitmap layout only, (E N + 1,) int32, or int64 where nnz does not fit
    bias_gate_up: (E, N) float, bias_down: (E, H) float

    ``factorization`` says how the low rank of gate_up is stored (the ways differ only where there is a gate):

    - ``stacked``: as above, v shared by gate and up. What kernels serve.
    - ``separate``: u_gate_up (R, I), v_gate_up (R, H); the first half of an expert's rows makes the gate, the second
      the up matrix.
    - ``joint``: one SVD of [gate | up | down^T], u shared by the three: u_gate_up (R, I), v_gate_up (R, 2H) holding
      [V_gate | V_up] ((R, H) without a gate), u_down (R, H), and W_down = u_down^T u_gate_up. No v_down and no
      rank_offsets_down: they are tied.

    Raises ValueError naming the tensor, the rule and what came.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    gated: bool = True
    factorization: str = "stacked"

    group: Tensor | None = None
    base_gate_up: Tensor | None = None
    base_down: Tensor | None = None
    u_gate_up: Tensor | None = None
    v_gate_up: Tensor | None = None
    rank_offsets_gate_up: Tensor | None = None
    u_down: Tensor | None = None
    v_down: Tensor | None = None
    rank_offsets_down: Tensor | None = None
    mask_gate_up: Tensor | None = None
    values_gate_up: Tensor | None = None
    row_offsets_gate_up: Tensor | None = None
    mask_down: Tensor | None = None
    values_down: Tensor | None = None
    row_offsets_down: Tensor | None = None
    bias_gate_up: Tensor | None = None
    bias_down: Tensor | None = None

    def __post_init__(self) -> None:
        _check_shapes(self)

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
        """``Tensor.to`` on every tensor; index tensors keep their dtype."""
        moved = {}
        for name, tensor in self.tensors().items():
            if tensor.is_floating_point():
                moved[name] = tensor.to(*args, **kwargs)
            else:
                moved[name] = tensor.to(tensor.new_empty(()).to(*args, **kwargs).device)
        return FactoredExperts.from_tensors(moved, **self.sizes())

    # ---- sizes

    def rows_columns(self, matrix: str) -> tuple[int, int]:
        """(N, K) of a matrix: ``gate_up`` (2I, H) or (I, H), ``down`` (H, I)."""
        if matrix == "down":
            return self.hidden_size, self.intermediate_size
        return (2 if self.gated else 1) * self.intermediate_size, self.hidden_size

    def nbytes_by_part(self) -> dict[str, int]:
        """Bytes of ``base``, ``low_rank``, ``sparse`` (values), ``index`` (masks, offsets, groups) and ``bias``."""
        parts = dict.fromkeys(("base", "low_rank", "sparse", "index", "bias"), 0)
        for name, tensor in self.tensors().items():
            stem = name.removesuffix("_gate_up").removesuffix("_down")
            part = {"base": "base", "u": "low_rank", "v": "low_rank", "values": "sparse", "bias": "bias"}.get(
                stem, "index"
            )
            parts[part] += tensor.numel() * tensor.element_size()
        return parts

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

    def sparse_rows(self, matrix: str, expert: int) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """(mask, values, row_offsets) of one expert's sparse residual, or None where the matrix has none."""
        mask = getattr(self, f"mask_{matrix}")
        if mask is None:
            return None
        values, row_offsets = getattr(self, f"values_{matrix}"), getattr(self, f"row_offsets_{matrix}")
        if row_offsets is None:
            return mask[expert], values[expert], None
        rows = mask.shape[1]
        return mask[expert], values, row_offsets[expert * rows : (expert + 1) * rows + 1]

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
        base = getattr(self, f"base_{matrix}")
        if base is not None and self.group is not None and (g := int(self.group[expert])) >= 0:
            weight += base[g].to(dtype)
        offsets = self.low_rank_offsets(matrix)
        if offsets is not None:
            weight += self._low_rank(matrix, int(offsets[expert]), int(offsets[expert + 1]), dtype)
        sparse = self.sparse_rows(matrix, expert)
        if sparse is not None:
            weight += expand_sparse_reference(*sparse, columns).to(dtype)
        return weight

    def _low_rank(self, matrix: str, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        assert self.u_gate_up is not None or matrix == "down"
        if self.factorization == "joint":
            assert self.u_gate_up is not None and self.v_gate_up is not None and self.u_down is not None
            shared = self.u_gate_up[start:stop].to(dtype)
            if matrix == "down":
                return self.u_down[start:stop].to(dtype).T @ shared
            halves = self.v_gate_up[start:stop].to(dtype).split(self.hidden_size, dim=1)
            return torch.cat([shared.T @ v for v in halves])
        u = getattr(self, f"u_{matrix}")[start:stop].to(dtype)
        v = getattr(self, f"v_{matrix}")[start:stop].to(dtype)
        if self.factorization == "separate" and matrix == "gate_up" and self.gated:
            half = (stop - start) // 2
            return torch.cat([u[:half].T @ v[:half], u[half:].T @ v[half:]])
        return u.T @ v

    def check_values(self) -> None:
        """Reads the index tensors and refuses contents that would make a kernel read out of bounds.

        Raises ValueError naming the tensor, the rule and the first place that breaks it.
        """
        if self.group is not None and self.base_gate_up is not None:
            groups = self.base_gate_up.shape[0]
            if int(self.group.min()) < -1 or int(self.group.max()) >= groups:
                raise ValueError(f"group: entries must be in [-1, {groups}), got {self.group.tolist()}")
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
            kept = popcount(mask)
            values, row_offsets = getattr(self, f"values_{matrix}"), getattr(self, f"row_offsets_{matrix}")
            if row_offsets is None:
                width = torch.full((mask.shape[-1],), BLOCK, device=mask.device)
                width[-1] = columns - BLOCK * (mask.shape[-1] - 1)
                expected = width.clamp(max=values.shape[-1])
                if bool((kept != expected).any()):
                    e, row, word = (kept != expected).nonzero()[0].tolist()
                    raise ValueError(
                        f"mask_{matrix}: block layout keeps exactly {int(expected[word])} "
                        f"of these {int(width[word])} columns, "
                        f"got {int(kept[e, row, word])} at expert {e}, row {row}, word {word}"
                    )
                behind = values[..., -1, int(width[-1]) :]
                nonzero = (behind != 0) | behind.signbit()
                if bool(nonzero.any()):
                    e, row, _ = nonzero.nonzero()[0].tolist()
                    raise ValueError(
                        f"values_{matrix}: behind the {int(width[-1])} values of a word all must be zero, "
                        f"got another at expert {e}, row {row}, word {mask.shape[-1] - 1}"
                    )
            else:
                _check_offsets(f"row_offsets_{matrix}", row_offsets, values.shape[0])
                if not torch.equal(kept.sum(-1).flatten(), row_offsets.diff().to(torch.int64)):
                    raise ValueError(
                        f"row_offsets_{matrix}: differences must equal the bits set in mask_{matrix}, row by row"
                    )


SIZE_NAMES = ("num_experts", "hidden_size", "intermediate_size", "gated", "factorization")
TENSOR_NAMES = tuple(f.name for f in fields(FactoredExperts) if f.name not in SIZE_NAMES)


def _check_offsets(name: str, offsets: Tensor, total: int) -> None:
    if int(offsets[0]) != 0 or int(offsets[-1]) != total or bool((offsets.diff() < 0).any()):
        raise ValueError(f"{name}: must rise from 0 to {total} without falling, got {_brief(offsets)}")


def _brief(tensor: Tensor) -> str:
    values = tensor.tolist()
    return str(values) if len(values) <= 10 else f"[{', '.join(map(str, values[:4]))}, ..., {values[-1]}]"


def _check_shapes(w: FactoredExperts) -> None:
    """Shapes and dtypes only: nothing here reads a tensor's contents, so it also runs on meta and fake tensors."""
    for name in ("num_experts", "hidden_size", "intermediate_size"):
        if getattr(w, name) < 1:
            raise ValueError(f"{name}: must be at least 1, got {getattr(w, name)}")
    if w.factorization not in FACTORIZATIONS:
        raise ValueError(f"factorization: must be one of {', '.join(FACTORIZATIONS)}, got {w.factorization!r}")
    if not w.tensors():
        raise ValueError("FactoredExperts: holds no tensor; give a base, a low-rank or a sparse part")

    present = {name: getattr(w, name) is not None for name in TENSOR_NAMES}

    def together(*names: str) -> None:
        missing = [n for n in names if not present[n]]
        if missing and len(missing) < len(names):
            there = next(n for n in names if present[n])
            raise ValueError(f"{missing[0]}: must be given together with {there}")

    def shape(name: str, expected: tuple[int | str, ...], *dtypes: torch.dtype) -> None:
        tensor = getattr(w, name)
        if tensor is None:
            return
        fits = tensor.dim() == len(expected) and all(
            isinstance(e, str) or e == n for e, n in zip(expected, tensor.shape, strict=True)
        )
        right_dtype = tensor.dtype in dtypes if dtypes else tensor.is_floating_point()
        if not fits or not right_dtype:
            wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes) or "floating point"
            raise ValueError(
                f"{name}: must be ({', '.join(map(str, expected))}) {wanted}, "
                f"got {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            )

    E, H, inner = w.num_experts, w.hidden_size, w.intermediate_size
    together("base_gate_up", "base_down", "group")
    shape("group", (E,), torch.int32)
    joint = w.factorization == "joint"
    if joint:
        together("u_gate_up", "v_gate_up", "rank_offsets_gate_up", "u_down")
        for name in ("v_down", "rank_offsets_down"):
            if present[name]:
                raise ValueError(f"{name}: the joint factorisation ties it to gate_up's, so it must be absent")
    for matrix in MATRICES:
        N, K = w.rows_columns(matrix)
        shape(f"base_{matrix}", ("G", N, K))
        if not joint:
            together(f"u_{matrix}", f"v_{matrix}", f"rank_offsets_{matrix}")
        shape(f"u_{matrix}", ("R", "N"))  # two sides, before the first is read as R below
        shape(f"rank_offsets_{matrix}", (E + 1,), torch.int32)
        together(f"mask_{matrix}", f"values_{matrix}")
        words = -(-K // BLOCK)
        shape(f"mask_{matrix}", (E, N, words), torch.int32)
        if present[f"row_offsets_{matrix}"]:
            together(f"mask_{matrix}", f"row_offsets_{matrix}")
            shape(f"row_offsets_{matrix}", (E * N + 1,), torch.int32, torch.int64)
            shape(f"values_{matrix}", ("nnz",))
        elif present[f"mask_{matrix}"]:
            shape(f"values_{matrix}", (E, N, words, "n"))
            n = getattr(w, f"values_{matrix}").shape[-1]
            if n not in BLOCK_KEPT:
                raise ValueError(f"values_{matrix}: block layout keeps n of 32 with n in {BLOCK_KEPT}, got n = {n}")
        shape(f"bias_{matrix}", (E, N))
    if present["base_gate_up"] and w.base_gate_up.shape[0] != w.base_down.shape[0]:  # type: ignore[union-attr]
        raise ValueError(
            "base_down: must have as many groups as base_gate_up, "
            f"got {w.base_down.shape[0]} and {w.base_gate_up.shape[0]}"  # type: ignore[union-attr]
        )
    if present["u_gate_up"]:
        R = w.u_gate_up.shape[0]  # type: ignore[union-attr]
        halves = 2 if joint and w.gated else 1
        shape("u_gate_up", (R, w.rows_columns("gate_up")[0] if w.factorization == "stacked" else inner))
        shape("v_gate_up", (R, halves * H))
        if joint:
            shape("u_down", (R, H))
    if present["u_down"] and not joint:
        R = w.u_down.shape[0]  # type: ignore[union-attr]
        shape("u_down", (R, H))
        shape("v_down", (R, inner))
