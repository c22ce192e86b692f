"""The place of a result: whether a checkpoint can be made there, and whether it is there already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from resmoe_kernels.python_ops.models.checkpoint import Checkpoint
from resmoe_kernels.python_ops.models.hf_quantizer import QUANT_METHOD
from resmoe_kernels.python_ops.models.specs import check_digests
from resmoe_kernels.python_ops.storage.digests import check_files
from resmoe_kernels.python_ops.storage.model_files import read_config


def check_place(source: Checkpoint, target: Path) -> None:
    """Raises ValueError where a checkpoint made of ``source`` cannot be put in the place of ``target``."""
    if target.is_relative_to(source.folder.resolve()):
        raise ValueError(f"{target}: lies in the folder of the model to compress; choose a folder outside of it")
    if target == Path.cwd() or target.is_mount():
        raise ValueError(f"{target}: is the current folder or a mount, which cannot be replaced; choose a folder in it")
    try:
        str(target).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{target.name!a}: the path of the folder to make must be UTF-8; choose another") from None
    if not target.parent.is_dir():
        raise ValueError(f"{target.parent}: no such folder to make {target.name} in; make it first")


def is_done(target: Path, job: dict[str, Any]) -> bool:
    """Whether ``target`` is this job's finished result.

    Raises ValueError if it is anything else, unless absent or empty.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    if not target.is_dir():
        raise ValueError(f"{target}: exists and is not a folder; choose another name")
    quantization: dict[str, Any] = {}
    if (target / "config.json").is_file():
        quantization = read_config(target).get("quantization_config") or {}
    if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
        raise ValueError(f"{target}: exists and is not a checkpoint made by this command; choose another folder")
    if "digests" not in quantization:
        raise ValueError(
            f"{target}: holds a factored checkpoint that does not say what its files hold (an older version made it); "
            "choose another folder"
        )
    for key, what in (
        ("source", "of another model"),
        ("beside", "of this model with another tokenizer or other files beside its weights"),
        ("settings", "made with other settings"),
    ):
        if quantization.get(key) != job[key]:
            raise ValueError(f"{target}: holds a factored checkpoint {what}; choose another folder")
    check_files(target.glob("*.safetensors"), check_digests(quantization.get("layers"), quantization["digests"]))
    return True
