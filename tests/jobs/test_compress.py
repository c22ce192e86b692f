"""The offline job: killed anywhere it goes on to the same bytes, and nothing that looks finished is not."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

import resmoe_kernels as rk
from resmoe_kernels.python_ops.storage.model_files import INDEX, SINGLE
from tests import families

pytestmark = pytest.mark.usefixtures("one_thread")


def tree(folder: Path) -> dict[str, str]:
    """Every file and folder below ``folder`` with a digest of what it holds."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded checkpoint with files of every kind beside its weights. Not to be changed."""
    folder = tmp_path_factory.mktemp("model") / "dense"
    families.build("mixtral").save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    (folder / "tokenizer_config.json").write_text('{"a": 1}\n')
    (folder / "empty.txt").write_text("")
    (folder / "code").mkdir()
    (folder / "code" / "config.json").write_text("{}")
    return folder


@pytest.fixture
def small(tmp_path) -> Path:
    """Two shards, the experts of the second layer on both, and three files beside them."""
    folder = tmp_path / "model"
    families.build("mixtral").save_pretrained(folder, max_shard_size="110KB")
    assert len(list(folder.glob("*.safetensors"))) == 2
    (folder / "code").mkdir()
    (folder / "code" / "model.py").write_text("x = 1\n")
    return folder


@pytest.fixture
def model(mixtral, tmp_path) -> Path:
    """The same, to be changed."""
    return shutil.copytree(mixtral, tmp_path / "model")


# ---- killed


# Runs that kill themselves right before the k-th change to the file system below a folder, for every k until one
# lives. Audit events tell of changes whatever function makes them. One import serves all: each run is a fork.
KILLER = """
import filecmp, os, shutil, signal, sys
from pathlib import Path
import torch
import resmoe_kernels as rk
from resmoe_kernels.python_ops.jobs import compress as _  # so that no fork imports
import transformers, ot, scipy.optimize

good, bad, place = map(Path, sys.argv[1:4])
torch.set_num_threads(1)
os.fsync = lambda fd: sys.audit("fsync", fd)  # what is written outlives its process without, and this takes long

def changes(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        return isinstance(path, (str, Path)) and flags & (os.O_WRONLY | os.O_RDWR) and str(path).startswith(str(place))
    names = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")
    return event in names and any(str(a).startswith(str(place)) for a in arguments) or event in ("fsync", "halfway")

def run(k, model, fails=False, **settings):
    # A fork that compresses and is killed before change k. True if it was.
    child = os.fork()
    if child == 0:
        count = 0
        def hook(event, arguments):
            nonlocal count
            if changes(event, arguments):
                if count == k:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
        sys.addaudithook(hook)
        # Beside fsync, where a file is written and not yet under its name, one more place: a file half written.
        from resmoe_kernels.python_ops.storage import files
        files._COPY_CHUNK = 2000
        copy = files._copy
        def halving(source, out, length, digest):
            copy(source, out, length // 2, digest)
            out.flush()
            sys.audit("halfway")
            copy(source, out, length - length // 2, digest)
        files._copy = halving
        try:
            rk.compress(model, place / "out", progress=False, **settings)
        except ValueError:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == fails, status
    return os.WIFSIGNALED(status)
"""

KILLED_THEN_RUN_AGAIN = """
def same(a, b):
    names = sorted(p.relative_to(a) for p in a.rglob("*"))
    assert names == sorted(p.relative_to(b) for p in b.rglob("*")), (names, sorted(b.rglob("*")))
    for name in names:
        assert (a / name).is_dir() or filecmp.cmp(a / name, b / name, shallow=False), name

reference = rk.compress(good, place.with_name("reference"), progress=False)
k = kills = published = 0
while run(k, good):
    kills += 1
    if (place / "out").exists():
        published += 1
        same(reference, place / "out")  # whole from the moment it is there
    rk.compress(good, place / "out", progress=False)
    same(reference, place / "out")
    assert [p.name for p in place.iterdir()] == ["out"], list(place.iterdir())
    shutil.rmtree(place / "out")
    k += 1
same(reference, place / "out")
print(kills, published)
"""

