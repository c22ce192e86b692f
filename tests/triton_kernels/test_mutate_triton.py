"""The script that plants faults in the Triton kernels: up to date with them, and told apart from a sound kernel."""

from __future__ import annotations

import pytest

from tests.triton_kernels import mutate_triton
from tests.triton_kernels.mutate_triton import FAULTS, Fault

QUICK = ["tests/triton_kernels/test_triton_shapes.py::test_shape[triton-decode-interpreted-ones-torch.float32]"]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_has_its_place(fault):
    assert mutate_triton.planted(fault) != (mutate_triton.PACKAGE / fault.file).read_text()


def test_names_are_unique():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


def test_a_fault_is_caught(capsys):
    """For real, and the checkout keeps its kernels."""
    pytest.importorskip("triton")
    before = {file: file.read_text() for file in mutate_triton.PACKAGE.glob("triton_kernels/*.py")}
    assert mutate_triton.survivors([fault for fault in FAULTS if fault.name == "activation"], QUICK) == []
    assert (
        "activation (triton_kernels/tiles.py, " in (printed := capsys.readouterr().out)
        and "caught by test_shape" in printed
    )
    assert before == {file: file.read_text() for file in mutate_triton.PACKAGE.glob("triton_kernels/*.py")}


def test_a_fault_that_no_test_notices_survives(monkeypatch, capsys):
    monkeypatch.setattr(mutate_triton, "first_failure", lambda folder, tests: None)
    assert mutate_triton.survivors(FAULTS[:2], QUICK) == [fault.name for fault in FAULTS[:2]]
    assert capsys.readouterr().out.count("SURVIVED") == 2


@pytest.mark.parametrize("old", ["no such text", "tl"], ids=["none", "many"])
def test_a_place_that_has_changed_is_named(old):
    with pytest.raises(SystemExit, match=r"moved: triton_kernels/tiles.py has \d+ places like .*, not one; bring"):
        mutate_triton.planted(Fault("moved", "triton_kernels/tiles.py", old, ""))


def test_unknown_name():
    with pytest.raises(SystemExit, match="'x' is no fault; there are activation, "):
        mutate_triton.main(["x"])


def test_a_survivor_fails_the_run(monkeypatch, capsys):
    monkeypatch.setattr(mutate_triton, "survivors", lambda faults, tests: ["relaxed"])
    with pytest.raises(SystemExit, match="survived: relaxed"):
        mutate_triton.main([])
    assert f"{len(FAULTS) - 1} of {len(FAULTS)} faults caught" in capsys.readouterr().out


def test_tests_that_fail_without_a_fault_are_no_evidence(monkeypatch):
    monkeypatch.setattr(mutate_triton, "first_failure", lambda folder, tests: "test_shape")
    with pytest.raises(SystemExit, match="without any fault there is a failure: test_shape"):
        mutate_triton.survivors([], QUICK)
