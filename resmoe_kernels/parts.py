"""The parts of the weight form: what FactoredExperts says of each of its tensors, and the check made from it.

The fields of FactoredExperts are the one table. A field that is made by ``part`` is a tensor; its letters, in order,
are its sides. ``E N K W`` and ``U V`` (widths of u and v) are known from the sizes of a layer, as ``E+1`` and ``EN+1``
are; ``G R n nnz`` are whatever the first tensor that has them says, one R and n per matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resmoe_kernels.payload import CHUNK, Payload
from resmoe_kernels.sparse import BLOCK

MATRICES = ("gate_up", "down")
BLOCK_KEPT = (4, 8, 12, 16)  # n of 32; above 16 the bitmap is smaller
SCALES = "scales_"  # before the name of what they scale

_DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "weights": (),  # any floating point; codes, uint8, where the tensor has a payload
    "floats": (),
    "int32": (torch.int32,),
    "offsets": (torch.int32, torch.int64),
    "scales": (torch.bfloat16,),
}


class Part(NamedTuple):
    """One tensor.  letters: its sides;  holds: a key of _DTYPES;  counted: the part of a layer whose bytes it adds to

    needs: stems of the tensors without which it means nothing, of the same matrix; ``group`` and names in full as such
    """

    letters: str
    holds: str
    counted: str
    needs: tuple[str, ...]


def part(letters: str, holds: str, counted: str, *needs: str) -> Any:
    """A field of FactoredExperts that is a tensor or None."""
    return field(default=None, metadata={"part": Part(letters, holds, counted, needs)})


def parts_of(form: type) -> dict[str, Part]:
    """The table: every tensor of the form by name, in the order in which ops take them."""
    return {f.name: f.metadata["part"] for f in fields(form) if "part" in f.metadata}


def matrix_of(name: str) -> str:
    """``gate_up`` or ``down``; empty for a tensor that belongs to both."""
    return next((m for m in MATRICES if name.endswith(f"_{m}")), "")


# ---- payloads, as the form's text


def parse_payloads(text: str) -> dict[str, Payload]:
    """``base_gate_up=int4/128 u_down=int4`` -> {"base_gate_up": Payload(4, 128), "u_down": Payload(4, 0)}

    Raises ValueError if it is not of this kind; ``check_parts`` says whether the form has such tensors.
    """
    found: dict[str, Payload] = {}
    for word in text.split(" ") if text else ():
        name, equals, payload = word.partition("=")
        if not equals or name in found:
            raise ValueError(f"payloads: must be like 'base_down=int4/128 u_down=int4', each once, got {text!r}")
        found[name] = Payload.parse(payload)
    return found


def payloads_text(payloads: Mapping[str, Payload]) -> str:
    """The inverse, of names in the order of the form."""
    return " ".join(f"{name}={payload}" for name, payload in payloads.items())


def _check_payloads(parts: Mapping[str, Part], tensors: Mapping[str, Tensor], text: str, factorization: str) -> None:
    payloads = parse_payloads(text)
    may = [name for name, p in parts.items() if p.holds == "weights"]
    if unknown := [name for name in payloads if name not in may]:
        raise ValueError(f"payloads: {unknown[0]!r} is not stored as codes; what can be are {', '.join(may)}")
    ordered = payloads_text({name: payloads[name] for name in may if name in payloads})
    if ordered != text:
        raise ValueError(f"payloads: must be in the order of the form, {ordered!r}, got {text!r}")
    if payloads and factorization != "stacked":
        raise ValueError(f"payloads: only the factorization 'stacked' is stored as codes, got {factorization!r}")
    for name, payload in payloads.items():
        if name not in tensors:
            raise ValueError(f"payloads: {name} is {payload} there, but the layer has no {name}")
        if name.startswith("u_") != (payload.group == 0):
            rule = "one scale a rank, as int4" if name.startswith("u_") else "groups of 32, 64 or 128, as int4/128"
            raise ValueError(f"payloads: {name} must have {rule}, got {payload}")
        if SCALES + name not in tensors:
            raise ValueError(f"{SCALES}{name}: must be given, {name} is {payload}")
    for name in tensors:
        if parts[name].holds == "scales" and name.removeprefix(SCALES) not in payloads:
            raise ValueError(f"{name}: must be absent, {name.removeprefix(SCALES)} is not stored as codes")


# ---- shapes


def check_parts(
    parts: Mapping[str, Part],
    tensors: Mapping[str, Tensor],
    sides: Mapping[str, Mapping[str, int]],
    payloads: str,
    factorization: str,
) -> None:
    """Which tensors there are, their shapes and dtypes; reads no contents, so it also runs on meta and fake tensors.

    sides: of each matrix, the letters that are known
    Raises ValueError naming the tensor, the rule and what came.
    """
    joint = factorization == "joint"
    for name in tensors:
        matrix = matrix_of(name)
        for need in parts[name].needs:
            needed = need if need in parts else f"{need}_{matrix}"
            if joint and needed in ("v_down", "rank_offsets_down"):
                needed = "u_gate_up"  # which brings what ties it to gate_up
            if needed not in tensors:
                raise ValueError(f"{needed}: must be given together with {name}")
    if joint:
        if "u_gate_up" in tensors and "u_down" not in tensors:
            raise ValueError("u_down: must be given together with u_gate_up")
        for name in ("v_down", "rank_offsets_down"):
            if name in tensors:
                raise ValueError(f"{name}: the joint factorisation ties it to gate_up's, so it must be absent")
    _check_payloads(parts, tensors, payloads, factorization)

    bound: dict[str, int] = {}
    for name, tensor in tensors.items():
        if parts[name].holds == "scales":
            continue  # with what they scale
        matrix = matrix_of(name)
        letters = (_values_letters(tensors, matrix) if name.startswith("values_") else parts[name].letters).split()
        known = dict(sides[matrix]) if matrix else dict(sides["down"])
        scope = {"G": "G", "R": "R" if joint else f"R {matrix}", **{x: f"{x} {matrix}" for x in ("n", "nnz")}}
        known |= {letter: bound[key] for letter, key in scope.items() if key in bound}
        payload = parse_payloads(payloads).get(name)
        if payload is None:
            _check_shape(name, tensor, [known.get(x, x) for x in letters], _DTYPES[parts[name].holds])
            found = dict(zip(letters, tensor.shape, strict=True))
        else:
            found = _check_codes(name, tensor, letters, known, payload)
            scaled = [known["E"], known["N"], known["K"]] if name.startswith("values_") else found.values()
            _check_shape(SCALES + name, tensors[SCALES + name], payload.scales_shape(tuple(scaled)), _DTYPES["scales"])
        bound |= {scope[x]: found[x] for x in letters if x in scope}
        if "n" in found and found["n"] not in BLOCK_KEPT:
            raise ValueError(f"{name}: block layout keeps n of 32 with n in {BLOCK_KEPT}, got n = {found['n']}")


def _values_letters(tensors: Mapping[str, Tensor], matrix: str) -> str:
    """The sides of ``values``: of the full residual, of the block and of the bitmap layout."""
    if f"mask_{matrix}" not in tensors:
        return "E N K"
    return "nnz" if f"row_offsets_{matrix}" in tensors else "E N W n"


def _check_shape(
    name: str, tensor: Tensor, expected: list[int | str] | tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    fits = tensor.dim() == len(expected) and all(
        isinstance(e, str) or e == n for e, n in zip(expected, tensor.shape, strict=True)
    )
    if fits and (tensor.dtype in dtypes if dtypes else tensor.is_floating_point()):
        return
    wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes) or "floating point"
    raise ValueError(
        f"{name}: must be ({', '.join(map(str, expected))}) {wanted}, "
        f"got {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
    )


def _check_codes(
    name: str, codes: Tensor, letters: list[str], known: Mapping[str, int], payload: Payload
) -> dict[str, int]:
    """The sides of the tensor that was encoded, by letter; of a bitmap's stream, without nnz, which contents tell."""
    stored: list[int | str] = [known.get(x, x) for x in letters]
    uint8 = (torch.uint8,)
    if letters == ["nnz"]:
        _check_shape(name, codes, ["bytes"], uint8)
        if codes.shape[0] % (CHUNK * payload.bits // 8):
            raise ValueError(
                f"{name}: codes of {payload} must be a multiple of {CHUNK * payload.bits // 8} bytes, "
                f"got {codes.shape[0]}"
            )
        return {"nnz": 0}
    if letters[-1] == "n":
        _check_shape(name, codes, [*stored[:-2], "bytes"], uint8)
        kept = block_kept(name, codes.shape[-1], known["W"], payload)
        return dict(zip(letters, (*codes.shape[:-1], known["W"], kept), strict=True))
    known_length = int(stored[-1])
    _check_shape(name, codes, [*stored[:-1], payload.codes_shape((known_length,))[0]], uint8)
    return dict(zip(letters, (*codes.shape[:-1], known_length), strict=True))


def block_bytes(words: int, kept: int, payload: Payload) -> int:
    """Bytes of a row's codes in the block layout: of ``words * kept`` codes, with 3 bits padded to chunks of 32."""
    count = words * kept
    return (-(-count // CHUNK) * CHUNK if payload.bits == 3 else count) * payload.bits // 8


def block_kept(name: str, row_bytes: int, words: int, payload: Payload) -> int:
    """n of the block layout of codes. Raises ValueError if rows of no n, or of several, have so many bytes."""
    fits = [n for n in BLOCK_KEPT if block_bytes(words, n, payload) == row_bytes]
    if len(fits) == 1:
        return fits[0]
    known = ", ".join(f"{block_bytes(words, n, payload)} (n = {n})" for n in BLOCK_KEPT)
    if fits:
        raise ValueError(
            f"{name}: a block layout of {payload} with {words} words a row does not tell n by its bytes, {known}; "
            "rows of 7 words and more do: take 2 or 4 bits, or a bitmap"
        )
    raise ValueError(f"{name}: a row of {words} words of {payload} must be {known} bytes, got {row_bytes}")


def words_of(columns: int) -> int:
    """W: words of a mask's row."""
    return -(-columns // BLOCK)
