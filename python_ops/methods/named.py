"""Methods by name, and their settings.

A method is a module here with a function of its name. The function's keyword arguments, but for those of ``GIVEN``,
are the method's settings; ``check_settings`` refuses wrong ones, ``needs_statistics`` says whether they ask for
calibration, and ``fits``, where there is one, whether to that with the moments of experts. A method that decides over
all layers at once has a second function, ``plan``; where that asks for a measurement of every layer, as ``measures``
says of its settings, it has a third, ``measure``. One that compresses other modules than experts has ``find``; one
that cannot be stored in every way has ``check_storage``. How the result is stored, the fields of Storage, are settings
of every method.
"""

from __future__ import annotations

import inspect
from dataclasses import fields
from importlib import import_module
from types import ModuleType
from typing import Any

from resmoe_kernels.python_ops.methods.method import Chain, Method
from resmoe_kernels.python_ops.solvers.rounding import Storage

# name on the command line -> module here, with a function of that name
METHODS = {name: name.replace("-", "_") for name in ("resmoe", "mc-smoe", "moe-i2", "xmoe", "quantise", "fit")}
STORAGE = {f.name: f for f in fields(Storage)}
GIVEN = (
    "statistics",
    "plan",
    "progress",
    "storage",
)  # what a method's function is given beside settings, if it takes it


def method_named(name: str, settings: dict[str, Any]) -> Method | Chain:
    """The method of a name, or two joined by a plus: the second compresses the dense experts the first leaves.

    Raises ValueError, listing what is known, for a wrong name, setting or value.
    """
    names = _names(name)
    known = [_known_settings(n) for n in names]
    if unknown := sorted(set(settings).difference(STORAGE, *known)):
        every = [*(k for ks in known for k in ks), *STORAGE]
        raise ValueError(f"{name}: unknown setting {unknown[0]!r}; known are {', '.join(every)}")
    storage = Storage(**{n: v for n, v in settings.items() if n in STORAGE})
    of_each = [ks | {k: v for k, v in settings.items() if k in ks} for ks in known]
    # Of two, the second makes what is stored.
    made = [_method(n, own, storage if n is names[-1] else Storage()) for n, own in zip(names, of_each, strict=True)]
    return made[0] if len(made) == 1 else Chain(*made)


def _names(name: str) -> list[str]:
    names = name.split("+")
    unknown = next((n for n in names if n not in METHODS), None)
    if unknown is not None:
        raise ValueError(f"method: {unknown!r} is not known; known are {', '.join(METHODS)}")
    if len(names) > 2 or (len(names) == 2 and (names[0] != "xmoe" or names[1] == "xmoe")):
        raise ValueError(f"method: only xmoe can come before another method, as in 'xmoe+resmoe', got {name!r}")
    return names


def _module(name: str) -> ModuleType:
    return import_module(f"resmoe_kernels.python_ops.methods.{METHODS[name]}")


def _known_settings(name: str) -> dict[str, Any]:
    """The settings of a method and their defaults."""
    parameters = inspect.signature(getattr(_module(name), METHODS[name])).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in GIVEN}


def setting_defaults(name: str) -> dict[str, Any]:
    """The settings of a method, or of two joined by a plus, and their defaults."""
    own = {setting: value for part in _names(name) for setting, value in _known_settings(part).items()}
    return own | {setting: f.default for setting, f in STORAGE.items()}


def setting_types(name: str) -> dict[str, tuple[type, ...]]:
    """The settings of a method, or of two joined by a plus, and the types each may have."""
    scalars = {"str": str, "int": int, "float": float, "bool": bool, "None": type(None)}
    types: dict[str, tuple[type, ...]] = {}
    for part in _names(name):
        parameters = inspect.signature(getattr(_module(part), METHODS[part])).parameters
        for setting in _known_settings(part):
            annotation = parameters[setting].annotation  # text, because of the first import of each module
            types[setting] = tuple(scalars[word.strip()] for word in annotation.split("|"))
    for setting, f in STORAGE.items():
        types[setting] = tuple(scalars[word.strip()] for word in str(f.type).split("|"))
    return types


def _method(name: str, settings: dict[str, Any], storage: Storage) -> Method:
    module = _module(name)
    module.check_settings(**settings)
    if storage.codes and (factorization := settings.get("factorization", "stacked")) != "stacked":
        raise ValueError(f"bits: only factorization 'stacked' is stored as codes, got {factorization!r}")
    if hasattr(module, "check_storage"):
        module.check_storage(storage, **settings)
    return Method(
        name,
        settings,
        module.needs_statistics(**settings),
        getattr(module, METHODS[name]),
        getattr(module, "plan", None),
        getattr(module, "find", None),
        module.measure if hasattr(module, "measure") and module.measures(**settings) else None,
        getattr(module, "peak_bytes", None),
        module.less_memory(**settings) if hasattr(module, "less_memory") else None,
        module.fits(**settings) if hasattr(module, "fits") else False,
        storage=storage,
        _check_model=getattr(module, "check_model", None),
    )
