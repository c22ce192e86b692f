"""The offline job: a dense checkpoint in, a factored checkpoint out, one layer in memory at a time."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor, nn
from tqdm.auto import tqdm

from resmoe_kernels.python_ops.calibration.statistics import LayerStatistics
from resmoe_kernels.python_ops.jobs.calibration_data import calibration_data
from resmoe_kernels.python_ops.jobs.measured import read_measured, write_measured
from resmoe_kernels.python_ops.jobs.workers import check_memory, check_workers, in_processes, on_ray
from resmoe_kernels.python_ops.methods.method import Chain, Compressed, Method
from resmoe_kernels.python_ops.methods.named import method_named
from resmoe_kernels.python_ops.models.checkpoint import (
    INDEX,
    SINGLE,
    Checkpoint,
    ModuleReader,
    Shard,
    check_shard_finite,
    copy_file,
    part_name,
    read_config,
    read_shard,
    write_json,
    write_subset,
    write_tensors,
)
from resmoe_kernels.python_ops.models.dense_model import DenseModel, build_on_meta
from resmoe_kernels.python_ops.models.hf_quantizer import PART, QUANT_METHOD, format_version_of, layer_spec
from resmoe_kernels.python_ops.models.layer import PART_ROUTER
from resmoe_kernels.python_ops.models.layouts import ExpertsModule, select_layers
from resmoe_kernels.python_ops.models.placing import KNOWN_AS
from resmoe_kernels.python_ops.models.sub_configs import configs_with_layers, part_of_json

_log = logging.getLogger("resmoe_kernels")
_PROCESS_BYTES = 1 << 29  # of a worker with torch and transformers, before it reads a layer
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}


def compress(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    method: str = "resmoe",
    layers: str = "all",
    calibration: str | os.PathLike[str] | None = None,
    calibration_tokens: int | None = None,
    moments: str | None = None,
    trust_remote_code: bool = False,
    workers: int = 1,
    engine: str = "processes",
    progress: bool = True,
    **settings: Any,
) -> Path:
    """Compresses the experts of a Hugging Face checkpoint into a factored checkpoint.

    model: folder with config.json and safetensors weights, one matrix per expert or stacked
    out: folder to make, in a folder that exists. It appears, whole, when the job is done; until then the work
        is in ``.<out>.unfinished`` beside it, and the same call goes on where a killed one stopped, to the
        same bytes. Where it is there already, from the same model and settings, nothing is done
    method: ``resmoe``, ``mc-smoe``, ``moe-i2`` or ``xmoe``, with its settings as keywords; two joined by a plus,
        ``xmoe+resmoe``, the second compressing what the first made
    layers: ``all``, ``first:N``, ``last:N`` or numbers like ``0,3,5-7``, counting experts modules
    calibration: UTF-8 text, for methods that need to know how the experts are used. What is collected is kept beside
        ``out``, in ``<model>-<hash>.statistics.safetensors``, and not collected again from the same model and text;
        such a file, named here in place of a text, is used as it is
    calibration_tokens: of the text, 65,536 by default;  moments: ``diagonal`` (default) or ``full``, see calibrate
    trust_remote_code: as in transformers, for models that bring their own code
    workers: layers compressed, and before that measured where settings ask for it, at a time, to the same bytes; what
        is decided over all layers, calibration included, is not shared out. Beyond 1, a script that calls this needs
        ``if __name__ == "__main__"``
    engine: ``processes`` of this machine, or tasks on a ``ray`` cluster whose machines see ``model`` and ``out`` under
        the same paths, see on_ray; a layer whose worker is lost is then done again by another

    Memory: one experts module in its own dtype and what the method needs beside it, for every worker, and the largest
    other tensor. Tensors that are not experts are carried over byte for byte, files without experts whole.
    Returns ``out``. Raises ValueError naming what is wrong with the input; nothing is left behind then, and
    nothing that was there before is touched. Raises ChildProcessError if a worker was killed; the same call goes on.
    """
    check_workers(engine, workers)
    chosen_method = method_named(method, settings)
    source, target = Checkpoint(model), Path(out).resolve()
    fingerprint = _fingerprint(source)
    data = calibration_data(
        chosen_method, source.folder, fingerprint, calibration, calibration_tokens, moments, trust_remote_code
    )
    job = {
        "source": fingerprint,
        "settings": {"method": method, "layers": layers, **chosen_method.recorded, **data.described},
    }
    _check_place(source, target)
    unfinished = target.with_name(f".{target.name}.unfinished")
    # Both: a run killed just before its end left its folder, to be removed below.
    if _is_done(target, job) and not unfinished.exists():
        return Path(out)
    dense = build_on_meta(source, trust_remote_code)
    found = chosen_method.find(dense)
    chosen = select_layers(found, layers)
    reader = ModuleReader(source, dense)
    files = [f"experts-{i:05d}.safetensors" for i in range(len(chosen))]
    if taken := sorted(set(files) & set(source.shards)):
        raise ValueError(f"{source.folder / taken[0]}: has the name of a file to be written; rename the shard")
    consumed = {n for experts in chosen for n in reader.names_on_disk(experts.path, experts.parameter_names)}
    _check_whole(reader, chosen, consumed)
    whole = DenseModel(dense, reader, found)
    numbers = [found.index(experts) for experts in chosen]
    chosen_method.check_model(whole, numbers)
    workers = min(workers, len(chosen))
    layer_bytes = max(_peak_bytes(chosen_method, experts) for experts in chosen)
    if engine == "processes" and (workers > 1 or chosen_method.says_memory):
        check_memory(workers, layer_bytes, chosen_method.less_memory)

    with _work_in(unfinished, job):
        if _is_done(target, job):  # another process was faster, or see above
            return Path(out)
        folder, specs, measured = (unfinished / name for name in _FOLDERS)
        folder.mkdir(exist_ok=True)
        specs.mkdir(exist_ok=True)
        _carry_over(source, consumed, folder, progress)  # first: what is wrong there should not cost the layers
        statistics = data.statistics(whole, target.parent, progress)
        if statistics is not None:
            statistics.check_holds(experts.path for experts in chosen)

        def tasks(plans: Sequence[dict[str, Any]]) -> list[_Layer]:
            return [
                _Layer(
                    source.folder.resolve(),
                    fingerprint,
                    trust_remote_code,
                    chosen_method,
                    number,
                    plan,
                    None if statistics is None else statistics.layers[found[number].path],
                    measured / file,
                    folder / file,
                    specs / f"{file}.json",
                )
                for number, plan, file in zip(numbers, plans, files, strict=True)
            ]

        def run(work: Callable[..., None], to_do: list[_Layer], what: str) -> None:
            with tqdm(total=len(chosen), desc=what, unit="layer", disable=not progress) as bar:
                bar.update(len(chosen) - len(to_do))
                if engine == "ray":
                    on_ray(work, to_do, workers, bar.update, layer_bytes)
                elif workers > 1:
                    in_processes(work, to_do, workers, bar.update)
                else:
                    for layer in to_do:
                        work(layer, whole, bar.set_postfix_str)
                        bar.update()

        def measure(plans: Sequence[dict[str, Any]]) -> list[dict[str, Tensor]]:
            measured.mkdir(exist_ok=True)
            layers = tasks(plans)
            run(_measure_layer, [layer for layer in layers if read_measured(layer.measured) is None], "measuring")
            made = [(layer.measured, read_measured(layer.measured)) for layer in layers]
            if bad := [file for file, tensors in made if tensors is None]:
                raise OSError(f"{bad[0]}: does not hold what was written to it; check the disk and run this again")
            return [tensors for _, tensors in made if tensors is not None]

        plans = chosen_method.plan(whole, numbers, statistics, progress, measure)
        run(_compress_layer, [layer for layer in tasks(plans) if not layer.file.is_file()], "compressing")
        parts = [keys for keys, _ in configs_with_layers(dense, [experts.path for experts in chosen])]
        _finish(source, job, sorted(specs.glob("*.json")), parts, folder)
        folder.rename(target)
    return Path(out)


@dataclasses.dataclass(frozen=True)
class _Layer:
    """What a process that knows nothing yet needs to compress one layer; ``fingerprint`` is that of ``model``."""

    model: Path
    fingerprint: str
    trust_remote_code: bool
    method: Method | Chain
    number: int
    plan: dict[str, Any]
    statistics: LayerStatistics | None
    measured: Path
    file: Path
    spec: Path


def _measure_layer(
    layer: _Layer, whole: DenseModel | None = None, progress: Callable[[str], None] | None = None
) -> None:
    experts = (whole or _whole(layer)).read(layer.number)
    made = layer.method.measure(experts, plan=layer.plan, statistics=layer.statistics, progress=progress)
    write_measured(made, layer.measured)


def _compress_layer(
    layer: _Layer, whole: DenseModel | None = None, progress: Callable[[str], None] | None = None
) -> None:
    whole = whole or _whole(layer)
    made = layer.method(whole.read(layer.number), plan=layer.plan, statistics=layer.statistics, progress=progress)
    path = whole.experts[layer.number].path
    assert whole.reader is not None
    _write_layer(made, path, layer.file, layer.spec, whole.reader.path_on_disk(path))


def _whole(layer: _Layer) -> DenseModel:
    dense, reader = _opened(layer.model, layer.fingerprint, layer.trust_remote_code)
    return DenseModel(dense, reader, layer.method.find(dense))


@lru_cache(maxsize=1)  # a worker opens the model once
def _opened(folder: Path, fingerprint: str, trust_remote_code: bool) -> tuple[nn.Module, ModuleReader]:
    """The model, on meta, and its reader, in a worker. Raises OSError if this machine sees another model than the one
    where the job began: a fault of the place and not of the input, so that the work of the others is kept."""
    try:
        source = Checkpoint(folder)
        if _fingerprint(source) != fingerprint:
            raise ValueError(f"{folder}: is not the model that the job began with")
        dense = build_on_meta(source, trust_remote_code)
        return dense, ModuleReader(source, dense)
    except ValueError as error:
        raise OSError(f"{error}; every worker must see the same model under this path") from error


def _peak_bytes(method: Method | Chain, experts: ExpertsModule) -> int:
    """What a worker needs at its peak for this layer, the process included: what the method says, or three times the
    layer in float32."""
    if method.says_memory:
        return method.peak_bytes(experts) + _PROCESS_BYTES
    return 3 * 4 * sum(p.numel() for p in experts.module.parameters()) + _PROCESS_BYTES


def _check_whole(reader: ModuleReader, chosen: Sequence[ExpertsModule], consumed: set[str]) -> None:
    """Raises ValueError if something that stays dense is made of tensors that go."""
    going = tuple(f"{experts.path}." for experts in chosen)
    staying = [p for p in reader.parameters_made_of(consumed) if not p.startswith(going)]
    if staying:
        raise ValueError(
            f"layers: {staying[0]} stands in the same tensors of the checkpoint as experts that are chosen; choose both"
        )


def _write_layer(made: Compressed, path: str, file: Path, spec: Path, known_as: str) -> None:
    tensors = made.weights.tensors()
    if made.part_router is not None:
        tensors[PART_ROUTER] = made.part_router
    described = layer_spec(made.weights, made.change, made.part_router)
    # The spec first: where the tensors are, it is.
    report = dataclasses.asdict(made.report)
    names = {} if known_as == path else {KNOWN_AS: known_as}
    write_json({"path": path, **described, **names, "report": report}, spec)
    write_tensors({f"{path}.{name}": tensor for name, tensor in tensors.items()}, file)


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
        ours = relative.as_posix() in ("config.json", INDEX)  # written by _finish
        if path.is_file() and not hidden and not ours and path.suffix not in _WEIGHT_SUFFIXES:
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            copy_file(path, folder / relative)


def _finish(
    source: Checkpoint, job: dict[str, Any], specs: list[Path], parts: list[tuple[str, ...]], folder: Path
) -> None:
    """Index and config, from what is on disk: a resumed job has not seen the layers of its first run.

    parts: of the config, from which classes with experts may be built
    """
    for stray in folder.glob(".*"):  # parts of files, ours and safetensors', from when the job was killed
        stray.unlink()
    weight_map, total, layers = {}, 0, {}
    for path in sorted(folder.glob("*.safetensors")):
        shard = read_shard(path)
        weight_map.update(dict.fromkeys(shard.header, path.name))
        total += sum(stop - start for start, stop in (t["data_offsets"] for t in shard.header.values()))
    for path in specs:
        spec = json.loads(path.read_text())
        layers[spec.pop("path")] = spec
    write_json({"metadata": {"total_size": total}, "weight_map": weight_map}, folder / INDEX)
    quantization = {
        "quant_method": QUANT_METHOD,
        "format_version": format_version_of(layers),
        **job,
        "layers": layers,
    }
    # The second key makes a load without this package fail, see hf_quantizer.
    config = copy.deepcopy(source.config)
    for part in [p for keys in parts if (p := part_of_json(config, keys)) is not None]:
        part.update(quantization_config=PART, experts_implementation=QUANT_METHOD)
    config.update(quantization_config=quantization, experts_implementation=QUANT_METHOD)
    write_json(config, folder / "config.json")


# ---- the folder


def _fingerprint(source: Checkpoint) -> str:
    """Tells checkpoints apart without reading all of them: config, headers, both ends of every shard."""
    digest = hashlib.sha256(json.dumps(source.config, sort_keys=True).encode())
    for shard in source.shards.values():
        with shard.path.open("rb") as file:
            digest.update(file.read(shard.data_start + (1 << 16)))
            file.seek(-min(1 << 16, shard.path.stat().st_size), os.SEEK_END)
            digest.update(file.read())
    return digest.hexdigest()


def _check_place(source: Checkpoint, target: Path) -> None:
    if target.is_relative_to(source.folder.resolve()):
        raise ValueError(f"{target}: lies in the folder of the model to compress; choose a folder outside of it")
    if target == Path.cwd() or target.is_mount():
        raise ValueError(f"{target}: is the current folder or a mount, which cannot be replaced; choose a folder in it")
    if not target.parent.is_dir():
        raise ValueError(f"{target.parent}: no such folder to make {target.name} in; make it first")


def _is_done(target: Path, job: dict[str, Any]) -> bool:
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
    if quantization.get("quant_method") != QUANT_METHOD:
        raise ValueError(f"{target}: exists and is not a checkpoint made by this command; choose another folder")
    for key, what in (("source", "of another model"), ("settings", "made with other settings")):
        if quantization.get(key) != job[key]:
            raise ValueError(f"{target}: holds a factored checkpoint {what}; choose another folder")
    return True


_LOCK, _JOB = "lock", "job.json"  # of the unfinished folder: the first to come and the last to go
_FOLDERS = ("checkpoint", "layers", "measured")


def _is_empty(unfinished: Path) -> bool:
    """Whether it holds nothing but what is there before job.json comes or after it goes."""
    return unfinished.is_dir() and set(unfinished.iterdir()) <= {unfinished / _LOCK, part_name(unfinished / _JOB)}


@contextmanager
def _work_in(unfinished: Path, job: dict[str, Any]) -> Iterator[None]:
    """Holds the folder where the checkpoint grows: made, or found again if it is this very job's.

    Removed at the end, and when the input turns out to be bad; left in place when the process is killed.
    """
    described = unfinished / _JOB
    if unfinished.exists() and not described.is_file() and not _is_empty(unfinished):
        raise ValueError(f"{unfinished}: the work is done there, and it holds something else; move it away")
    unfinished.mkdir(exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(FileLock(unfinished / _LOCK).acquire(blocking=False))
        except Timeout:
            raise ValueError(f"{unfinished}: another process is compressing into it; wait for it to end") from None
        if not described.is_file():
            write_json(job, described)
        elif json.loads(described.read_text()) != job:
            raise ValueError(
                f"{unfinished}: holds an unfinished job with other settings or another model; "
                "run that command again to finish it, or remove the folder"
            )
        try:
            yield
        except ValueError:
            _remove(unfinished)
            raise
        _remove(unfinished)


def _remove(unfinished: Path) -> None:
    # In this order, so that, killed anywhere, what is left says whose it is and tensors have their spec.
    for name in _FOLDERS:
        if (unfinished / name).is_dir():
            shutil.rmtree(unfinished / name)
    for path in (unfinished / _JOB, part_name(unfinished / _JOB), unfinished / _LOCK):
        path.unlink(missing_ok=True)
    with suppress(OSError):  # a process that came for the lock just now; it removes the folder in turn
        unfinished.rmdir()
