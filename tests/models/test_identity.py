"""Which model this is: every byte counts, what is known is not read again, and no place or time makes a difference."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from resmoe_kernels.python_ops.models.checkpoint import Checkpoint
from resmoe_kernels.python_ops.models.identity import identify, is_model
from resmoe_kernels.python_ops.storage import digests
from tests import families

SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture
def folder(tmp_path) -> Path:
    families.build("mixtral").save_pretrained(tmp_path / "model", max_shard_size="80KB")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    (tmp_path / "model" / "modeling.py").write_text("x = 1\n")
    return tmp_path / "model"


def model_of(folder: Path) -> str:
    return identify(Checkpoint(folder)).model


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def _config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 3.0}))


CHANGES: dict[str, Callable[[Path], object]] = {
    "a byte in the middle": lambda f: flip(f / SHARD, (f / SHARD).stat().st_size // 2),
    "the last byte": lambda f: flip(f / SHARD, -1),
    "a value of the config": _config,
    "a line of its code": lambda f: (f / "modeling.py").write_text("x = 2\n"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_byte_counts(change, folder):
    before, stats = model_of(folder), {p: p.stat() for p in folder.iterdir()}
    change(folder)
    for path, found in stats.items():
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert model_of(folder) != before


def test_what_makes_no_difference(folder, tmp_path):
    """Place, time, the layout of config.json, and the tokenizer, which is counted apart."""
    before = identify(Checkpoint(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(dict(reversed(config.items())), indent=7))
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    os.utime(other / SHARD, ns=(1, 1))
    (other / "tokenizer.json").write_text('{"a": 1}')
    after = identify(Checkpoint(other))
    assert after.model == before.model and after.beside != before.beside


def test_what_is_known_is_not_read_again(folder, monkeypatch):
    """While device, inode, size and both times are as they were. A time that is set back changes the other."""
    monkeypatch.setattr(digests, "_SETTLED", -(10**18))  # files that were written just now
    read: list[int] = []
    digest = digests.Digest

    class Counted(digest):
        def update(self, piece):
            read.append(len(piece))
            super().update(piece)

    monkeypatch.setattr(digests, "Digest", Counted)
    before = model_of(folder)
    assert sum(read) > sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    read.clear()
    assert model_of(folder) == before and not read
    found = (folder / SHARD).stat()
    flip(folder / SHARD, -1)
    os.utime(folder / SHARD, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert model_of(folder) != before and sum(read) == found.st_size


def test_a_file_written_just_now_is_read_again(folder):
    """Two writes within one time stamp look alike."""
    before = model_of(folder)
    flip(folder / SHARD, -1)
    assert model_of(folder) != before


def test_a_worker_reads_the_model_only_where_it_may_be_another(folder, tmp_path, monkeypatch):
    identity = identify(Checkpoint(folder))
    other = Checkpoint(shutil.copytree(folder, tmp_path / "other"))
    assert is_model(other, identity)
    flip(other.folder / SHARD, -1)
    assert not is_model(other, identity)
    monkeypatch.setattr("resmoe_kernels.python_ops.models.identity.file_digest", None)  # calling it would fail
    assert is_model(Checkpoint(folder), identity)


# ---- the files that transformers reads


def test_the_file_that_the_config_names(folder, tmp_path):
    """Beside one of the default name, which holds something else."""
    from transformers import AutoModelForCausalLM

    import resmoe_kernels as rk

    dense = families.build("mixtral")
    model = tmp_path / "named"
    dense.save_pretrained(model)
    (model / "model.safetensors").rename(model / "hf.safetensors")
    tensors = load_file(model / "hf.safetensors")
    save_file({n: t * 0 for n, t in tensors.items()}, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "transformers_weights": "hf.safetensors"}))
    out = rk.compress(model, tmp_path / "out", retain=1.0, progress=False)
    loaded = AutoModelForCausalLM.from_pretrained(out).eval()
    assert (families.logits(loaded) - families.logits(dense)).abs().max() < 1e-5
    for wrong in ("../hf.safetensors", "hf.bin", 3):
        (model / "config.json").write_text(json.dumps({**config, "transformers_weights": wrong}))
        with pytest.raises(ValueError, match="transformers_weights must name a file of this folder ending in"):
            Checkpoint(model)


def test_weights_that_nothing_reads_are_named(folder, tmp_path, caplog):
    import resmoe_kernels as rk

    save_file({"mtp.weight": torch.zeros(2)}, folder / "mtp.safetensors")
    out = rk.compress(folder, tmp_path / "out", progress=False)
    assert "left out, because transformers reads no weights from there: mtp.safetensors" in caplog.text
    assert not (out / "mtp.safetensors").exists()


def test_an_adapter_beside_the_model_is_refused(folder, tmp_path):
    import resmoe_kernels as rk
    from resmoe_kernels.python_ops.tools.diagnose import diagnose

    (folder / "adapter_config.json").write_text("{}")
    for call in (lambda: rk.compress(folder, tmp_path / "out", progress=False), lambda: diagnose(folder)):
        with pytest.raises(ValueError, match=r"adapter_config\.json: an adapter beside the model, which from_pret"):
            call()
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config\.json, .*; it holds an adapter: merge it into its model"):
        rk.compress(folder, tmp_path / "out", progress=False)


def test_a_tensor_in_two_shards(folder):
    """Counts by the order of files unless both are the same, bit by bit."""
    shards = sorted(folder.glob("*.safetensors"))
    tensors = load_file(shards[0])
    name = next(n for n in tensors if n not in load_file(shards[1]))
    save_file({**load_file(shards[1]), name: tensors[name]}, shards[1])
    Checkpoint(folder)
    save_file({**load_file(shards[1]), name: tensors[name] + 1}, shards[1])
    with pytest.raises(ValueError, match=rf"{name}: is in {shards[0].name} and in {shards[1].name}, with"):
        Checkpoint(folder)


@pytest.mark.parametrize("where", ["file", "folder"])
def test_a_link_to_something_outside_is_refused(where, folder, tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key.txt").write_text("secret")
    target = tmp_path / "secret" / "key.txt" if where == "file" else tmp_path / "secret"
    (folder / "notes").symlink_to(target)
    with pytest.raises(ValueError, match=r"notes: is a link to .*secret.*, outside of the model's folder; put the"):
        identify(Checkpoint(folder))
    (folder / "notes").unlink()
    (folder / "notes").symlink_to(folder / "tokenizer.json")
    identify(Checkpoint(folder))
