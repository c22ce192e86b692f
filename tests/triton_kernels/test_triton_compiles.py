"""What the tests of the Triton kernels start on a GPU also compiles for one.

Under the interpreter a branch that no value reaches is never looked at; a compiler looks at all of them. A sample of
the specialisations is compiled in every run; RESMOE_COMPILE=all compiles every one (about 10 minutes of one core).
"""

from __future__ import annotations

import datetime
import os
import random

import pytest
import torch

pytest.importorskip("triton", reason="needs triton: pip install resmoe_kernels[gpu]")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted here, not compiled", allow_module_level=True)

from benchmarks.gpu import configurations
from resmoe_kernels.triton_kernels import experts as experts_triton
from resmoe_kernels.triton_kernels.launch import recorded
from tests.conftest import REPO
from tests.kernels.test_experts import FORMS

TARGET = "sm_90"
SAMPLE = 8
EVERYTHING = os.environ.get("RESMOE_COMPILE") == "all"
RANKLESS = {  # a matrix, or both, whose ranks sum to zero: c is not there, so u and v must not be either
    "no-ranks": {"group": [0] * 6, "ranks": [0] * 6},
    "no-ranks-in-gate-up": {"group": [0] * 6, "ranks": [8] * 6, "rankless": "gate_up"},
    "no-ranks-in-down": {"group": [0] * 6, "ranks": [8] * 6, "rankless": "down"},
}


@pytest.fixture
def found(make_layer, monkeypatch):
    """found(forms, dtypes, tokens): the configurations that calls of these layers start."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(REPO / "build" / "triton"))

    def launches_of(case: tuple, target: str) -> list:
        form, dtype, tokens = case
        settings = dict(FORMS[form] if form in FORMS else RANKLESS[form])
        rankless = settings.pop("rankless", None)
        layer = make_layer(**settings, dtype=dtype).to("meta")
        if rankless:
            tensors = layer.tensors()
            for part in ("u", "v"):
                tensors[f"{part}_{rankless}"] = tensors[f"{part}_{rankless}"][:0]
            layer = type(layer).from_tensors(tensors, **layer.sizes())
        x = torch.empty(tokens, layer.hidden_size, dtype=dtype, device="meta")
        index = torch.empty(tokens, 3, dtype=torch.int64, device="meta")
        weights = torch.empty(tokens, 3, dtype=dtype, device="meta")
        with recorded(target) as launched:
            experts_triton.experts(x, index, weights, layer)
        return launched

    def find(forms, dtypes, tokens) -> list[configurations.Configuration]:
        served = [
            form for form in forms if form in RANKLESS or experts_triton.declines(make_layer(**FORMS[form])) is None
        ]
        cases = [(form, dtype, count) for form in served for dtype in dtypes for count in tokens]
        return configurations.configurations(TARGET, cases, launches_of)

    return find


def compile_all(of: list[configurations.Configuration]) -> None:
    with configurations.pretending(TARGET):
        for configuration in of:
            assert configurations.warmup(configuration.launch) is not None, configuration.key


def test_a_matrix_without_ranks_compiles(found):
    compile_all(found(RANKLESS, [torch.bfloat16], [1] if not EVERYTHING else [1, 17, 70]))


def test_what_tests_start_compiles(found):
    """float32 products are unrolled and take minutes to compile, so that they are left to the whole run."""
    dtypes = [torch.bfloat16, torch.float16, torch.float32] if EVERYTHING else [torch.bfloat16]
    of = found(FORMS, dtypes, [1, 17, 70])
    if not EVERYTHING:
        day = datetime.date.today().toordinal()
        print(f"sample of day {day}")  # shown where it fails: the same sample again with this day
        of = random.Random(day).sample(of, SAMPLE)
    compile_all(of)
