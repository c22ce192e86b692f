"""What survives: a loss of power at any moment, files that do not hold what was written, errors in the middle."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import resmoe_kernels as rk
from resmoe_kernels.python_ops.jobs import compress as module
from resmoe_kernels.python_ops.storage.model_files import INDEX
from tests import families

pytestmark = pytest.mark.usefixtures("one_thread")


def tree(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """Two shards, and a file in a folder beside them. Not to be changed."""
    folder = tmp_path_factory.mktemp("durable") / "dense"
    families.build("mixtral").save_pretrained(folder, max_shard_size="110KB")
    (folder / "code").mkdir()
    (folder / "code" / "model.py").write_text("x = 1\n")
    return folder


@pytest.fixture(scope="module")
def expected(dense, tmp_path_factory) -> dict[str, str]:
    return tree(rk.compress(dense, tmp_path_factory.mktemp("expected") / "out", progress=False))


# ---- power


class Disk:
    """What of a folder would be there after a loss of power: contents that were synced, under names that were.

    Follows renames and fsync through audit events and a patched os.fsync; a file is known by its inode.
    """

    def __init__(self, place: Path) -> None:
        self.place, self.contents, self.names = place, set(), set()
        self.renamed: list[tuple[Path, list[str]]] = []  # target -> what was not durable below it or beside it then
        self.active = True

    def synced(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_dir():
            self.names |= {(path, entry.name, entry.stat().st_ino) for entry in path.iterdir()}
        else:
            self.contents.add(path.stat().st_ino)

    def lost(self, folder: Path) -> list[str]:
        """What below the folder a loss of power would take."""
        return [
            path.relative_to(self.place).as_posix()
            for path in folder.rglob("*")
            if not path.name.startswith(".")
            and ((path.parent, path.name, path.stat().st_ino) not in self.names)
            | (path.is_file() and path.stat().st_ino not in self.contents)
        ]

    def on_event(self, event: str, arguments: tuple) -> None:
        if not self.active or event != "os.rename" or not str(arguments[1]).startswith(str(self.place)):
            return
        source, target = Path(os.fsdecode(arguments[0])), Path(os.fsdecode(arguments[1]))
        if source.is_dir():
            self.renamed.append((target, self.lost(source)))
        else:
            missing = [] if source.stat().st_ino in self.contents else [source.name]
            if target.parent.name == "records":  # of a file that must be there by then
                made = target.parent.parent / "checkpoint" / target.name.removesuffix(".json").removeprefix("carried-")
                durable = (made.parent, made.name, made.stat().st_ino) in self.names and (
                    made.stat().st_ino in self.contents
                )
                missing += [] if durable else [made.name]
            self.renamed.append((target, missing))


def test_everything_is_on_the_disk_before_what_refers_to_it(dense, tmp_path, monkeypatch):
    """Every file before its name, every file before its record, and all of OUT before OUT."""
    disk, fsync = Disk(tmp_path), os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (fsync(descriptor), disk.synced(descriptor)))
    sys.addaudithook(disk.on_event)
    try:
        out = rk.compress(dense, tmp_path / "out", progress=False)
    finally:
        disk.active = False
    assert not [r for r in disk.renamed if r[1]], disk.renamed
    targets = [target.name for target, _ in disk.renamed]
    assert {"config.json", INDEX, "experts-00000.safetensors", "experts-00000.safetensors.json", "out"} <= set(targets)
    assert (tmp_path, "out", out.stat().st_ino) in disk.names  # and then the name of OUT


# ---- work that cannot be read


def _interrupt(*_):
    raise KeyboardInterrupt


@pytest.fixture
def unfinished(dense, tmp_path, monkeypatch) -> Path:
    """All layers done, not yet published."""
    with monkeypatch.context() as patched:
        patched.setattr(module, "publish", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            rk.compress(dense, tmp_path / "out", progress=False)
    return tmp_path / ".out.unfinished"


@pytest.fixture
def written(monkeypatch) -> Iterator[list[str]]:
    """Paths of the layers that are compressed from now on."""
    made, write = [], module._write_layer
    monkeypatch.setattr(module, "_write_layer", lambda *given: (made.append(given[1]), write(*given)))
    yield made


def _cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def _emptied(file: Path) -> None:
    file.write_bytes(b"")


def _flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _lost(file: Path) -> None:
    file.unlink()


SECOND = "model.layers.1.mlp.experts"


@pytest.mark.parametrize("damage", [_cut_short, _emptied, _flipped, _lost])
@pytest.mark.parametrize(
    ("file", "again"),
    [
        ("checkpoint/experts-00001.safetensors", [SECOND]),
        ("records/experts-00001.safetensors.json", [SECOND]),
        ("checkpoint/model-00002-of-00002.safetensors", []),
        ("records/carried-model-00002-of-00002.safetensors.json", []),
    ],
)
def test_what_does_not_hold_what_was_written_is_made_again(
    damage, file, again, unfinished, dense, expected, written, tmp_path, caplog
):
    """To the same bytes; what is sound is used; and the file is named, but where it is gone without a trace."""
    damage(unfinished / file)
    with caplog.at_level(logging.WARNING, "resmoe_kernels"):
        rk.compress(dense, tmp_path / "out", progress=False)
    assert tree(tmp_path / "out") == expected and written == again
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (Path(file).name in caplog.text) is not (damage is _lost and file.startswith("records"))


@pytest.mark.parametrize("damage", [_cut_short, _emptied])
def test_a_job_that_cannot_be_read(damage, unfinished, dense, expected, written, tmp_path, caplog):
    """The records name their job, so that nothing is lost; work of another job is never taken for this one's."""
    damage(unfinished / "job.json")
    before = tree(unfinished)
    with pytest.raises(ValueError, match=r"holds an unfinished job with other settings or another model"):
        rk.compress(dense, tmp_path / "out", retain=0.5, progress=False)
    assert tree(unfinished) == before
    with caplog.at_level(logging.WARNING, "resmoe_kernels"):
        rk.compress(dense, tmp_path / "out", progress=False)
    assert tree(tmp_path / "out") == expected and written == []
    assert "job.json: not valid JSON" in caplog.text


