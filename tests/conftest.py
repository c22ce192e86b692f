"""Fixtures: every backend on its device, seeded randomness, sample layers, the data beside the checkout."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import resmoe_kernels
from resmoe_kernels.factored import FactoredExperts
from tests.random_layer import random_layer

REPO = Path(__file__).resolve().parents[1]
SHARED = REPO.parent / "shared"

GPU_TEST_SECONDS = 300  # of one test: three float32 kernels took 133 to 250 s to compile on a loaded machine

# TRITON_INTERPRET=1: this process runs the Triton kernels on the CPU, and nothing else; see make interpret.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = [] if INTERPRETED else ["triton_kernels/test_triton_interpreter.py"]
if INTERPRETED:
    from tests.triton_kernels import interpreter

    interpreter.repair()
    torch.use_deterministic_algorithms(True)  # only so that torch.empty comes filled with NaN or the largest integer


def _runs_in_this_process(item: pytest.Item) -> bool:
    marked = item.get_closest_marker("interpreter") is not None
    if not INTERPRETED:
        return not marked
    uses_kernels = not {"backend", "on_triton"}.isdisjoint(item.fixturenames)
    return marked or (uses_kernels and not item.get_closest_marker("gpu"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = [item for item in items if _runs_in_this_process(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(here)])
    items[:] = here
    if torch.cuda.is_available():
        _limit_gpu_tests(config, items)
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch finds none"))


def _limit_gpu_tests(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Kernels that wait for each other can hang, and no signal ends that: the process does, from another thread."""
    of_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if of_gpu and not config.pluginmanager.hasplugin("timeout"):
        raise pytest.UsageError("tests on a GPU need pytest-timeout, as a kernel may hang: pip install pytest-timeout")
    for item in of_gpu:
        item.add_marker(pytest.mark.timeout(GPU_TEST_SECONDS, method="thread"))


@pytest.fixture(scope="session")
def repo() -> Path:
    return REPO


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """shared(name): a path of the data folder beside the checkout; skips where there is none, fails in CI."""

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            (pytest.fail if os.environ.get("CI") else pytest.skip)(
                f"needs {name} in a folder shared/ beside the checkout"
            )
        return path

    return find


class Backend(NamedTuple):
    name: str
    device: str
    prefill: bool = False  # few tokens, too, take the kernels for many


def _triton() -> Iterator:
    device, marks = ("cpu", ()) if INTERPRETED else ("cuda", pytest.mark.gpu)
    where = "interpreted" if INTERPRETED else "on-cuda"
    yield pytest.param(Backend("triton", device), id=f"triton-decode-{where}", marks=marks)
    yield pytest.param(Backend("triton", device, prefill=True), id=f"triton-prefill-{where}", marks=marks)


def _backends() -> Iterator:
    """The default and every backend, where they run: later kernels get the same cases."""
    for name in () if INTERPRETED else ("auto", "reference", "cpu"):
        if name in ("auto", *resmoe_kernels.backends()):
            yield pytest.param(Backend(name, "cpu"), id=f"{name}-on-cpu")
        if name != "cpu":
            yield pytest.param(Backend(name, "cuda"), id=f"{name}-on-cuda", marks=pytest.mark.gpu)
    yield from _triton()


@contextmanager
def _running(backend: Backend) -> Iterator[Backend]:
    with pytest.MonkeyPatch.context() as patch, resmoe_kernels.backend(backend.name):
        if backend.prefill:
            patch.setattr("resmoe_kernels.triton_kernels.experts.decodes", lambda problem, target: False)
        yield backend


@pytest.fixture(params=_backends())
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    with _running(request.param) as running:
        yield running


@pytest.fixture(params=_triton())
def on_triton(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The Triton kernels alone: those for few tokens, and those for many."""
    with _running(request.param) as running:
        yield running


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For modules of tiny tensors, where threads only wait for each other: 7 s, not 56, on 2 busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20251206)


MakeLayer = Callable[..., FactoredExperts]


@pytest.fixture
def make_layer(generator: torch.Generator) -> MakeLayer:
    """make_layer(...): random_layer(generator, ...)"""
    return partial(random_layer, generator)
