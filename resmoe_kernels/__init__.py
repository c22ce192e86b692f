"""Compressed Mixture-of-Experts models: W_e = B_g(e) + U_e V_e + S_e, run as they are and never rebuilt."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from resmoe_kernels.when_imported import when_imported

__version__ = "0.1.0"

# Public names and where they live. Nothing heavy is imported before one of them is used.
_WHERE = {
    "FactoredExperts": "factored",
    "DenseExperts": "factored",
    "PackedExperts": "packed",
    "experts": "dispatch",
    "backend": "dispatch",
    "backends": "dispatch",
    "explain": "dispatch",
    "compress": "python_ops.jobs.compress",
    "swap_experts": "python_ops.jobs.swap",
    "evaluate": "python_ops.tools.evaluate",
    "calibrate": "python_ops.calibration.calibrate",
}
__all__ = ["__version__", *_WHERE]

if TYPE_CHECKING:
    from resmoe_kernels.dispatch import backend, backends, experts, explain  # noqa: F401
    from resmoe_kernels.factored import DenseExperts, FactoredExperts  # noqa: F401
    from resmoe_kernels.packed import PackedExperts  # noqa: F401
    from resmoe_kernels.python_ops.calibration.calibrate import calibrate  # noqa: F401
    from resmoe_kernels.python_ops.jobs.compress import compress  # noqa: F401
    from resmoe_kernels.python_ops.jobs.swap import swap_experts  # noqa: F401
    from resmoe_kernels.python_ops.tools.evaluate import evaluate  # noqa: F401


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module 'resmoe_kernels' has no attribute {name!r}")
    value = getattr(_import(_WHERE[name]), name)
    globals()[name] = value
    return value


def _import(module: str) -> ModuleType:
    try:
        return importlib.import_module(f"resmoe_kernels.{module}")
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("resmoe_kernels.python_ops"):
            raise ImportError(
                "resmoe_kernels is imported from its source tree without being installed; "
                "run: pip install --no-build-isolation -e ."
            ) from error
        raise


def __dir__() -> list[str]:
    return sorted(__all__)


def _register_with_transformers() -> None:
    _import("python_ops.models.hf_quantizer")


# transformers looks quantizers up in this module; from then on it can load a factored checkpoint.
when_imported("transformers.quantizers.auto", _register_with_transformers)