KILLED_CLEANING_UP = """
shutil.rmtree(place / "out")

# The same where layers are measured first: at every third change, because each run is two.
by_error = {"budget": "error"}
reference = rk.compress(good, place.with_name("by_error"), progress=False, **by_error)
k = measured = 0
while run(k, good, **by_error):
    measured += 1
    rk.compress(good, place / "out", progress=False, **by_error)
    same(reference, place / "out")
    assert [p.name for p in place.iterdir()] == ["out"], list(place.iterdir())
    shutil.rmtree(place / "out")
    k += 3
shutil.rmtree(place / "out")
print(measured)

# The bad model fails at its last shard. Killed anywhere, then another job under the same name: it is refused while the
# first one's work is there, else its result is its own and holds nothing of the first.
layers = {"layers": "first:1"}
settings = {"residual": "sparse", **layers}
reference = rk.compress(good, place.with_name("sparse"), progress=False, **settings)
k = refused = made = 0
while run(k, bad, fails=True, **layers):
    assert not (place / "out").exists()
    try:
        rk.compress(good, place / "out", progress=False, **settings)
    except ValueError as error:
        assert "unfinished job with other settings" in str(error), error
        assert (place / ".out.unfinished" / "job.json").is_file()
        refused += 1
    else:
        same(reference, place / "out")
        made += 1
    shutil.rmtree(place)
    place.mkdir()
    k += 1
assert list(place.iterdir()) == []
print(refused, made)
"""


def test_killed_anywhere(small, tmp_path):
    """The same call then ends in the same bytes; and what a killed removal leaves never ends up in another job."""
    bad = shutil.copytree(small, tmp_path / "bad")
    shard = max(bad.glob("*.safetensors"))
    tensors = load_file(shard)
    tensors[max(tensors)].view(-1)[-1] = torch.nan
    save_file(tensors, shard, metadata={"format": "pt"})
    (tmp_path / "place").mkdir()
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            KILLER + KILLED_THEN_RUN_AGAIN + KILLED_CLEANING_UP,
            small,
            bad,
            tmp_path / "place",
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kills, published, measured, refused, made = (int(word) for word in done.stdout.split())
    assert 3 * measured > kills
    assert kills > 30  # two layers, a shard, an index and three files are begun, written and named
    assert published > 3  # killed after the last name, while the unfinished folder is removed
    assert refused > 10 and made > 3


