"""Storing a layer as codes: which tensors, at how many bits, and how they are rounded. Without data.

A method makes its result a part at a time, and ``Storage.layer`` turns what is float so far into codes: the base
first, so that the residual is taken against the base as it will be stored. Better codes than rounding makes (error
feedback, fitted scales) are tensors of a FactoredExperts like any other: what is codes already is left as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from resmoe_kernels.factored import CODED, MATRICES, FactoredExperts
from resmoe_kernels.parts import SCALES, matrix_of, parse_payloads, payloads_text
from resmoe_kernels.payload import BITS, GROUPS, Encoded, Payload, encode
from resmoe_kernels.python_ops.solvers.factorize import Residual
from resmoe_kernels.sparse_codes import encode_sparse

FLOAT_BITS = 16  # as a setting: floats, in the dtype of the experts
_AT_A_TIME = 1 << 22  # elements rounded at a time: 64 MiB of float32 numbers beside them


@dataclass(frozen=True)
class Storage:
    """How many bits the tensors of a layer get.

    bits: of all;  base_bits, residual_bits: in its place, of the base, and of u, v and values. 8, 4, 3 or 2; 16 or None
        for floats
    group: columns to a scale, 32, 64 or 128; u has a scale for each rank
    Raises ValueError naming the setting, what there is and what came.
    """

    bits: int | None = None
    base_bits: int | None = None
    residual_bits: int | None = None
    group: int = 128

    def __post_init__(self) -> None:
        for name in ("bits", "base_bits", "residual_bits"):
            if (value := getattr(self, name)) not in (None, FLOAT_BITS, *BITS):
                known = ", ".join(map(str, (FLOAT_BITS, *BITS)))
                raise ValueError(f"{name}: must be one of {known}, or none for floats, got {value}")
        if self.group not in GROUPS:
            raise ValueError(f"group: must be one of {', '.join(map(str, GROUPS))} columns, got {self.group}")

    def recorded(self) -> dict[str, int]:
        """The settings that say something, for config.json."""
        given = {n: v for n in ("bits", "base_bits", "residual_bits") if (v := getattr(self, n)) is not None}
        return given | {"group": self.group} if given else {}

    def of_part(self, base: bool) -> int | None:
        """Bits of the base, or of the residual; None for floats."""
        own = self.base_bits if base else self.residual_bits
        bits = self.bits if own is None else own
        return None if bits == FLOAT_BITS else bits

    def payload(self, name: str) -> Payload | None:
        """Of a tensor by name; None for floats."""
        bits = self.of_part(base=name.startswith("base_"))
        return None if bits is None else Payload(bits, 0 if name.startswith("u_") else self.group)

    @property
    def codes(self) -> bool:
        """Whether anything is stored as codes."""
        return any(self.of_part(base) is not None for base in (True, False))

    def layer(self, weights: FactoredExperts) -> FactoredExperts:
        """The layer with its float parts stored as asked for; what is codes already stays."""
        present = weights.tensors()
        wanted = {n: p for n in CODED if n in present and (p := self.payload(n)) and weights.payload(n) is None}
        return rounded(weights, wanted) if wanted else weights


FLOATS = Storage()


def rounded(weights: FactoredExperts, payloads: Mapping[str, Payload]) -> FactoredExperts:
    """The layer with the tensors that ``payloads`` names stored as codes; all others as they are.

    payloads: by the names of tensors that the layer has; what is codes already is decoded and rounded anew
    Each tensor by itself is rounded to nearest at the scale of least squared error, see ``payload.encode``.
    """
    tensors, stored = weights.tensors(), dict(parse_payloads(weights.payloads))
    for name, payload in payloads.items():
        tensors[name], tensors[SCALES + name] = _encoded(weights, name, payload)
        stored[name] = payload
    return FactoredExperts.from_tensors(tensors, **{**weights.sizes(), "payloads": _text(stored)})


def full(weights: FactoredExperts, residual: Residual, payload: Payload) -> FactoredExperts:
    """The layer with a full residual, rounded one expert at a time.

    residual: e -> what is left of expert e: gate_up (N, H), down (H, I) float
    """
    made: dict[str, list[Encoded]] = {m: [] for m in MATRICES}
    for e in range(weights.num_experts):
        for matrix, dense in zip(MATRICES, residual(e), strict=True):
            made[matrix].append(_in_pieces(dense, payload))
    tensors = {f"values_{m}": torch.stack([codes for codes, _ in of]) for m, of in made.items()}
    tensors |= {f"{SCALES}values_{m}": torch.stack([scales for _, scales in of]) for m, of in made.items()}
    text = _text(parse_payloads(weights.payloads) | {f"values_{m}": payload for m in MATRICES})
    return replace(weights, **tensors, payloads=text)  # type: ignore[arg-type]


def _text(payloads: Mapping[str, Payload]) -> str:
    return payloads_text({name: payloads[name] for name in CODED if name in payloads})


def check_requantised(weights: FactoredExperts, storage: Storage) -> dict[str, Payload]:
    """What ``requantised`` will store otherwise than it is; raises what that would. Reads no contents."""
    if weights.factorization != "stacked":
        raise ValueError(f"factorization: only 'stacked' is stored as codes, got {weights.factorization!r}")
    present = weights.tensors()
    wanted = {n: p for n in CODED if n in present and (p := storage.payload(n)) and p != weights.payload(n)}
    for name, asked in wanted.items():
        if (before := weights.payload(name)) is not None and before.bits < asked.bits:
            raise ValueError(f"{name}: is stored as {before}, which has fewer bits than {asked}; ask for fewer")
    return wanted


def requantised(weights: FactoredExperts, storage: Storage) -> FactoredExperts:
    """A layer stored anew, without the dense experts: floats and codes of more bits become codes of fewer.

    A full residual takes up what its base loses by that, as it can: R_e becomes B + R_e - B', B' the new base.
    Raises ValueError naming the tensor if it has fewer bits than asked for.
    """
    wanted = check_requantised(weights, storage)
    based = {n: p for n, p in wanted.items() if n.startswith("base_")}
    full_payloads = {wanted.get(f"values_{m}") if weights.has_full(m) else None for m in MATRICES}
    if not based or len(full_payloads) != 1 or None in full_payloads:
        return rounded(weights, wanted)
    new_base = rounded(weights, based)

    def left(e: int) -> tuple[Tensor, Tensor]:
        own = []
        for m in MATRICES:
            values = weights.read(f"values_{m}", e, torch.float32)
            if weights.group is not None and (g := int(weights.group[e])) >= 0:
                values = values + weights.read(f"base_{m}", g, torch.float32)
                values -= new_base.read(f"base_{m}", g, torch.float32)
            own.append(values)
        return own[0], own[1]

    (payload,) = full_payloads
    assert payload is not None
    again = full(new_base, left, payload)
    return rounded(again, {n: p for n, p in wanted.items() if n not in based and not n.startswith("values_")})


def _encoded(weights: FactoredExperts, name: str, payload: Payload) -> Encoded:
    matrix = matrix_of(name)
    mask, row_offsets = getattr(weights, f"mask_{matrix}"), getattr(weights, f"row_offsets_{matrix}")
    if name.startswith("values_") and mask is not None:
        columns = weights.rows_columns(matrix)[1]
        return encode_sparse(mask, _sparse_values(weights, matrix), row_offsets, columns, payload)
    tensor: Tensor = getattr(weights, name)
    if weights.payload(name) is None:
        return _in_pieces(tensor, payload)
    rows = max(1, _AT_A_TIME // max(tensor[:1].numel(), 1))
    parts = [slice(i, i + rows) for i in range(0, max(len(tensor), 1), rows)]
    made = [encode(weights.read(name, part, torch.float32), payload) for part in parts]
    return Encoded(torch.cat([codes for codes, _ in made]), torch.cat([scales for _, scales in made]))


def _in_pieces(tensor: Tensor, payload: Payload) -> Encoded:
    """``encode``, some rows at a time: every row has scales of its own."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    made = [encode(part, payload) for part in rows.split(max(1, _AT_A_TIME // rows.shape[-1]))]
    codes, scales = torch.cat([codes for codes, _ in made]), torch.cat([scales for _, scales in made])
    shape = tuple(tensor.shape)
    return Encoded(codes.view(payload.codes_shape(shape)), scales.view(payload.scales_shape(shape)))


def _sparse_values(weights: FactoredExperts, matrix: str) -> Tensor:
    """The values of a layer as floats, in their layout."""
    values: Tensor = getattr(weights, f"values_{matrix}")
    if weights.payload(f"values_{matrix}") is None:
        return values
    rows = [weights.sparse_rows(matrix, e, torch.float32) for e in range(weights.num_experts)]
    own = [row[1] for row in rows if row is not None]
    return torch.stack(own) if getattr(weights, f"row_offsets_{matrix}") is None else torch.cat(own)
