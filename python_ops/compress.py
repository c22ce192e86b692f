"""The offline job: a dense checkpoint in, a factored checkpoint out, one layer in memory at a time."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import nn
from tqdm.auto import tqdm

from resmoe_kernels.python_ops.checkpoint import (
    INDEX,
    SINGLE,
    Checkpoint,
    ModuleReader,
    Shard,
    check_shard_finite,
    copy_file,
    read_config,
    read_shard,
    write_json,
    write_subset,
    write_tensors,
)
from resmoe_kernels.python_ops.hf_quantizer import FORMAT_VERSION, QUANT_METHOD, tensor_specs
from resmoe_kernels.python_ops.layouts import ExpertsModule, find_experts, select_layers
from resmoe_kernels.python_ops.methods import method_function

_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}


def compress(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    method: str = "resmoe",
    layers: str = "all",
    trust_remote_code: bool = False,
    progress: bool = True,
    **settings: Any,
) -> Path:
    """Compresses the experts of a Hugging Face checkpoint into a factored checkpoint.

    model: folder with config.json and safetensors weights, one matrix per expert or stacked
    out: folder to make. It appears, whole, when the job is done; until then the work is in ``.<out>.unfinished`` beside
        it, and the same call goes on where a killed one stopped. Where it is there already, from the same model and
        settings, nothing is done
    method: ``resmoe``, with its settings as keywords (residual, retain, factorization, sparse_layout, ...)
    layers: ``all``, ``first:N``, ``last:N`` or numbers like ``0,3,5-7``, counting experts modules
    trust_remote_code: as in transformers, for models that bring their own code

    Memory: one experts module in its own dtype, what the method needs beside it, and the largest other tensor. Tensors
    that are not experts are carried over byte for byte, files without experts whole.
    Returns ``out``. Raises ValueError naming what is wrong with the input; nothing is left behind then, and nothing that
    was there before is touched.
    """
    compress_layer = method_function(method, settings)
    source, target = Checkpoint(model), Path(out)
    job = {"source": _fingerprint(source), "settings": {"method": method, "layers": layers, **settings}}
    workplace = target.absolute().with_name(f".{target.name}.unfinished")
    if _is_done(target, job):
        return target
    dense = _build_on_meta(source, trust_remote_code)
    chosen = select_layers(find_experts(dense), layers)
    reader = ModuleReader(source, dense)
    consumed = {n for experts in chosen for n in reader.names_on_disk(experts.path, experts.parameter_names)}

    with _work_in(workplace, job) as folder:
        files = {f"experts-{i:05d}.safetensors": experts for i, experts in enumerate(chosen)}
        with tqdm(total=len(files), desc="compressing", unit="layer", disable=not progress) as bar:
            for file, experts in files.items():
                if not (folder / file).is_file():
                    _compress_module(reader, experts, partial(compress_layer, progress=bar.set_postfix_str), folder / file)
                bar.update()
        _carry_over(source, consumed, folder, progress)
        _finish(source, job, files, folder)
        folder.rename(target)
    shutil.rmtree(workplace)
    return target


def _compress_module(reader: ModuleReader, experts: ExpertsModule, compress_layer, file: Path) -> None:
    weights, report = compress_layer(experts.read(reader.read(experts.path, experts.parameter_names)))
    spec = {"path": experts.path, **tensor_specs(weights), "report": dataclasses.asdict(report)}
    tensors = {f"{experts.path}.{name}": tensor for name, tensor in weights.tensors().items()}
    write_tensors(tensors, file, {"resmoe": json.dumps(spec)})


def _rest_name(shard: Shard) -> str:
    # transformers would take a file of the single-file name for the whole model.
    return "model-00001-of-00001.safetensors" if shard.path.name == SINGLE else shard.path.name


def _carry_over(source: Checkpoint, consumed: set[str], folder: Path, progress: bool) -> None:
    """Everything that is not a compressed expert: other tensors, tokenizer, generation config, code."""
    for shard in tqdm(source.shards.values(), desc="copying the rest", unit="shard", disable=not progress):
        rest = [name for name in shard.header if name not in consumed]
        target = folder / _rest_name(shard)
        if not rest or target.is_file():
            continue
        check_shard_finite(shard, rest)
        if len(rest) == len(shard.header):
            copy_file(shard.path, target)
        else:
            write_subset(shard, rest, target)
    for path in sorted(source.folder.rglob("*")):
        relative = path.relative_to(source.folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if path.is_file() and not hidden and path.suffix not in _WEIGHT_SUFFIXES and relative.name not in ("config.json", INDEX):
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            copy_file(path, folder / relative)


def _finish(source: Checkpoint, job: dict[str, Any], files: dict[str, ExpertsModule], folder: Path) -> None:
    """Index and config, from what is on disk: a resumed job knows the layers of its first run only from there."""
    weight_map, total, layers = {}, 0, {}
    for path in sorted(folder.glob("*.safetensors")):
        shard = read_shard(path)
        weight_map.update(dict.fromkeys(shard.header, path.name))
        total += sum(stop - start for start, stop in (t["data_offsets"] for t in shard.header.values()))
        if path.name in files:
            spec = json.loads(shard.metadata["resmoe"])
            layers[spec.pop("path")] = spec
    write_json({"metadata": {"total_size": total}, "weight_map": weight_map}, folder / INDEX)
    quantization = {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        **job,
        "layers": layers,
    }
    # The second key makes a load without this package fail, see hf_quantizer.
    config = {**source.config, "quantization_config": quantization, "experts_implementation": QUANT_METHOD}
    write_json(config, folder / "config.json")


# ---- the folder


def _fingerprint(source: Checkpoint) -> str:
    """Tells checkpoints apart without reading all of them: config, headers, both ends of every shard's data."""
    digest = hashlib.sha256(json.dumps(source.config, sort_keys=True).encode())
    for shard in source.shards.values():
        with shard.path.open("rb") as file:
            digest.update(file.read(shard.data_start + (1 << 16)))
            file.seek(-min(1 << 16, shard.path.stat().st_size), os.SEEK_END)
            digest.update(file.read())
    return digest.hexdigest()