def test_a_kill_leaves_nothing_that_loads(mixtral, tmp_path, monkeypatch):
    """What is there under another name until the end has no config.json before everything else is in place."""
    seen: list[set[str]] = []
    rename = Path.rename

    def watch(self, target):
        if target.name == "out":
            seen.append({p.name for p in self.iterdir()})
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watch)
    with pytest.raises(KeyboardInterrupt):
        rk.compress(mixtral, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    assert "config.json" in seen[0] and not any(name.endswith(".part") for name in seen[0])
    monkeypatch.undo()
    out = rk.compress(mixtral, tmp_path / "out", progress=False)
    assert {p.name for p in out.iterdir()} == seen[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_resumed_job_does_not_repeat_layers(mixtral, tmp_path, monkeypatch):
    from resmoe_kernels.python_ops.jobs import compress as module

    calls: list[str] = []
    work = module._write_layer

    def counted(made, path, *rest):
        if calls == ["model.layers.0.mlp.experts"]:
            calls.append("killed")
            raise KeyboardInterrupt
        calls.append(path)
        work(made, path, *rest)

    monkeypatch.setattr(module, "_write_layer", counted)
    with pytest.raises(KeyboardInterrupt):
        rk.compress(mixtral, tmp_path / "out", progress=False)
    rk.compress(mixtral, tmp_path / "out", progress=False)
    assert calls == ["model.layers.0.mlp.experts", "killed", "model.layers.1.mlp.experts"]


# ---- where every layer is measured before the first is compressed

MEASURED = {"budget": "error", "retain": 0.5, "progress": False}


@pytest.fixture(scope="session")
def by_error(mixtral, tmp_path_factory) -> dict[str, str]:
    """The files of a job in one process."""
    return tree(rk.compress(mixtral, tmp_path_factory.mktemp("error") / "out", **MEASURED))


def test_bytes_do_not_depend_on_workers(mixtral, by_error, tmp_path):
    assert tree(rk.compress(mixtral, tmp_path / "out", workers=2, **MEASURED)) == by_error
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_killed_while_measuring_and_after(mixtral, by_error, tmp_path, monkeypatch):
    """No layer is measured or aligned again."""
    from resmoe_kernels.python_ops.jobs import compress as module
    from resmoe_kernels.python_ops.methods import resmoe

    done: list[str] = []
    write, work, align = module.write_sealed, module._write_layer, resmoe.barycenter

    def once(name, function, key):
        def call(*arguments, **given):
            what = f"{name} {key(arguments)}"
            if what.endswith("1") and "killed " + name not in done:
                done.append("killed " + name)
                raise KeyboardInterrupt
            done.append(what)
            return function(*arguments, **given)

        return call

    monkeypatch.setattr(module, "write_sealed", once("measure", write, lambda a: int(a[1].stem[-5:])))
    monkeypatch.setattr(module, "_write_layer", once("write", work, lambda a: int(a[2].file.stem[-5:])))
    monkeypatch.setattr(resmoe, "barycenter", once("align", align, lambda _: ""))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            rk.compress(mixtral, tmp_path / "out", **MEASURED)
    assert tree(rk.compress(mixtral, tmp_path / "out", **MEASURED)) == by_error
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    aligned = ["align "]
    first = [*aligned, "measure 0", *aligned, "killed measure"]
    assert done == [*first, *aligned, "measure 1", "write 0", "killed write", "write 1"]


def _cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _emptied(file: Path) -> None:
    file.write_bytes(b"")


def _flipped(file: Path) -> None:
    """One bit of the gains, which a header cannot tell of."""
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [_cut_short, _emptied, _flipped])
def test_a_damaged_measurement_is_done_again(damage, mixtral, by_error, tmp_path, monkeypatch):
    from resmoe_kernels.python_ops.jobs import compress as module

    with monkeypatch.context() as patched:
        patched.setattr(module, "_write_layer", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            rk.compress(mixtral, tmp_path / "out", **MEASURED)
    files = sorted((tmp_path / ".out.unfinished" / "measured").iterdir())
    assert [file.name for file in files] == ["experts-00000.safetensors", "experts-00001.safetensors"]
    damage(files[1])
    written, write = [], module.write_sealed

    def noted(tensors, file):
        written.append(file)
        write(tensors, file)

    monkeypatch.setattr(module, "write_sealed", noted)
    assert tree(rk.compress(mixtral, tmp_path / "out", **MEASURED)) == by_error
    assert written == files[1:]


def test_a_disk_that_loses_what_is_measured(mixtral, tmp_path, monkeypatch):
    """An OSError: the rest of the work is kept."""
    from resmoe_kernels.python_ops.jobs import compress as module

    write = module.write_sealed
    monkeypatch.setattr(module, "write_sealed", lambda tensors, file: (write(tensors, file), _cut_short(file)))
    with pytest.raises(OSError, match=r"measured/experts-00000\.safetensors: does not hold what was written to it; ch"):
        rk.compress(mixtral, tmp_path / "out", **MEASURED)
    assert (tmp_path / ".out.unfinished" / "job.json").is_file()


# ---- run again, and run at once


@pytest.fixture
def no_work(monkeypatch) -> Iterator[None]:
    def work(*_):
        raise AssertionError("a layer was compressed")

    monkeypatch.setattr("resmoe_kernels.python_ops.jobs.compress._write_layer", work)
    yield


def test_finished_and_run_again_does_nothing(mixtral, tmp_path, request):
    rk.compress(mixtral, tmp_path / "out", retain=0.5, progress=False)
    before, times = tree(tmp_path), {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    request.getfixturevalue("no_work")
    assert rk.compress(mixtral, tmp_path / "out", retain=0.5, progress=False) == tmp_path / "out"
    assert tree(tmp_path) == before
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == times


def test_defaults_given_are_the_same_job(mixtral, tmp_path, request):
    """The command line gives every setting, a call may give none."""
    rk.compress(mixtral, tmp_path / "out", progress=False)
    request.getfixturevalue("no_work")
    rk.compress(mixtral, tmp_path / "out", retain=0.25, residual="lowrank", solver="assignment", progress=False)


def test_a_second_process_is_refused(mixtral, tmp_path):
    unfinished = tmp_path / ".out.unfinished"
    unfinished.mkdir()
    with FileLock(unfinished / "lock"):
        before = tree(tmp_path)
        with pytest.raises(
            ValueError, match=r"\.out\.unfinished: another process is compressing into it; wait"
        ) as error:
            rk.compress(mixtral, tmp_path / "out", progress=False)
        assert "\n" not in str(error.value)
        assert tree(tmp_path) == before
    rk.compress(mixtral, tmp_path / "out", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_lock_is_held_while_working(mixtral, tmp_path, monkeypatch):
    """A second call from within the first, at its first layer and when the first is about to clean up."""
    from resmoe_kernels.python_ops.jobs import compress as module

    errors = []

    def second():
        with pytest.raises(ValueError, match="another process is compressing into it") as error:
            rk.compress(mixtral, tmp_path / "out", progress=False)
        errors.append(error)

    def before(function):
        def call(*arguments):
            second()
            return function(*arguments)

        return call

    monkeypatch.setattr(module, "publish", before(module.publish))
    monkeypatch.setattr(module.Unfinished, "remove", before(module.Unfinished.remove))
    rk.compress(mixtral, tmp_path / "out", progress=False)
    assert len(errors) == 2


def test_a_faster_process_finished_meanwhile(mixtral, tmp_path, monkeypatch, request):
    """Between the look for a finished result and the lock, another process may make it."""
    from resmoe_kernels.python_ops.jobs import compress as module

    build = module.build_on_meta

    def slow(*arguments):
        monkeypatch.setattr(module, "build_on_meta", build)
        rk.compress(mixtral, tmp_path / "out", progress=False)
        request.getfixturevalue("no_work")
        return build(*arguments)

    monkeypatch.setattr(module, "build_on_meta", slow)
    rk.compress(mixtral, tmp_path / "out", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# ---- what is carried over


def test_everything_else_is_carried_over(mixtral, tmp_path):
    out = rk.compress(mixtral, tmp_path / "out", layers="first:1", progress=False)
    made = {"config.json", INDEX, "experts-00000.safetensors"}
    before, after = tree(mixtral), tree(out)
    same = {name for name in before if after.get(name) == before[name]}
    assert {
        "generation_config.json",
        "tokenizer_config.json",
        "empty.txt",
        "code",
        "code/config.json",
    } <= same
    dense_weights = json.loads((mixtral / INDEX).read_text())["weight_map"]
    mixed = {file for name, file in dense_weights.items() if name.startswith("model.layers.0.block_sparse_moe.experts")}
    assert {name for name in before if name.endswith(".safetensors")} - mixed <= same
    assert after.keys() <= before.keys() | made

    weights = json.loads((out / INDEX).read_text())
    tensors = {name: load_file(out / file)[name] for name, file in weights["weight_map"].items()}
    assert weights["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    kept = {name for name in dense_weights if not name.startswith("model.layers.0.block_sparse_moe.experts")}
    assert kept == {name for name in tensors if not name.startswith("model.layers.0.mlp.experts.")}
    for name in kept:
        assert torch.equal(tensors[name], load_file(mixtral / dense_weights[name])[name]), name
    on_disk = {name for file in out.glob("*.safetensors") for name in load_file(file)}
    assert on_disk == weights["weight_map"].keys()


def test_what_is_left_behind(model, tmp_path):
    """Weights of other kinds, and hidden files, which hold a download's bookkeeping."""
    for name in ("pytorch_model.bin", ".gitattributes", "original.pth", "model.gguf", "config.json.part"):
        (model / name).write_bytes(b"x")
    (model / ".cache").mkdir()
    (model / ".cache" / "note.json").write_text("{}")
    out = rk.compress(model, tmp_path / "out", progress=False)
    names = {path.relative_to(out).as_posix() for path in out.rglob("*")}
    assert "config.json.part" in names  # someone's file, however named
    assert not {n for n in names if n.endswith((".bin", ".pth", ".gguf")) or n.startswith(".")}


def test_links_become_files(model, tmp_path):
    """The hub's cache is a folder of links to blobs of the same repository."""
    blobs = tmp_path / "models--a" / "blobs"
    blobs.mkdir(parents=True)
    (blobs.parent / "snapshots").mkdir()
    model = model.rename(blobs.parent / "snapshots" / "0123")
    for path in [p for p in model.iterdir() if p.is_file()]:
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)
    out = rk.compress(model, tmp_path / "out", progress=False)
    assert not any(path.is_symlink() for path in out.rglob("*"))
    shutil.rmtree(blobs)
    families.build("mixtral").from_pretrained(out)


def test_out_through_a_link(mixtral, tmp_path):
    """The work is done on the disk that the link leads to."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    assert rk.compress(mixtral, tmp_path / "link", progress=False) == tmp_path / "link"
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "out" / "config.json").is_file()


def test_out_in_the_current_folder(mixtral, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert rk.compress(str(mixtral), "out", progress=False) == Path("out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("all", [0, 1]), ("first:1", [0]), ("last:1", [1]), ("1", [1]), ("0-1", [0, 1]), ("1,0", [0, 1])],
)
def test_layers(layers, expected, mixtral, tmp_path):
    out = rk.compress(mixtral, tmp_path / "out", layers=layers, progress=False)
    stored = json.loads((out / "config.json").read_text())["quantization_config"]
    assert list(stored["layers"]) == [f"model.layers.{i}.mlp.experts" for i in expected]
    assert stored["settings"]["layers"] == layers
    assert len(list(out.glob("experts-*"))) == len(expected)


SETTINGS = [
    {"factorization": "stacked"},
    {"factorization": "separate"},
    {"factorization": "joint"},
    {"residual": "sparse"},
    {"residual": "sparse", "sparse_layout": "bitmap"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(s.values()))
def test_nbytes_are_those_on_disk_and_the_result_loads(settings, mixtral, tmp_path):
    out = rk.compress(mixtral, tmp_path / "out", **settings, progress=False)
    for i, spec in enumerate(json.loads((out / "config.json").read_text())["quantization_config"]["layers"].values()):
        tensors = load_file(out / f"experts-{i:05d}.safetensors")
        assert spec["report"]["bytes_now"] == sum(t.numel() * t.element_size() for t in tensors.values())
        assert spec["report"]["bytes_dense"] == 4 * 3 * 32 * 48 * 4
        assert {n.rpartition(".")[2]: list(t.shape) for n, t in tensors.items()} == {
            name: tensor["shape"] for name, tensor in spec["tensors"].items()
        }
    dense, loaded = families.build("mixtral"), families.build("mixtral").from_pretrained(out)
    difference = families.logits(loaded) - families.logits(dense)
    assert 0 < difference.norm() < families.logits(dense).norm()


def test_a_checkpoint_of_one_file_becomes_an_indexed_one(tmp_path):
    """transformers would take a file of the single-file name for the whole model."""
    families.build("mixtral").save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / SINGLE).is_file()
    out = rk.compress(tmp_path / "model", tmp_path / "out", progress=False)
    assert sorted(p.name for p in out.glob("*.safetensors")) == [
        "experts-00000.safetensors",
        "experts-00001.safetensors",
        "model-00001-of-00001.safetensors",
    ]


def test_files_have_the_mode_of_files(mixtral, tmp_path):
    out = rk.compress(mixtral, tmp_path / "out", progress=False)
    (tmp_path / "plain").touch()
    assert {path.stat().st_mode for path in out.iterdir() if path.is_file()} == {(tmp_path / "plain").stat().st_mode}


def test_what_a_killed_writer_left_is_not_kept(mixtral, tmp_path, monkeypatch):
    """safetensors writes to a hidden file of its own beside the one asked for."""
    with monkeypatch.context() as patched:
        patched.setattr("resmoe_kernels.python_ops.jobs.compress.publish", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            rk.compress(mixtral, tmp_path / "out", progress=False)
    (tmp_path / ".out.unfinished" / "checkpoint" / ".tmpAbC123").write_bytes(b"half a shard")
    out = rk.compress(mixtral, tmp_path / "out", progress=False)
    assert not list(out.glob(".*"))


def test_bad_weights_beside_the_experts_are_found_before_the_work(model, tmp_path, monkeypatch):
    shard = next(p for p in sorted(model.glob("*.safetensors")) if "model.norm.weight" in load_file(p))
    tensors = load_file(shard)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, shard, metadata={"format": "pt"})
    monkeypatch.setattr("resmoe_kernels.python_ops.jobs.compress._write_layer", _interrupt)
    with pytest.raises(ValueError, match=r"model\.norm\.weight: all weights must be finite"):
        rk.compress(model, tmp_path / "out", progress=False)


def _interrupt(*_):
    raise KeyboardInterrupt


# ---- what is in the way


def test_the_current_folder_cannot_be_replaced(mixtral, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match=r"here: is the current folder or a mount, which cannot be replaced; choose"):
        rk.compress(mixtral, ".", progress=False)


def test_a_shard_of_the_name_of_a_file_to_be_written(model, tmp_path):
    index = json.loads((model / INDEX).read_text())
    shard = sorted(set(index["weight_map"].values()))[0]
    (model / shard).rename(model / "experts-00001.safetensors")
    index["weight_map"] = {
        name: "experts-00001.safetensors" if file == shard else file for name, file in index["weight_map"].items()
    }
    (model / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"experts-00001\.safetensors: has the name of a file to be written; rename"):
        rk.compress(model, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.unfinished").exists()


def test_someone_elses_folder_of_the_name_of_the_unfinished_one(mixtral, tmp_path):
    (tmp_path / ".out.unfinished").mkdir()
    (tmp_path / ".out.unfinished" / "thesis.tex").write_text("years")
    before = tree(tmp_path)
    with pytest.raises(
        ValueError, match=r"\.out\.unfinished: the work is done there, and it holds something else; move"
    ):
        rk.compress(mixtral, tmp_path / "out", progress=False)
    assert tree(tmp_path) == before


def test_an_unfinished_job_with_other_settings(mixtral, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "resmoe_kernels.python_ops.jobs.compress.publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        rk.compress(mixtral, tmp_path / "out", progress=False)
    monkeypatch.undo()
    before = tree(tmp_path)
    with pytest.raises(
        ValueError, match=r"unfinished: holds an unfinished job with other settings or another model; run"
    ):
        rk.compress(mixtral, tmp_path / "out", retain=0.5, progress=False)
    assert {**tree(tmp_path), ".out.unfinished/lock": ""} == {**before, ".out.unfinished/lock": ""}
    rk.compress(mixtral, tmp_path / "out", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_is_no_obstacle(mixtral, tmp_path):
    (tmp_path / "out").mkdir()
    rk.compress(mixtral, tmp_path / "out", progress=False)
    assert (tmp_path / "out" / "config.json").is_file()


def test_bad_weights_are_found_in_layers_left_dense(mixtral, model, tmp_path):
    weight_map = json.loads((model / INDEX).read_text())["weight_map"]
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    tensors = load_file(model / weight_map[name])
    tensors[name][3, 4] = torch.nan
    save_file(tensors, model / weight_map[name], metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"^{name}: all weights must be finite, got nan at \(3, 4\)$"):
        rk.compress(model, tmp_path / "out", layers="first:1", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_buffers_may_hold_infinity(tmp_path):
    """Clip limits and masks do; they are carried over, and parameters that hold it are still refused."""
    model = families.build("deepseek_v3")
    limits = model.model.layers[1].mlp.gate.e_score_correction_bias
    limits[0] = -torch.inf
    model.save_pretrained(tmp_path / "dense")
    out = rk.compress(tmp_path / "dense", tmp_path / "out", progress=False)
    loaded = type(model).from_pretrained(out)
    assert torch.equal(loaded.model.layers[1].mlp.gate.e_score_correction_bias, limits)
