"""Compression methods: functions from the dense experts of one layer to FactoredExperts and a report."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from resmoe_kernels.factored import DenseExperts, FactoredExperts

METHODS = {"resmoe": "resmoe"}  # name on the command line -> module here, holding a function of that name


def method_function(name: str, settings: dict[str, Any]) -> Callable[[DenseExperts], tuple[FactoredExperts, Any]]:
    """The method with its settings applied. Raises ValueError, listing what is known, for a wrong name or setting."""
    if name not in METHODS:
        raise ValueError(f"method: {name!r} is not known; known are {', '.join(METHODS)}")
    function = getattr(import_module(f"resmoe_kernels.python_ops.methods.{METHODS[name]}"), METHODS[name])
    known = [
        p
        for p, spec in inspect.signature(function).parameters.items()
        if spec.kind is spec.KEYWORD_ONLY and p != "progress"
    ]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(f"{name}: unknown setting {unknown[0]!r}; known are {', '.join(known)}")
    return partial(function, **settings)
