"""The offline job: a dense checkpoint in, a factored checkpoint out, one layer in memory at a time."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from resmoe_kernels.python_ops.calibration.statistics import LayerStatistics
from resmoe_kernels.python_ops.jobs.assemble import carry_over, publish
from resmoe_kernels.python_ops.jobs.calibration_data import calibration_data
from resmoe_kernels.python_ops.jobs.folder import check_place, is_done
from resmoe_kernels.python_ops.jobs.unfinished import Record, Unfinished
from resmoe_kernels.python_ops.jobs.workers import check_memory, check_workers, in_processes, on_ray
from resmoe_kernels.python_ops.methods.method import Chain, Compressed, Method
from resmoe_kernels.python_ops.methods.named import method_named
from resmoe_kernels.python_ops.models.checkpoint import Checkpoint, ModuleReader
from resmoe_kernels.python_ops.models.dense_model import DenseModel, build_on_meta
from resmoe_kernels.python_ops.models.hf_quantizer import layer_spec
from resmoe_kernels.python_ops.models.identity import Identity, identify, is_model
from resmoe_kernels.python_ops.models.layer import PART_ROUTER
from resmoe_kernels.python_ops.models.layouts import ExpertsModule, select_layers
from resmoe_kernels.python_ops.models.placing import KNOWN_AS
from resmoe_kernels.python_ops.models.sub_configs import configs_with_layers
from resmoe_kernels.python_ops.storage.files import write_tensors
from resmoe_kernels.python_ops.storage.sealed import read_sealed, write_sealed

_PROCESS_BYTES = 1 << 29  # of a worker with torch and transformers, before it reads a layer


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
    check_place(source, target)
    identity = identify(source)
    data = calibration_data(
        chosen_method, source.folder, identity.model, calibration, calibration_tokens, moments, trust_remote_code
    )
    job = {
        "source": identity.model,
        "beside": identity.beside,
        "settings": {"method": method, "layers": layers, **chosen_method.recorded, **data.described},
    }
    unfinished = Unfinished(target.with_name(f".{target.name}.unfinished"), job)
    # Both: a run killed just before its end left its folder, to be removed below.
    if is_done(target, job) and not unfinished.folder.exists():
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

    with unfinished.held():
        if is_done(target, job):  # another process was faster, or see above
            return Path(out)
        unfinished.checkpoint.mkdir(exist_ok=True)
        carry_over(source, consumed, unfinished, progress, reader.makes_parameters)
        statistics = data.statistics(whole, target.parent, progress)
        if statistics is not None:
            statistics.check_holds(experts.path for experts in chosen)

        def tasks(plans: Sequence[dict[str, Any]]) -> list[_Layer]:
            return [
                _Layer(
                    source.folder.resolve(),
                    identity,
                    trust_remote_code,
                    chosen_method,
                    number,
                    plan,
                    None if statistics is None else statistics.layers[found[number].path],
                    unfinished.measured / file,
                    unfinished.record(file),
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
            unfinished.measured.mkdir(exist_ok=True)
            layers = tasks(plans)
            run(_measure_layer, [layer for layer in layers if read_sealed(layer.measured) is None], "measuring")
            made = [(layer.measured, read_sealed(layer.measured)) for layer in layers]
            if bad := [file for file, tensors in made if tensors is None]:
                raise OSError(f"{bad[0]}: does not hold what was written to it; check the disk and run this again")
            return [tensors for _, tensors in made if tensors is not None]

        plans = chosen_method.plan(whole, numbers, statistics, progress, measure)
        run(_compress_layer, [layer for layer in tasks(plans) if layer.record.read() is None], "compressing")
        parts = [keys for keys, _ in configs_with_layers(dense, [experts.path for experts in chosen])]
        publish(source, [unfinished.record(file) for file in files], parts, unfinished, target)
    return Path(out)


@dataclasses.dataclass(frozen=True)
class _Layer:
    """What a process that knows nothing yet needs to compress one layer; ``identity`` is that of ``model``."""

    model: Path
    identity: Identity
    trust_remote_code: bool
    method: Method | Chain
    number: int
    plan: dict[str, Any]
    statistics: LayerStatistics | None
    measured: Path
    record: Record


def _measure_layer(
    layer: _Layer, whole: DenseModel | None = None, progress: Callable[[str], None] | None = None
) -> None:
    experts = (whole or _whole(layer)).read(layer.number)
    made = layer.method.measure(experts, plan=layer.plan, statistics=layer.statistics, progress=progress)
    write_sealed(made, layer.measured)


def _compress_layer(
    layer: _Layer, whole: DenseModel | None = None, progress: Callable[[str], None] | None = None
) -> None:
    whole = whole or _whole(layer)
    made = layer.method(whole.read(layer.number), plan=layer.plan, statistics=layer.statistics, progress=progress)
    path = whole.experts[layer.number].path
    assert whole.reader is not None
    _write_layer(made, path, layer.record, whole.reader.path_on_disk(path))


def _whole(layer: _Layer) -> DenseModel:
    dense, reader = _opened(layer.model, layer.identity, layer.trust_remote_code)
    return DenseModel(dense, reader, layer.method.find(dense))


@lru_cache(maxsize=1)  # a worker opens the model once
def _opened(folder: Path, identity: Identity, trust_remote_code: bool) -> tuple[nn.Module, ModuleReader]:
    """The model, on meta, and its reader, in a worker. Raises OSError if this machine sees another model than the one
    where the job began: a fault of the place and not of the input, so that the work of the others is kept."""
    try:
        source = Checkpoint(folder)
        if not is_model(source, identity):
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


def _write_layer(made: Compressed, path: str, record: Record, known_as: str) -> None:
    tensors = made.weights.tensors()
    if made.part_router is not None:
        tensors[PART_ROUTER] = made.part_router
    described = layer_spec(made.weights, made.change, made.part_router)
    names = {} if known_as == path else {KNOWN_AS: known_as}
    digest = write_tensors({f"{path}.{name}": tensor for name, tensor in tensors.items()}, record.file)
    record.write(digest, path=path, **described, **names, report=dataclasses.asdict(made.report))
