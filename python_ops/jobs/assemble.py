"""The parts of a factored checkpoint that no method makes: what is carried over, index, config.json, publication."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from tqdm.auto import tqdm

from resmoe_kernels.python_ops.jobs.unfinished import Record, Unfinished
from resmoe_kernels.python_ops.models.checkpoint import Checkpoint, check_shard_finite
from resmoe_kernels.python_ops.models.hf_quantizer import PART, QUANT_METHOD, format_version_of
from resmoe_kernels.python_ops.models.specs import digests_of
from resmoe_kernels.python_ops.models.sub_configs import part_of_json
from resmoe_kernels.python_ops.storage.dense_view import dense_dtype
from resmoe_kernels.python_ops.storage.files import copy_file, sync_folder, write_json, write_subset
from resmoe_kernels.python_ops.storage.model_files import INDEX, NAMED, SINGLE, files_beside, weights_left_out
from resmoe_kernels.python_ops.storage.shards import Shard, read_shard

_log = logging.getLogger("resmoe_kernels")
_NAMED_AT_MOST = 5


def _rest_name(shard: Shard) -> str:
    """The file that takes the tensors of a shard which are not compressed."""
    # transformers would take a file of the single-file name for the whole model.
    return "model-00001-of-00001.safetensors" if shard.path.name == SINGLE else shard.path.name


def carry_over(
    source: Checkpoint,
    consumed: set[str],
    unfinished: Unfinished,
    progress: bool,
    checked: Callable[[str], bool] = lambda _: False,
) -> None:
    """Everything that is not a compressed expert: other tensors, tokenizer, generation config, code.

    checked: of which tensors, by name, NaN and Inf are refused, those to be compressed too: what is wrong there should
        not cost the layers. Buffers of clip limits and masks hold them rightly

    Weights that from_pretrained does not read are left out, with a warning that names them; those stored by a method of
    storage/quantised.py are stored dense, with one that says so.
    """
    if source.quantised is not None:
        _log.warning(
            "%s: its %s weights are dequantised; what is not compressed is stored in %s",
            source.folder,
            source.quantised,
            str(dense_dtype(source.config)).removeprefix("torch."),
        )
    if left := weights_left_out(source.folder, [shard.path for shard in source.shards.values()]):
        more = f" and {len(left) - _NAMED_AT_MOST} more" if len(left) > _NAMED_AT_MOST else ""
        _log.warning(
            "%s: left out, because transformers reads no weights from there: %s%s",
            source.folder,
            ", ".join(left[:_NAMED_AT_MOST]),
            more,
        )
    for shard in tqdm(source.shards.values(), desc="copying the rest", unit="shard", disable=not progress):
        rest = [name for name in shard.header if name not in consumed]
        record = unfinished.carried(_rest_name(shard))
        if record.read() is not None:
            continue
        check_shard_finite(shard, filter(checked, shard.header))
        digest = None
        if rest and len(rest) == len(shard.header) and all(map(shard.is_stored, rest)):
            digest = copy_file(shard.path, record.file)
        elif rest:
            digest = write_subset(shard, rest, record.file)
        record.write(digest)
    for path in files_beside(source.folder):
        target = unfinished.checkpoint / path.relative_to(source.folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        copy_file(path, target)


def publish(
    source: Checkpoint,
    layers: Iterable[Record],
    parts: Iterable[tuple[str, ...]],
    unfinished: Unfinished,
    target: Path,
) -> None:
    """Index and config, from what is on disk: a resumed job has not seen the layers of its first run. Then the name.

    parts: of the config, from which classes with experts may be built

    Raises OSError naming the file if one does not hold what was written to it: what this makes is whole.
    """
    folder = unfinished.checkpoint
    for stray in folder.glob(".*"):  # parts of files, ours and safetensors', from when the job was killed
        stray.unlink()
    specs, digests = {}, {}
    for record in (*(unfinished.carried(_rest_name(shard)) for shard in source.shards.values()), *layers):
        described = record.read()
        if described is None:
            raise OSError(f"{record.file}: does not hold what was written to it; check the disk and run this again")
        if described["digest"] is not None:
            digests[record.file.name] = described["digest"]
        if "path" in described:
            specs[described["path"]] = {k: v for k, v in described.items() if k not in ("job", "digest", "path")}
    weight_map, total = {}, 0
    for file in sorted(digests):
        shard = read_shard(folder / file)
        weight_map.update(dict.fromkeys(shard.header, file))
        total += sum(stop - start for start, stop in (t["data_offsets"] for t in shard.header.values()))
    write_json({"metadata": {"total_size": total}, "weight_map": weight_map}, folder / INDEX)
    quantization = {
        "quant_method": QUANT_METHOD,
        "format_version": format_version_of(specs),
        **unfinished.job,
        "layers": specs,
        "digests": digests_of(specs, digests),
    }
    # The second key makes a load without this package fail, see hf_quantizer.
    config = copy.deepcopy(source.config)
    config.pop(NAMED, None)  # the index takes its place
    for part in [p for keys in parts if (p := part_of_json(config, keys)) is not None]:
        part.update(quantization_config=PART, experts_implementation=QUANT_METHOD)
    config.update(quantization_config=quantization, experts_implementation=QUANT_METHOD)
    write_json(config, folder / "config.json")
    for path in (*(p for p in folder.rglob("*") if p.is_dir()), folder):
        sync_folder(path)
    folder.rename(target)
    sync_folder(target.parent)
