"""Compressing with calibration: statistics kept beside the result and used again, on disk as in memory, refusals."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import resmoe_kernels as rk
from resmoe_kernels.python_ops.calibration.statistics import Statistics
from resmoe_kernels.python_ops.cli import inspect_checkpoint
from resmoe_kernels.python_ops.jobs import calibration_data as module
from resmoe_kernels.python_ops.models.routing import RouterChange

TOKENS = 2048
MERGE = {"method": "mc-smoe", "stage": "merge", "groups": 4}


@pytest.fixture(scope="module")
def text(repo):
    return repo / "examples" / "wikitext2-excerpt.txt"


@pytest.fixture(scope="module")
def dense(repo):
    return repo / "examples" / "tiny-mixtral"


@pytest.fixture
def calibrated(dense, text):
    """compress(out, **settings), quietly, with 2,048 tokens of the excerpt."""

    def run(out, **settings):
        given = {"calibration": text, "calibration_tokens": TOKENS, **settings}
        return rk.compress(dense, out, progress=False, **given)

    return run


def logits(folder) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.arange(40).view(2, 20) + 100).logits


def test_a_second_method_does_not_run_the_model_again(calibrated, tmp_path, monkeypatch, caplog):
    calibrated(tmp_path / "one", **MERGE)
    (kept,) = tmp_path.glob("tiny-mixtral-*.statistics.safetensors")
    monkeypatch.setattr(module, "collect", None)  # calling it would fail
    with caplog.at_level(logging.INFO, "resmoe_kernels"):
        calibrated(tmp_path / "two", method="mc-smoe", stage="merge", groups=2)
    assert f"{kept} is there already and used again" in caplog.text
    # Named instead of a text, from anywhere, it is used as it is.
    calibrated(tmp_path / "three", calibration=kept, calibration_tokens=None, **MERGE)
    assert torch.equal(logits(tmp_path / "one"), logits(tmp_path / "three"))
    assert not torch.equal(logits(tmp_path / "one"), logits(tmp_path / "two"))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([kept.name, "one", "two", "three"])


def test_in_memory_gives_the_same_as_on_disk(calibrated, dense, text, tmp_path):
    calibrated(tmp_path / "out", **MERGE)
    model = AutoModelForCausalLM.from_pretrained(dense).eval()
    statistics = rk.calibrate(model, AutoTokenizer.from_pretrained(dense), text, tokens=TOKENS, progress=False)
    rk.swap_experts(model, statistics=statistics, progress=False, **MERGE)
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "saved"))


def test_other_tokens_are_collected_anew_and_another_job(calibrated, tmp_path):
    calibrated(tmp_path / "one", **MERGE)
    calibrated(tmp_path / "two", **{**MERGE, "calibration_tokens": 1024})
    assert len(list(tmp_path.glob("*.statistics.safetensors"))) == 2
    with pytest.raises(ValueError, match="one: holds a factored checkpoint made with other settings"):
        calibrated(tmp_path / "one", **{**MERGE, "calibration_tokens": 1024})


def test_the_router_change_is_stored_restored_and_shown(calibrated, tmp_path):
    calibrated(tmp_path / "out", **MERGE)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for path, spec in config["layers"].items():
        change = RouterChange.from_json(spec["router"])
        assert change == model.get_submodule(path).router_change and change.fold
        assert len(change.expert_of_slot) == 8 and max(change.expert_of_slot) + 1 == spec["sizes"]["num_experts"]
    rows = inspect_checkpoint(tmp_path / "out")
    assert all("8 slots on" in row["router"] and "folded" in row["router"] for row in rows)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "again"))


def test_xmoe_before_resmoe(calibrated, tmp_path):
    calibrated(tmp_path / "resmoe", method="resmoe")
    calibrated(tmp_path / "out", method="xmoe+resmoe", experts_per_token=1.5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert all(0 < spec["router"]["threshold"]["mass"] < 1 for spec in config["layers"].values())
    # A threshold leaves weights alone: they are those of resmoe by itself.
    plain, chained = (load_file(tmp_path / name / "experts-00000.safetensors") for name in ("resmoe", "out"))
    assert plain.keys() == chained.keys() and all(torch.equal(plain[n], chained[n]) for n in plain)
    assert not torch.equal(logits(tmp_path / "resmoe"), logits(tmp_path / "out"))


# ---- what is refused, before any work


def test_statistics_of_another_model(calibrated, text, tmp_path, shared):
    calibrated(tmp_path / "out", **MERGE)
    (kept,) = tmp_path.glob("*.statistics.safetensors")
    with pytest.raises(ValueError, match=r"was collected from another model than .*tiny-deepseek; calibrate again"):
        rk.compress(shared("models/tiny-deepseek"), tmp_path / "two", calibration=kept, **MERGE)
    assert not (tmp_path / "two").exists()


def test_statistics_of_other_layers_in_memory(dense, text):
    model = AutoModelForCausalLM.from_pretrained(dense).eval()
    statistics = rk.calibrate(model, AutoTokenizer.from_pretrained(dense), text, tokens=64, progress=False)
    fewer = Statistics({"model.layers.0.mlp.experts": None}, statistics.origin, statistics.token_ids)
    with pytest.raises(ValueError, match=r"statistics: hold nothing of model\.layers\.1\.mlp\.experts; calibrate this"):
        rk.swap_experts(model, statistics=fewer, **MERGE)
    with pytest.raises(ValueError, match="statistics: mc-smoe with these settings needs statistics, see calibrate"):
        rk.swap_experts(model, **MERGE)
    with pytest.raises(ValueError, match="statistics: resmoe with these settings uses no statistics; leave them out"):
        rk.swap_experts(model, statistics=statistics, residual="sparse")


def test_calibration_arguments_that_do_not_fit(dense, calibrated, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    file = tmp_path / "s.safetensors"
    file.write_bytes(b"no")
    cases = {
        "calibration: mc-smoe needs a text to see how the experts are used; name a UTF-8 file": {"calibration": None},
        r"empty\.txt: calibration needs at least two tokens, got 0": {"calibration": empty},
        r"gone\.txt: cannot be read": {"calibration": tmp_path / "gone.txt"},
        "calibration tokens: must be at least 2, got 1": {"calibration_tokens": 1},
        "calibration_tokens: .* holds statistics collected before; leave it out": {"calibration": file},
        "moments: must be one of diagonal, full, experts, got 'half'": {"moments": "half"},
    }
    for message, settings in cases.items():
        with pytest.raises(ValueError, match=message):
            calibrated(tmp_path / "out", **MERGE, **settings)
    with pytest.raises(ValueError, match="not a file of calibration statistics"):
        calibrated(tmp_path / "out", calibration=file, calibration_tokens=None, **MERGE)
    with pytest.raises(ValueError, match="calibration: resmoe uses no calibration with these settings; leave it out"):
        calibrated(tmp_path / "out", residual="sparse")
    assert {p.name for p in tmp_path.iterdir()} == {"empty.txt", "s.safetensors"}


def test_statistics_of_parts_are_not_there(calibrated, tmp_path):
    with pytest.raises(ValueError, match="moe-i2 needs statistics of the experts it compresses, and those of parts"):
        calibrated(tmp_path / "out", method="xmoe+moe-i2", parts=4, part_mass=0.9)
    assert list(tmp_path.iterdir()) == []


def test_experts_that_no_token_reached_are_named(calibrated, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "resmoe_kernels"):
        calibrated(tmp_path / "out", **{**MERGE, "calibration_tokens": 2})
    assert "no calibration token reached expert" in caplog.text
