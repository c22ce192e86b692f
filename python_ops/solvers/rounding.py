"""Storing a layer as codes: the tensors of a weight form rounded to payloads, without data.

Whoever has better codes than rounding makes (error feedback, a scale that was fitted) gives them as ``Encoded``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from resmoe_kernels.factored import CODED, FactoredExperts
from resmoe_kernels.parts import SCALES, matrix_of, payloads_text
from resmoe_kernels.payload import Encoded, Payload, encode
from resmoe_kernels.sparse_codes import encode_sparse


def rounded(
    weights: FactoredExperts, payloads: Mapping[str, Payload], made: Mapping[str, Encoded] | None = None
) -> FactoredExperts:
    """The layer with the tensors that ``payloads`` names stored as codes; all others as they are.

    payloads: by the names of tensors that the layer has; what is codes already is decoded and rounded anew
    made: codes and scales of some of them, to be stored as they are
    Each tensor by itself is rounded to nearest at the scale of least squared error, see ``payload.encode``.
    """
    tensors, stored = weights.tensors(), {n: p for n in CODED if (p := weights.payload(n)) is not None}
    for name, payload in payloads.items():
        encoded = (made or {}).get(name)
        tensors[name], tensors[SCALES + name] = encoded or _encoded(weights, name, payload)
        stored[name] = payload
    text = payloads_text({name: stored[name] for name in CODED if name in stored})
    return FactoredExperts.from_tensors(tensors, **{**weights.sizes(), "payloads": text})


def _encoded(weights: FactoredExperts, name: str, payload: Payload) -> Encoded:
    matrix = matrix_of(name)
    tensor, columns = getattr(weights, name), weights.rows_columns(matrix)[1]
    mask, row_offsets = getattr(weights, f"mask_{matrix}"), getattr(weights, f"row_offsets_{matrix}")
    if not name.startswith("values_") or mask is None:
        # One matrix, or one rank, at a time would be as exact: each row has scales of its own.
        return encode(tensor if weights.payload(name) is None else _decoded(weights, name), payload)
    return encode_sparse(mask, _sparse_values(weights, matrix), row_offsets, columns, payload)


def _decoded(weights: FactoredExperts, name: str) -> Tensor:
    return weights.read(name, slice(None), torch.float32)


def _sparse_values(weights: FactoredExperts, matrix: str) -> Tensor:
    """The values of a layer as floats, in their layout."""
    values: Tensor = getattr(weights, f"values_{matrix}")
    if weights.payload(f"values_{matrix}") is None:
        return values
    rows = [weights.sparse_rows(matrix, e, torch.float32) for e in range(weights.num_experts)]
    own = [row[1] for row in rows if row is not None]
    return torch.stack(own) if getattr(weights, f"row_offsets_{matrix}") is None else torch.cat(own)