def test_nothing_is_published_that_does_not_hold_what_was_written(dense, expected, tmp_path, monkeypatch, written):
    """A file that changes between its last layer and the end: an OSError, with the rest kept."""
    publish = module.publish

    def later(source, layers, parts, unfinished, target):
        _flipped(unfinished.checkpoint / "experts-00000.safetensors")
        publish(source, layers, parts, unfinished, target)

    with monkeypatch.context() as patched:
        patched.setattr(module, "publish", later)
        with pytest.raises(OSError, match=r"experts-00000\.safetensors: does not hold what was written to it; check"):
            rk.compress(dense, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    written.clear()
    rk.compress(dense, tmp_path / "out", progress=False)
    assert tree(tmp_path / "out") == expected and written == ["model.layers.0.mlp.experts"]


# ---- errors


def test_an_error_of_our_own_keeps_the_finished_layers(dense, expected, tmp_path, monkeypatch, caplog, written):
    """A ValueError in the middle, whatever it is about: only work that has not begun is cleaned up after."""
    write = module._write_layer

    def fails(made, path, *rest):
        if path == SECOND:
            raise ValueError("something that is not about the input")
        write(made, path, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(module, "_write_layer", fails)
        with pytest.raises(ValueError, match="something that is not about"):
            rk.compress(dense, tmp_path / "out", progress=False)
    assert ".out.unfinished: keeps what is finished; the same call goes on from there" in caplog.text
    written.clear()
    rk.compress(dense, tmp_path / "out", progress=False)
    assert tree(tmp_path / "out") == expected and written == [SECOND]


def test_a_name_that_is_not_utf8_is_refused_before_the_work(dense, tmp_path, written):
    with pytest.raises(ValueError, match=r"'a\\udcff': the path of the folder to make must be UTF-8; choose another"):
        rk.compress(dense, tmp_path / os.fsdecode(b"a\xff"), progress=False)
    assert written == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [_cut_short, _flipped, _lost])
def test_a_damaged_result_is_not_taken_for_a_finished_one(damage, dense, tmp_path):
    out = rk.compress(dense, tmp_path / "out", progress=False)
    damage(out / "experts-00001.safetensors")
    with pytest.raises(ValueError, match=r"experts-00001\.safetensors: (does not hold|belongs to this)"):
        rk.compress(dense, out, progress=False)


def test_a_result_of_before_digests_is_told_apart(dense, tmp_path):
    out = rk.compress(dense, tmp_path / "out", progress=False)
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]["digests"]
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not say what its files hold"):
        rk.compress(dense, out, progress=False)
    families.build("mixtral").from_pretrained(out)  # it loads as ever


# ---- the source, changed in place


@pytest.fixture
def tuned(dense, tmp_path) -> Path:
    """A copy to be changed: same names, shapes, sizes and times."""
    return Path(shutil.copytree(dense, tmp_path / "model"))


def _tune(folder: Path) -> None:
    """One weight in the middle of a shard, and the time as it was: what an rsync --times of a fine-tuned model looks
    like."""
    shard = folder / "model-00001-of-00002.safetensors"
    times = shard.stat()
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_result_of_the_model_before_it_was_tuned_is_refused(tuned, tmp_path):
    out = rk.compress(tuned, tmp_path / "out", progress=False)
    _tune(tuned)
    with pytest.raises(ValueError, match="out: holds a factored checkpoint of another model; choose another folder"):
        rk.compress(tuned, out, progress=False)


def test_a_half_done_job_of_the_model_before_it_was_tuned_is_refused(tuned, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(module, "publish", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            rk.compress(tuned, tmp_path / "out", progress=False)
    _tune(tuned)
    with pytest.raises(ValueError, match="holds an unfinished job with other settings or another model"):
        rk.compress(tuned, tmp_path / "out", progress=False)


def test_a_result_with_the_tokenizer_of_before_is_refused(tuned, tmp_path):
    out = rk.compress(tuned, tmp_path / "out", progress=False)
    (tuned / "tokenizer_config.json").write_text('{"a": 2}')
    with pytest.raises(ValueError, match="out: holds a factored checkpoint of this model with another tokenizer or"):
        rk.compress(tuned, out, progress=False)
