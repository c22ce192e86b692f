"""The sweep over the families of transformers: a tenth of it each day, its table, and that it sees a fault."""

from __future__ import annotations

import datetime

import pytest
import torch

from benchmarks.families import sweep, tiny_models
from resmoe_kernels.factored import DenseExperts
from resmoe_kernels.python_ops.models import layouts
from tests.conftest import REPO

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]
RESULTS = REPO / "benchmarks" / "results" / "families.csv"
ROWS = sweep.read(RESULTS)
TENTHS = 10  # about 3 s each
TODAY = ROWS[datetime.date.today().toordinal() % TENTHS :: TENTHS]


@pytest.mark.parametrize("row", TODAY, ids=[row.family for row in TODAY])
def test_todays_tenth_is_as_the_table_says_or_better(row, tmp_path):
    now = sweep.sweep(row.family, tmp_path)
    assert now.status in (row.status, "served"), now


def test_table_is_of_every_family_and_made_from_the_rows():
    text = RESULTS.with_suffix(".md").read_text()
    assert text == sweep.table(ROWS)
    if ROWS[0].transformers == sweep.transformers.__version__:
        assert [row.family for row in ROWS] == list(tiny_models.families())
    assert sweep.counts(ROWS) in (REPO / "README.md").read_text()


def test_every_family_is_served_or_refused_with_a_sentence():
    assert [row for row in ROWS if row.status not in ("served", "refused")] == []
    assert [row.family for row in ROWS if row.status == "refused" and len(row.reason.split()) < 5] == []


def test_a_wrong_layout_is_seen(tmp_path, monkeypatch):
    read = layouts.StackedExperts.read

    def turned(self, parameters):
        made = read(self, parameters)
        return DenseExperts(torch.cat(made.gate_up.chunk(2, 1)[::-1], 1), made.down)

    monkeypatch.setattr(layouts.StackedExperts, "read", turned)
    row = sweep.sweep("mixtral", tmp_path)
    assert row.status == "wrong" and row.reason == "disk as MixtralForCausalLM: outputs are off"


def test_a_foreign_exception_is_no_refusal(tmp_path, monkeypatch):
    def broken(self, parameters):
        return torch.empty(2).view(3)

    monkeypatch.setattr(layouts.StackedExperts, "read", broken)
    row = sweep.sweep("mixtral", tmp_path)
    assert row.status == "failed" and row.reason.startswith("RuntimeError: shape '[3]' is invalid")
    monkeypatch.setattr(layouts.StackedExperts, "read", lambda self, parameters: int("none"))
    assert sweep.sweep("mixtral", tmp_path / "2").status == "failed"


def test_a_family_that_is_refused_says_why(tmp_path):
    row = sweep.sweep("muse_spark_text", tmp_path)
    assert row.status == "refused" and "normalises each expert's output" in row.reason


def test_a_family_whose_config_does_not_fit_is_not_built(tmp_path, monkeypatch):
    monkeypatch.setitem(tiny_models._OF_FAMILY, "mixtral", {"num_attention_heads": 5})
    row = sweep.sweep("mixtral", tmp_path)
    assert row.status == "not built" and row.reason
