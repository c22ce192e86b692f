"""The script that plants faults in the CUDA kernels: up to date with them, and told apart from a sound kernel."""

from __future__ import annotations

import pytest

from tests.cuda import emulated_cuda, mutate_cuda
from tests.cuda.mutate_cuda import FAULTS


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_has_its_place(fault):
    assert mutate_cuda.planted(fault) != (mutate_cuda.KERNELS / fault.file).read_text()


def test_names_are_unique():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


def test_every_file_of_the_kernels_has_faults_and_its_tests():
    files = {file.name for file in mutate_cuda.KERNELS.glob("*.cuh")}
    assert {fault.file for fault in FAULTS} == files
    tests = {fault.file: mutate_cuda.tests_of(fault) for fault in FAULTS}
    assert tests["low_rank_ring.cuh"] == ["low_rank_decode"]
    assert tests["block_sparse_walk.cuh"] == ["block_sparse_decode"]
    assert tests["routing.cuh"] == ["low_rank_decode", "block_sparse_decode"]


@pytest.mark.skipif(emulated_cuda.missing() is not None, reason=str(emulated_cuda.missing()))
def test_a_fault_is_caught(monkeypatch, capsys):
    """For real, and the checkout keeps its kernels."""
    monkeypatch.setattr(mutate_cuda, "TESTS", ("low_rank_decode",))  # without any fault: the shorter
    before = {file: file.read_text() for file in mutate_cuda.KERNELS.iterdir()}
    assert mutate_cuda.survivors([fault for fault in FAULTS if fault.name == "half-of-a"]) == []
    printed = capsys.readouterr().out
    assert "half-of-a (low_rank_decode.cuh, " in printed and "caught by low_rank_decode: " in printed
    assert before == {file: file.read_text() for file in mutate_cuda.KERNELS.iterdir()}


def test_sanitizers_come_after_the_tests_alone(monkeypatch, tmp_path):
    """And what one of them says is worth nothing where it says so of the kernels as they are."""
    fault = next(fault for fault in FAULTS if fault.file == "low_rank_ring.cuh")
    asked = []

    def failure_of(folder, test, sanitizer):
        asked.append((folder == tmp_path, test, sanitizer))
        return "a race" if sanitizer == "thread" and (folder == tmp_path or not sound) else None

    sound = True
    monkeypatch.setattr(mutate_cuda, "failure_of", failure_of)
    mutate_cuda.require_sound.cache_clear()
    assert mutate_cuda.first_failure(tmp_path, fault) == "a race"
    assert asked == [(planted, "low_rank_decode", s) for planted, s in ((1, ""), (1, "thread"), (0, "thread"))]
    mutate_cuda.require_sound.cache_clear()
    sound = False
    with pytest.raises(SystemExit, match="without any fault there is a failure: a race"):
        mutate_cuda.first_failure(tmp_path, fault)
