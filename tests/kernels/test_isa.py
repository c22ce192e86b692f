"""Every instruction set of this CPU, forced through RESMOE_CPU_ISA, and what happens where it is not there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import resmoe_kernels as rk
from resmoe_kernels.dispatch import explain
from resmoe_kernels.packed import PackedExperts

pytestmark = pytest.mark.usefixtures("one_thread")

ISAS = ["portable", "avx2", "avx512", "avx512_bf16", "amx"]  # each contains the ones before it
CALL = (torch.ones(2, 45), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))


@pytest.fixture
def packed(make_layer) -> PackedExperts:
    return PackedExperts.pack(make_layer(group=[0] * 6, ranks=[4] * 6))


def supported(isa: str, packed: PackedExperts, monkeypatch) -> bool:
    """As the machine itself says: the fastest one is what runs unasked."""
    monkeypatch.delenv("RESMOE_CPU_ISA", raising=False)
    (fastest,) = re.findall(r"cpu \((\w+)\)", explain(packed))
    return ISAS.index(isa) <= ISAS.index(fastest)


@pytest.mark.parametrize("isa", ISAS)
def test_forced_it_serves_every_form_dtype_and_routing(isa, packed, monkeypatch):
    """The cases of test_experts.py for the CPU kernels, in a process where one instruction set is forced.

    The fastest is not: it is what test_experts.py runs by itself.
    """
    if not supported(isa, packed, monkeypatch):
        pytest.skip(f"this CPU has no {isa}")
    if isa == ISAS[-1] or not supported(ISAS[ISAS.index(isa) + 1], packed, monkeypatch):
        pytest.skip(f"{isa} is what test_experts.py runs unasked")
    tests = Path(__file__).parent / "test_experts.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    environment = {**os.environ, "RESMOE_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    chosen = ["-k", "cpu-on-cpu and not auto and not grad"]
    run = subprocess.run(
        [*command, *chosen], cwd=Path(__file__).parents[2], capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert int(re.findall(r"(\d+) passed", run.stdout)[0]) > 100, run.stdout[-3000:]


@pytest.mark.parametrize("isa", ISAS)
def test_it_is_the_one_that_runs(isa, packed, monkeypatch):
    if not supported(isa, packed, monkeypatch):
        pytest.skip(f"this CPU has no {isa}")
    monkeypatch.setenv("RESMOE_CPU_ISA", isa)
    assert explain(packed) == f"resmoe::experts on cpu: cpu ({isa})"


@pytest.mark.parametrize("wanted", ["avx9", "AVX2", " avx2", *ISAS])
def test_what_is_not_there_is_refused_and_never_replaced(wanted, packed, monkeypatch):
    if wanted in ISAS and supported(wanted, packed, monkeypatch):
        pytest.skip(f"this CPU has {wanted}")
    here = ", ".join(isa for isa in ISAS if supported(isa, packed, monkeypatch))
    monkeypatch.setenv("RESMOE_CPU_ISA", wanted)
    sentence = (
        f"RESMOE_CPU_ISA: must be one of the instruction sets of this CPU ({here}), got '{wanted}'; "
        "unset it to use the fastest"
    )
    for call in (lambda: rk.experts(*CALL, packed), lambda: explain(packed)):
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
            call()
    with rk.backend("reference"):
        rk.experts(*CALL, packed)


def test_an_empty_name_is_none(packed, monkeypatch):
    monkeypatch.delenv("RESMOE_CPU_ISA", raising=False)
    fastest = explain(packed)
    monkeypatch.setenv("RESMOE_CPU_ISA", "")
    assert explain(packed) == fastest
