"""``save_pretrained`` of a model with factored layers: transformers' own, which then says what the files hold."""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import Any

from torch import nn

from resmoe_kernels.python_ops.models.specs import digests_of
from resmoe_kernels.python_ops.storage.digests import file_digest
from resmoe_kernels.python_ops.storage.files import sync_file, sync_folder, write_json
from resmoe_kernels.python_ops.storage.model_files import read_config, weight_files


def say_what_is_saved(model: nn.Module) -> None:
    """From now on, what ``model.save_pretrained`` writes carries digests of its files of weights in config.json, and is
    on the disk when it returns.

    The model keeps transformers' method but for that; a copy of the model has it, too.
    """
    model.save_pretrained = MethodType(save_pretrained, model)  # type: ignore[assignment]


def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    result = type(self).save_pretrained(self, save_directory, *args, **kwargs)
    # Other processes of a distributed run write nothing; files of a variant are not those a plain load reads.
    if kwargs.get("is_main_process", True) and kwargs.get("variant") is None:
        _say_digests(Path(save_directory))
    return result


def _say_digests(folder: Path) -> None:
    if not (folder / "config.json").is_file():  # an adapter alone was saved
        return
    config = read_config(folder)
    quantization = config.get("quantization_config") or {}
    if quantization.get("quant_method") != "resmoe":  # of an adapter, beside a dense model
        return
    paths, _ = weight_files(folder, config)
    for path in paths:
        sync_file(path)
    sync_folder(folder)
    quantization["digests"] = digests_of(quantization["layers"], {path.name: file_digest(path) for path in paths})
    write_json(config, folder / "config.json")
