"""Layers compressed at once: the bytes of the serial run, whatever is killed on the way."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import resmoe_kernels as rk
from resmoe_kernels.python_ops.jobs import workers
from resmoe_kernels.python_ops.jobs.workers import in_processes, on_ray
from resmoe_kernels.python_ops.models.identity import Identity
from resmoe_kernels.python_ops.solvers.svd import truncated_svd

pytestmark = pytest.mark.usefixtures("one_thread")


def tree(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests import families  # here, so that workers that import this file need not import transformers

    folder = tmp_path_factory.mktemp("model") / "dense"
    families.build("mixtral").save_pretrained(folder, max_shard_size="110KB")
    return folder


@pytest.fixture(scope="module")
def serial(model, tmp_path_factory) -> dict[str, str]:
    """The files that one process makes."""
    return tree(rk.compress(model, tmp_path_factory.mktemp("serial") / "out", progress=False))


# ---- what workers run; at the top of a module, so that pickle can name it


def killed_once(layer: Any) -> None:
    """The second layer's worker dies, once, as soon as the first layer's file is there."""
    from resmoe_kernels.python_ops.jobs.compress import _compress_layer

    killed = layer.record.file.parent.parent.parent / "killed"
    if layer.number == 1 and not killed.exists():
        while not layer.record.file.with_name("experts-00000.safetensors").is_file():
            time.sleep(0.01)
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    _compress_layer(layer)


def always_killed(_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def note_threads(path: Path) -> None:
    """Or, at the path of a file, fail."""
    if path.is_file():
        raise ValueError(f"{path.name}: its input is bad; bring another")
    path.write_text(str(torch.get_num_threads()))


def note_and_sleep(path: Path) -> None:
    path.write_text(str(os.getpid()))
    time.sleep(120)


# ---- processes of one machine


def test_a_killed_worker_and_the_same_call_again(model, serial, tmp_path, monkeypatch):
    monkeypatch.setattr("resmoe_kernels.python_ops.jobs.compress._compress_layer", killed_once)
    with pytest.raises(ChildProcessError, match=r"^workers: one was killed, .* run the same command again, with fewer"):
        rk.compress(model, tmp_path / "out", workers=2, progress=False)
    assert not (tmp_path / "out").exists()
    first = tmp_path / ".out.unfinished" / "checkpoint" / "experts-00000.safetensors"
    times = first.stat().st_mtime_ns
    monkeypatch.undo()
    rk.compress(model, tmp_path / "out", progress=False)
    assert (tmp_path / "out" / first.name).stat().st_mtime_ns == times
    assert tree(tmp_path / "out") == serial
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed", "out"]


@pytest.mark.parametrize(
    "settings", [{"method": "mc-smoe", "groups": 4}, {"method": "xmoe+resmoe", "experts_per_token": 1.5}], ids=str
)
def test_a_layer_as_it_reaches_a_worker(settings, repo, tmp_path, monkeypatch):
    """Its plan and statistics included, for methods that have them."""
    from resmoe_kernels.python_ops.jobs import compress as module

    settings |= {"calibration": repo / "examples" / "wikitext2-excerpt.txt", "calibration_tokens": 512}
    dense = repo / "examples" / "tiny-mixtral"
    expected = tree(rk.compress(dense, tmp_path / "one", layers="last:1", progress=False, **settings))
    compress_layer = module._compress_layer
    monkeypatch.setattr(module, "_compress_layer", lambda layer, *_: compress_layer(pickle.loads(pickle.dumps(layer))))
    assert tree(rk.compress(dense, tmp_path / "two", layers="last:1", progress=False, **settings)) == expected


def test_a_worker_that_sees_another_model(model, tmp_path, monkeypatch):
    """An OSError: what the other workers have done is kept."""
    from resmoe_kernels.python_ops.jobs import compress as module

    with pytest.raises(OSError, match=r"dense: is not the model that the job began with; every worker must see the"):
        module._opened(model, Identity("another", "", ()), False)
    with pytest.raises(OSError, match=r"absent: no such model folder .*; every worker must see the same model under"):
        module._opened(tmp_path / "absent", Identity("another", "", ()), False)


def test_threads_are_shared_out_and_errors_raised_as_they_are(tmp_path):
    torch.set_num_threads(4)
    paths, done = [tmp_path / str(i) for i in range(3)], []
    with pytest.raises(ValueError, match=r"^[012]: its input is bad; bring another$") as error:
        in_processes(note_threads, [*paths, *paths], 2, lambda: done.append(None))
    assert type(error.value) is ValueError
    assert [path.read_text() for path in paths] == ["2"] * 3
    assert len(done) in (2, 3)  # the last may end together with the one that fails


@pytest.mark.parametrize("shape", [(700, 320), (320, 700)], ids=str)
def test_bytes_do_not_depend_on_threads(shape, generator):
    """Those of torch's eigenvectors do, at this size with any two numbers of threads tried."""
    residual = torch.randn(shape, generator=generator)
    torch.set_num_threads(1)
    expected = truncated_svd(residual, 64)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(truncated_svd(residual, 64), expected, strict=True))
        assert torch.get_num_threads() == threads


