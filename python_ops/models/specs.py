"""What config.json may say of factored layers, checked before anything is made by it.

A config is text that anybody may edit and any disk may damage: every value is held against its type and against the
others here, so that what is read from it afterwards can be believed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from resmoe_kernels.factored import SIZE_NAMES, TENSOR_NAMES
from resmoe_kernels.python_ops.storage.digests import text_digest

_MOST_ELEMENTS = 1 << 48  # of one tensor: more than any machine has, and far from what overflows
_DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8)
}

T = TypeVar("T")


def check_layers(layers: Any, part_router: str) -> None:
    """Raises ValueError naming layer, place and rule for the first value that is not of the kind it must be.

    part_router: the key of a spec under which the tensor of that name is described
    """
    for path, spec in mapping(layers, "layers").items():
        where = f"layers[{path!r}]"
        mapping(spec, where)
        sizes = mapping(spec.get("sizes"), f"{where}.sizes")
        _known(sizes, SIZE_NAMES, f"{where}.sizes")
        for name in SIZE_NAMES[:3]:
            _whole(sizes.get(name), f"{where}.sizes.{name}", 1)
        for name, kind in (("gated", bool), ("factorization", str), ("payloads", str)):
            if name in sizes and not isinstance(sizes[name], kind):
                raise ValueError(f"{where}.sizes.{name}: must be a {kind.__name__}, got {sizes[name]!r}")
        tensors = mapping(spec.get("tensors"), f"{where}.tensors")
        _known(tensors, TENSOR_NAMES, f"{where}.tensors")
        described = {f"tensors.{name}": tensor for name, tensor in tensors.items()}
        if part_router in spec:
            described[part_router] = spec[part_router]
        for name, tensor in described.items():
            _check_tensor(tensor, f"{where}.{name}")
        if "report" in spec:
            error = mapping(spec["report"], f"{where}.report").get("relative_error")
            if isinstance(error, bool) or not isinstance(error, int | float):
                raise ValueError(f"{where}.report.relative_error: must be a number, got {error!r}")


def _check_tensor(tensor: Any, where: str) -> None:
    mapping(tensor, where)
    dtype, shape = tensor.get("dtype"), tensor.get("shape")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{where}.dtype: must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    if not isinstance(shape, list):
        raise ValueError(f"{where}.shape: must be a list of whole numbers, got {shape!r}")
    for side in shape:
        _whole(side, f"{where}.shape", 0)
    if math.prod(shape) > _MOST_ELEMENTS:
        raise ValueError(f"{where}.shape: {shape} is more than any machine holds")


def described_dtype(tensor: Mapping[str, Any]) -> torch.dtype:
    """The dtype that a checked description names."""
    return _DTYPES[tensor["dtype"]]


def digests_of(layers: Mapping[str, Any], files: Mapping[str, str]) -> dict[str, Any]:
    """What config.json says of its own description of the layers, and of the files of weights, digests by name."""
    return {"layers": _digest(layers), "files": dict(sorted(files.items()))}


def check_digests(layers: Mapping[str, Any], digests: Any) -> dict[str, str]:
    """The digests of files in what ``digests_of`` made. Raises ValueError if the description was changed since."""
    mapping(digests, "digests")
    _known(digests, ("layers", "files"), "digests")
    if digests.get("layers") != _digest(layers):
        raise ValueError(
            "layers: config.json does not describe them as it did when it was written (their digest is another): "
            "damaged, or changed since; fetch or make it again, or remove digests from it to load it as it is"
        )
    return mapping(digests.get("files"), "digests.files")


def _digest(layers: Mapping[str, Any]) -> str:
    return text_digest(json.dumps(layers, sort_keys=True))


def mapping(value: Any, where: str) -> dict[str, Any]:
    """The value. Raises ValueError if it is no JSON object."""
    if not isinstance(value, dict):
        raise ValueError(f"{where}: must be a JSON object, got {_said(value)}")
    return value


def from_plain(kind: type[T], value: Any, where: str) -> T:
    """A dataclass of numbers, words, flags, tuples and such dataclasses, from what ``dataclasses.asdict`` and JSON made
    of it. Raises ValueError naming the field for one that is not known, and a value of another type than the field's.
    """
    mapping(value, where)
    hints = typing.get_type_hints(kind)
    _known(value, hints, where)
    try:
        return kind(**{name: _as(hints[name], item, f"{where}.{name}") for name, item in value.items()})
    except TypeError as error:  # a field without a default that is not there
        raise ValueError(f"{where}: {str(error).rpartition('__init__() ')[2]}") from None


def _as(hint: Any, value: Any, where: str) -> Any:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    (kind,) = (k for k in kinds if k is not type(None))
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where}: must be a list, got {_said(value)}")
        return tuple(_as(typing.get_args(kind)[0], item, where) for item in value)
    if dataclasses.is_dataclass(kind):
        return from_plain(kind, value, where)  # type: ignore[arg-type]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < 2**53 else _refuse(kind, value, where)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        _refuse(kind, value, where)
    if kind is float and not math.isfinite(value):
        _refuse(kind, value, where)
    return value


def _refuse(kind: type, value: Any, where: str) -> typing.NoReturn:
    words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a word"}
    raise ValueError(f"{where}: must be {words[kind]}, got {_said(value)}")


def _whole(value: Any, where: str, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
        raise ValueError(f"{where}: must be whole numbers from {least} below 2^31, got {_said(value)}")


def _known(value: Mapping[Any, Any], known: typing.Iterable[str], where: str) -> None:
    if unknown := [name for name in value if name not in known]:
        raise ValueError(f"{where}: unknown name {unknown[0]!r}; known are {', '.join(known)}")


def _said(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
