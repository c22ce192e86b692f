"""Which files of a folder are the model: those transformers would read, by its own rules, and those beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
NAMED = "transformers_weights"  # a key of config.json: the file of weights, in place of the two above
ADAPTER = "adapter_config.json"
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
_INDEX_SUFFIX = ".index.json"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError naming the file if it holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must be a JSON object, got a {type(value).__name__}")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises ValueError if it is missing or not a JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{folder}: no config.json, so not a Hugging Face model folder"
            + (f"; it holds an adapter: {_MERGE}" if (folder / ADAPTER).is_file() else "")
        )
    return read_json(path)


_MERGE = "merge it into its model (in peft: merge_and_unload, then save_pretrained) and name that folder"


def refuse_adapter(folder: Path) -> None:
    """Raises ValueError where an adapter lies beside the model: from_pretrained would apply it to the dense weights."""
    if (folder / ADAPTER).is_file():
        raise ValueError(
            f"{folder / ADAPTER}: an adapter beside the model, which from_pretrained would apply; {_MERGE}, or move "
            "the adapter out of it"
        )


def weight_files(folder: Path, config: dict[str, Any]) -> tuple[list[Path], dict[str, str]]:
    """The files of weights that from_pretrained reads, and what their index promises: tensor -> file.

    The file that config.json names under ``transformers_weights``; else model.safetensors, and then no index is looked
    at; else those of the index. Raises ValueError where there are none, or none but pickles.
    """
    named = config.get(NAMED)
    if named is not None:
        if not _is_file_name(named) or not named.endswith((".safetensors", ".safetensors.index.json")):
            raise ValueError(
                f"{folder / 'config.json'}: {NAMED} must name a file of this folder ending in .safetensors or "
                f".safetensors.index.json, got {named!r}"
            )
        if named.endswith(".safetensors"):
            return [folder / named], {}
        return _of_index(folder / named)
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], {}
    if (folder / INDEX).is_file():
        return _of_index(folder / INDEX)
    pickles = sorted(p.name for s in ("*.bin", "*.pt", "*.pth") for p in folder.glob(s))
    if pickles:
        raise ValueError(f"{folder}: only pickle weights ({pickles[0]}); convert them to safetensors first")
    raise ValueError(f"{folder}: no {SINGLE} and no {INDEX}")


def _of_index(path: Path) -> tuple[list[Path], dict[str, str]]:
    if not path.is_file():
        raise ValueError(f"{path}: this index of the checkpoint, named in config.json, is missing")
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(_is_file_name(f) for f in weight_map.values()):
        raise ValueError(f"{path}: weight_map must name a file of this folder for every tensor")
    return [path.with_name(file) for file in sorted(set(weight_map.values()))], weight_map


def _is_file_name(value: Any) -> bool:
    return isinstance(value, str) and Path(value).name == value


def files_beside(folder: Path) -> list[Path]:
    """What a model folder holds beside weights, their indices and config.json: tokenizer, generation config, code.

    Hidden files hold a download's bookkeeping and are not among them. Raises ValueError for a link to something
    outside of the folder, which would be copied as if it belonged to the model; the hub's cache, a folder of links to
    the blobs of the same repository, is no such case.
    """
    found = []
    roots = [root.resolve() for root in (folder, _blobs(folder)) if root is not None]
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if any(part.startswith(".") for part in relative.parts) or _is_weights(path) or relative == Path("config.json"):
            continue
        if path.is_symlink() and not any(path.resolve().is_relative_to(root) for root in roots):
            raise ValueError(
                f"{path}: is a link to {path.resolve()}, outside of the model's folder; put the file itself there, or "
                "remove the link"
            )
        if path.is_file():
            found.append(path)
    return found


def _blobs(folder: Path) -> Path | None:
    """Where the hub's cache keeps the files of ``models--…/snapshots/<revision>``."""
    snapshots = folder.resolve().parent
    blobs = snapshots.parent / "blobs"
    return blobs if snapshots.name == "snapshots" and blobs.is_dir() else None


def weights_left_out(folder: Path, read: list[Path]) -> list[str]:
    """Files of weights below the folder, relative to it, that from_pretrained does not read."""
    return [
        path.relative_to(folder).as_posix()
        for path in sorted(folder.rglob("*"))
        if path.suffix in _WEIGHT_SUFFIXES
        and path not in read
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def _is_weights(path: Path) -> bool:
    return path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(_INDEX_SUFFIX)