def test_workers_end_with_a_killed_parent(tmp_path):
    """Else they would write into a folder whose lock is free."""
    code = (
        "from pathlib import Path\nfrom tests.jobs.test_workers import *\n"
        f"if __name__ == '__main__':\n    in_processes(note_and_sleep, [Path({str(tmp_path / 'pid')!r})], 1, print)"
    )
    (tmp_path / "main.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    parent = subprocess.Popen([sys.executable, str(tmp_path / "main.py")], env=environment)
    try:
        worker = int(_awaited(lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text()))
    finally:
        parent.kill()
        parent.wait()
    _awaited(lambda: not _runs(worker))


def _awaited(condition: Any) -> Any:
    for _ in range(6000):
        if value := condition():
            return value
        time.sleep(0.01)
    raise AssertionError("nothing came of it")


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---- refused before the work


@pytest.mark.parametrize(
    ("available", "advice"),
    [(20, "use at most 4 here"), (9, "use 1, which needs least, or more machines with engine='ray'")],
)
def test_not_enough_memory(available, advice, monkeypatch):
    monkeypatch.setattr(workers, "available_bytes", lambda: available << 30)
    workers.check_memory(available // 5, 5 << 30)
    message = f"workers: 6 need 30 GiB of memory, 5 GiB each, and {available} GiB are available; {advice}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        workers.check_memory(6, 5 << 30)


def test_not_enough_memory_is_said_before_the_work(model, tmp_path, monkeypatch):
    """Of 6 workers the two layers of the tiny model take two, which need little beyond two processes."""
    monkeypatch.setattr(workers, "available_bytes", lambda: 3 << 28)
    with pytest.raises(
        ValueError, match=r"^workers: 2 need 1 GiB of memory, 0\.5 GiB each, and 0\.75 GiB are available"
    ):
        rk.compress(model, tmp_path / "out", workers=6, progress=False)
    assert not list(tmp_path.iterdir())


def test_where_the_system_does_not_say(monkeypatch):
    monkeypatch.setattr(workers, "available_bytes", lambda: None)
    workers.check_memory(1000, 1 << 40)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": 0}, "workers: must be a whole number, at least 1, got 0"),
        ({"workers": 1.5}, r"workers: must be a whole number, at least 1, got 1\.5"),
        ({"workers": True}, "workers: must be a whole number, at least 1, got True"),
        ({"engine": "slurm"}, "engine: must be one of processes, ray, got 'slurm'"),
    ],
    ids=str,
)
def test_wrong_arguments(settings, message, model, tmp_path):
    with pytest.raises(ValueError, match=f"^{message}$"):
        rk.compress(model, tmp_path / "out", progress=False, **settings)


def test_no_ray(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r'^engine: ray is not installed; run: pip install "resmoe_kernels\[ray\]"$'):
        rk.compress(model, tmp_path / "out", engine="ray", progress=False)


def test_the_command_hands_both_on(monkeypatch, tmp_path):
    from typer.testing import CliRunner

    from resmoe_kernels.python_ops import cli

    given: dict[str, Any] = {}
    monkeypatch.setattr(
        "resmoe_kernels.python_ops.jobs.compress.compress", lambda *_, **settings: given.update(settings)
    )
    monkeypatch.setattr(cli, "inspect_checkpoint", lambda _: [])
    monkeypatch.setattr(cli, "_print_inspection", lambda _: None)
    result = CliRunner().invoke(cli.app, ["compress", "model", "out", "--workers", "3", "--engine", "ray"])
    assert result.exit_code == 0, result.output
    assert (given["workers"], given["engine"]) == (3, "ray")


# ---- a Ray cluster of this machine


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # else it writes a token into the home folder
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parents[2])}},
        )
        yield
        ray.shutdown()


def test_ray_does_the_layers_of_a_lost_worker_again(cluster, model, serial, tmp_path, monkeypatch):
    monkeypatch.setattr("resmoe_kernels.python_ops.jobs.compress._compress_layer", killed_once)
    rk.compress(model, tmp_path / "out", workers=2, engine="ray", progress=False)
    assert (tmp_path / "killed").is_file()
    assert tree(tmp_path / "out") == serial


def test_ray_shares_threads_out_and_hands_errors_on(cluster, tmp_path):
    paths, done = [tmp_path / str(i) for i in range(3)], []
    with pytest.raises(ValueError, match=r"^0: its input is bad; bring another$") as error:
        on_ray(note_threads, [*paths, *paths], 1, lambda: done.append(None), 1 << 20)
    assert type(error.value) is ValueError
    assert [path.read_text() for path in paths] == ["2"] * 3 and len(done) == 3


def test_ray_without_the_memory(cluster):
    with pytest.raises(
        ValueError, match=r"^engine: a layer needs 1\.05e\+06 GiB of memory, and Ray's largest machine of"
    ):
        on_ray(note_threads, [], 1, lambda: None, 1 << 50)


def test_ray_gives_up_where_every_worker_dies(cluster, monkeypatch):
    monkeypatch.setenv("RAY_TASK_MAX_RETRIES", "0")
    with pytest.raises(ChildProcessError, match=r"^workers: one was killed"):
        on_ray(always_killed, [3], 1, lambda: None, 1 << 20)
