"""Memory: what there is, in containers too, and what a job that needs more says before it begins."""

import os
import re
from pathlib import Path

import pytest
import torch

import resmoe_kernels as rk
from resmoe_kernels.factored import DenseExperts
from resmoe_kernels.python_ops.jobs import memory, workers
from resmoe_kernels.python_ops.methods.resmoe import peak_bytes

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-mixtral"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with 64 GiB available, and a container in it."""

    def write(limit, used=0, files=0):
        folder = tmp_path / "cgroups" / "a" / "b"
        folder.mkdir(parents=True)
        (tmp_path / "meminfo").write_text(f"MemTotal: {99 << 20} kB\nMemAvailable: {64 << 20} kB\n")
        (tmp_path / "cgroup").write_text("4:memory:/other\n0::/a/b\n")
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\nactive_file {files}\ninactive_file 0\n")
        monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
        monkeypatch.setattr(memory, "_CGROUP", tmp_path / "cgroup")
        monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "cgroups")
        return tmp_path

    return write


def test_the_memory_of_this_machine():
    available = memory.available_bytes()
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert available is not None and total / 100 < available <= total


def test_a_container_limits_it(machine):
    machine(10 << 30, used=7 << 30, files=2 << 30)
    assert memory.available_bytes() == 5 << 30


def test_a_container_without_a_limit_does_not(machine):
    machine("max")
    assert memory.available_bytes() == 64 << 30


def test_a_limit_beyond_what_there_is_does_not(machine):
    machine(100 << 30)
    assert memory.available_bytes() == 64 << 30


def test_without_cgroups_the_machine_counts(machine):
    (machine(1 << 30) / "cgroup").unlink()
    assert memory.available_bytes() == 64 << 30


def test_where_the_system_does_not_say(machine, monkeypatch):
    monkeypatch.setattr(memory, "_MEMINFO", machine(1 << 30) / "none")
    assert memory.available_bytes() is None


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({}, "free some, or use a machine with more, such as one of a cluster with engine='ray'"),
        ({"solver": "pot"}, "use solver='assignment', which needs less"),
    ],
)
def test_a_layer_that_does_not_fit_is_refused_before_the_work(tmp_path, monkeypatch, settings, advice):
    monkeypatch.setattr(workers, "available_bytes", lambda: 1 << 28)
    message = rf"^memory: a layer needs about 0\.5\d* GiB, and 0\.25 GiB are available; {re.escape(advice)}$"
    with pytest.raises(ValueError, match=message):
        rk.compress(EXAMPLE, tmp_path / "out", progress=False, **settings)
    assert not list(tmp_path.iterdir())


def test_more_retained_more_experts_and_pot_need_more():
    def experts(count):
        shape = {"gate_up": (count, 128, 32), "down": (count, 32, 64)}
        return DenseExperts(gated=True, **{n: torch.empty(s, device="meta") for n, s in shape.items()})

    def peak(count=8, solver="assignment", retain=0.25):
        return peak_bytes(experts(count), solver=solver, retain=retain, residual="lowrank")

    assert experts(8).nbytes() < peak() < peak(retain=0.3) < peak(solver="pot")
    assert peak(count=16) > 1.5 * peak()
