"""What ``resmoe env`` prints."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from types import SimpleNamespace

import torch

import resmoe_kernels
from resmoe_kernels import dispatch
from resmoe_kernels.python_ops.tools import environment
from resmoe_kernels.python_ops.tools.environment import aligned


def rows() -> dict[str, str]:
    found = environment.environment()
    assert len(dict(found)) == len(found)
    return dict(found)


def test_versions_and_what_was_built():
    found = rows()
    assert found["resmoe_kernels"].startswith(f"{resmoe_kernels.__version__} in /")
    assert found["built"] == torch.ops.resmoe.build_info()
    assert found["CPU kernels in use"] == torch.ops.resmoe.cpu_isa()
    assert found["torch"].startswith(f"{torch.__version__}, ")
    assert found["transformers"] == version("transformers")


def test_every_backend_and_why_one_is_missing(monkeypatch):
    found = {name.removeprefix("backend "): how for name, how in rows().items() if name.startswith("backend ")}
    assert {name for name, how in found.items() if how == "there"} == set(resmoe_kernels.backends())
    monkeypatch.setattr(dispatch, "missing", lambda name: f"no {name} today")
    found = rows()
    assert found["backend cpu"] == "no cpu today" and found["backend reference"] == "there"
    assert found["built"] == "nothing: no cpu today" and found["CPU kernels in use"] == "none"


def test_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert rows()["GPUs"] == "none, torch finds no GPU and its driver"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda gpu: SimpleNamespace(name=f"NVIDIA {gpu}", major=9, minor=gpu, total_memory=79 * 2**30),
    )
    found = rows()
    assert found["GPU 0"] == "NVIDIA 0, sm_90, 79 GiB" and found["GPU 1"] == "NVIDIA 1, sm_91, 79 GiB"


def test_a_package_that_is_not_there(monkeypatch):
    def missing(package: str) -> str:
        raise environment.PackageNotFoundError(package)

    monkeypatch.setattr(environment, "version", missing)
    assert rows()["triton"] == "not installed"


def test_columns_are_aligned():
    assert aligned([("a", "1"), ("long", "2 3")]) == "a     1\nlong  2 3"


def test_the_command_prints_it():
    done = subprocess.run([sys.executable, "-m", "resmoe_kernels", "env"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == aligned(environment.environment()).splitlines()