def _is_done(target: Path, job: dict[str, Any]) -> bool:
    """Whether ``target`` is this job's finished result. Raises ValueError if it is anything else but absent or empty."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    if not target.is_dir():
        raise ValueError(f"{target}: exists and is not a folder; choose another name")
    quantization: dict[str, Any] = {}
    if (target / "config.json").is_file():
        quantization = read_config(target).get("quantization_config") or {}
    if quantization.get("quant_method") != QUANT_METHOD:
        raise ValueError(f"{target}: exists and is not a checkpoint made by this command; choose another folder")
    for key, what in (("source", "of another model"), ("settings", "made with other settings")):
        if quantization.get(key) != job[key]:
            raise ValueError(f"{target}: holds a factored checkpoint {what}; choose another folder")
    return True


@contextmanager
def _work_in(workplace: Path, job: dict[str, Any]) -> Iterator[Path]:
    """The folder where the checkpoint grows: made, or found again if it is this very job's.

    Left in place when the process is killed, removed when the input turns out to be bad.
    """
    workplace.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(FileLock(workplace / "lock").acquire(blocking=False))
        except Timeout:
            raise ValueError(f"{workplace}: another process is compressing into it; wait for it to end") from None
        described = workplace / "job.json"
        if not described.is_file():
            write_json(job, described)
        elif json.loads(described.read_text()) != job:
            raise ValueError(
                f"{workplace}: holds an unfinished job with other settings or another model; "
                "run that command again to finish it, or remove the folder"
            )
        folder = workplace / "checkpoint"
        folder.mkdir(exist_ok=True)
        try:
            yield folder
        except ValueError:
            shutil.rmtree(workplace)
            raise


def _build_on_meta(checkpoint: Checkpoint, trust_remote_code: bool) -> nn.Module:
    """The dense model of a checkpoint, without memory for its weights.

    Raises ValueError if the checkpoint is quantised already or its architecture cannot be built.
    """
    import transformers

    quantised = checkpoint.config.get("quantization_config")
    if quantised is not None:
        kind = quantised.get("quant_method")
        hint = "it is compressed already" if kind == "resmoe" else "start from an unquantised checkpoint"
        raise ValueError(f"{checkpoint.folder}: holds {kind}-quantised weights; {hint}")
    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
        architecture = (config.architectures or [""])[0]
        native = getattr(transformers, architecture, None)
        dtype = config.dtype or torch.float32
        with torch.device("meta"):
            if native is not None and not (trust_remote_code and "auto_map" in checkpoint.config):
                return native._from_config(config, dtype=dtype)
            auto = transformers.AutoModelForCausalLM
            return auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, ImportError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{checkpoint.folder}: transformers cannot build this model: {reason}") from None
