"""Compression methods: functions from the dense experts of one layer to FactoredExperts and a report."""

from __future__ import annotations

import inspect
from functools import partial
from importlib import import_module
from typing import Any

METHODS = {"resmoe": "resmoe"}  # name on the command line -> module here, with a function of that name


def method_function(name: str, settings: dict[str, Any]) -> partial:
    """The method with all its settings applied, defaults included: ``keywords`` of the result tells them.

    Called with DenseExperts, and ``progress`` if wanted, it returns FactoredExperts and a report.
    Raises ValueError, listing what is known, for a wrong name, setting or value.
    """
    if name not in METHODS:
        raise ValueError(f"method: {name!r} is not known; known are {', '.join(METHODS)}")
    module = import_module(f"resmoe_kernels.python_ops.methods.{METHODS[name]}")
    function = getattr(module, METHODS[name])
    parameters = inspect.signature(function).parameters.values()
    known = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "progress"}
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(f"{name}: unknown setting {unknown[0]!r}; known are {', '.join(known)}")
    module.check_settings(**(known | settings))
    return partial(function, **(known | settings))
