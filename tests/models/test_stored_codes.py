"""Checkpoints with codes, and those of version 1: loaded, saved, moved, converted, stored anew, and their bytes."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import resmoe_kernels as rk
from resmoe_kernels.factored import FactoredExperts
from resmoe_kernels.python_ops.cli import inspect_checkpoint
from resmoe_kernels.python_ops.jobs.requantise import requantise
from resmoe_kernels.python_ops.models.checkpoint import Checkpoint
from resmoe_kernels.python_ops.models.layer import FactoredExpertsLayer
from tests import families
from tests.jobs.test_compress import tree

pytestmark = pytest.mark.usefixtures("one_thread")

VERSION_1 = Path(__file__).parent / "version1"
FORMS = {
    "base4+lowrank4": {"bits": 4, "group": 32, "retain": 0.8},  # at less, 16 ranks do not fit
    "base3+block8": {"residual": "sparse", "base_bits": 3, "residual_bits": 8, "group": 64},
    "bitmap2": {"residual": "sparse", "sparse_layout": "bitmap", "residual_bits": 2, "group": 32},
    "base4+full2": {"residual": "full", "base_bits": 4, "residual_bits": 2},
    "full3": {"method": "quantise", "bits": 3, "group": 32},
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "dense"
    families.build("mixtral").to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=FORMS)
def coded(request, dense, tmp_path_factory) -> Path:
    return rk.compress(dense, tmp_path_factory.mktemp("coded") / "out", progress=False, **FORMS[request.param])


@pytest.fixture(scope="module")
def lowrank(dense, tmp_path_factory) -> Path:
    return rk.compress(dense, tmp_path_factory.mktemp("lowrank") / "out", progress=False, **FORMS["base4+lowrank4"])


def layers_of(model) -> dict[str, FactoredExpertsLayer]:
    return {n: m for n, m in model.named_modules() if isinstance(m, FactoredExpertsLayer)}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.arange(3, 20)[None]).logits


def test_loaded_it_is_what_is_on_disk(coded, tmp_path):
    """state_dict and save_pretrained give codes and scales back bit for bit, in whatever dtype floats are loaded."""
    on_disk = stored(coded)
    for dtype in (torch.bfloat16, torch.float32):
        model = AutoModelForCausalLM.from_pretrained(coded, dtype=dtype)
        for path, layer in layers_of(model).items():
            assert layer.payloads and not any(p.requires_grad for p in layer.parameters())
            state = {n: t for n, t in model.state_dict().items() if n.startswith(f"{path}.")}
            assert set(state) == {n for n in on_disk if n.startswith(f"{path}.")}
            for name, tensor in state.items():
                coded_or_scale = tensor.dtype == torch.uint8 or ".scales_" in name
                assert tensor.dtype == (
                    on_disk[name].dtype if coded_or_scale or not tensor.is_floating_point() else dtype
                )
                assert torch.equal(tensor.to(on_disk[name].dtype), on_disk[name])
        model.save_pretrained(tmp_path / str(dtype))
        again = stored(tmp_path / str(dtype))
        experts = {n for n in on_disk if ".experts." in n}
        assert all(torch.equal(again[n].to(on_disk[n].dtype), on_disk[n]) for n in experts) and experts <= set(again)
    assert json.loads((coded / "config.json").read_text())["quantization_config"]["format_version"] == 2
    config = json.loads((tmp_path / str(torch.float32) / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 2


def test_it_runs_as_what_its_codes_say(coded):
    """Within the rounding of float32, which is far below that of codes: the layer beside its own dense experts."""
    model = AutoModelForCausalLM.from_pretrained(coded, dtype=torch.float32)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(3))
    index, weights = torch.tensor([[0, 1], [1, 2], [2, 3], [3, -1], [0, 3]]), torch.full((5, 2), 0.5)
    for layer in layers_of(model).values():
        experts = layer.weights.materialize()
        plain = FactoredExperts(
            num_experts=4,
            hidden_size=32,
            intermediate_size=48,
            values_gate_up=experts.gate_up,
            values_down=experts.down,
        )
        with rk.backend("reference"):
            wanted = rk.experts(x, index, weights, plain)
        torch.testing.assert_close(layer(x, index, weights), wanted, rtol=2e-5, atol=2e-6)
        assert "experts on cpu" in layer.explain()
    swapped = AutoModelForCausalLM.from_pretrained(coded, dtype=torch.bfloat16)
    assert torch.isfinite(logits(swapped)).all()


def test_bytes_on_disk_are_nbytes_and_headers(coded):
    model = AutoModelForCausalLM.from_pretrained(coded)
    sizes = {row["path"]: row["bytes_now"] for row in inspect_checkpoint(coded)}
    for path, layer in layers_of(model).items():
        (shard,) = {
            s.path
            for name, s in Checkpoint(coded).shard_of.items()
            if (name.startswith(f"{path}.") and "base" in name) or f"{path}.values" in name
        }
        with shard.open("rb") as file:
            header = 8 + int.from_bytes(file.read(8), "little")
        assert shard.stat().st_size - header == layer.weights.nbytes() == sizes[path]


def test_conversions_of_floats_leave_codes_and_scales(lowrank):
    """Of a layer: a model that was loaded as quantised refuses ``half`` and others itself."""
    model = AutoModelForCausalLM.from_pretrained(lowrank, dtype=torch.float32)
    layer = next(iter(layers_of(model).values()))
    before = {n: t.clone() for n, t in layer.state_dict().items()}
    for move in ("half", "double", "bfloat16", "float"):
        getattr(layer, move)()
        after = layer.state_dict()
        assert all(torch.equal(after[n], t) and after[n].dtype == t.dtype for n, t in before.items())
    model.load_state_dict(model.state_dict())
    assert torch.isfinite(logits(model)).all()


def test_swapped_in_memory_it_is_the_same(dense, lowrank):
    model = AutoModelForCausalLM.from_pretrained(dense)
    rk.swap_experts(model, progress=False, **FORMS["base4+lowrank4"])
    state, on_disk = model.state_dict(), stored(lowrank)
    assert all(torch.equal(state[n], t) for n, t in on_disk.items() if ".experts." in n)
    assert model.config.quantization_config.format_version == 2


def test_codes_cannot_be_trained(lowrank):
    model = AutoModelForCausalLM.from_pretrained(lowrank, dtype=torch.float32)
    from resmoe_kernels.python_ops.training import finetune, lora

    sentence = r"^model\.layers\.0\.mlp\.experts: is stored as codes, base_gate_up=int4/32 .*, which cannot learn; "
    with pytest.raises(ValueError, match=sentence):
        lora.fine_tune(model, torch.zeros(2, 8, dtype=torch.int64), steps=1, progress=False)
    with pytest.raises(ValueError, match=sentence):
        finetune.distil(model, model, torch.zeros(2, 8, dtype=torch.int64), steps=1, progress=False)


# ---- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t, s: t.update(scales_u_down=t["scales_u_down"].fill_(float("inf"))),
            "scales_u_down: scales must be finite",
        ),
        (lambda t, s: t["u_down"].fill_(255), None),
        (
            lambda t, s: s.update(payloads=s["payloads"].replace("base_down=int4/32", "base_down=int7/32")),
            "payload: bits must be",
        ),
        (
            lambda t, s: s.update(payloads=s["payloads"].replace("base_down=int4/32", "base_down=int8/32")),
            r"base_down: must be \(1, 32, 64\) uint8, got \(1, 32, 32\) uint8",
        ),
    ],
)
def test_contents_are_checked_when_loaded(lowrank, tmp_path, change, message):
    folder = Path(shutil.copytree(lowrank, tmp_path / "copy"))
    path = "model.layers.0.mlp.experts"
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["digests"]  # which would tell first
    sizes = config["quantization_config"]["layers"][path]["sizes"]
    file = folder / "experts-00000.safetensors"
    named = {n.removeprefix(f"{path}."): t for n, t in load_file(file).items()}
    change(named, sizes)
    save_file({f"{path}.{n}": t for n, t in named.items()}, file, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    if message is None:
        AutoModelForCausalLM.from_pretrained(folder)
        return
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


# ---- versions


def test_version_1_loads_for_ever(tmp_path):
    """A checkpoint as the package wrote it before there were codes: a low rank, a block and a bitmap."""
    model = AutoModelForCausalLM.from_pretrained(VERSION_1, dtype=torch.float32)
    with torch.inference_mode():
        got = model(input_ids=torch.arange(3, 11)[None]).logits[0, -1]
    wanted = torch.tensor(json.loads((VERSION_1 / "logits.json").read_text()))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    assert [row["payloads"] for row in inspect_checkpoint(VERSION_1)] == ["", "", ""]
    model.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 1 and all("payloads" not in s["sizes"] for s in config["layers"].values())


def test_floats_are_written_as_version_1(dense, tmp_path):
    rk.compress(dense, tmp_path / "out", progress=False)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["format_version"] == 1


# ---- stored anew


def test_requantised_is_what_rounding_its_layers_gives(dense, tmp_path):
    plain = rk.compress(dense, tmp_path / "plain", progress=False)
    eight = requantise(plain, tmp_path / "eight", bits=8, group=32, progress=False)
    four = requantise(eight, tmp_path / "four", base_bits=4, group=32, progress=False)
    rows = {name: inspect_checkpoint(folder) for name, folder in (("plain", plain), ("eight", eight), ("four", four))}
    for at in range(2):
        assert rows["plain"][at]["bytes_now"] > rows["eight"][at]["bytes_now"] > rows["four"][at]["bytes_now"]
        assert rows["plain"][at]["requantise_error"] is None
        assert 0 < rows["eight"][at]["requantise_error"] < 0.02 < rows["four"][at]["requantise_error"] < 0.2
        assert rows["four"][at]["relative_error"] == rows["plain"][at]["relative_error"]
    assert "base_down=int4/32 u_gate_up=int8" in rows["four"][0]["payloads"]
    assert torch.isfinite(logits(AutoModelForCausalLM.from_pretrained(four))).all()
    others = {n for n in stored(plain) if ".experts." not in n}
    assert all(torch.equal(stored(four)[n], stored(plain)[n]) for n in others)
    before = tree(four)
    assert tree(requantise(eight, tmp_path / "four", base_bits=4, group=32, progress=False)) == before  # done already
    # Saved by transformers, under names of its own, it can be stored anew too.
    AutoModelForCausalLM.from_pretrained(eight).save_pretrained(tmp_path / "saved")
    again = requantise(tmp_path / "saved", tmp_path / "again", base_bits=4, group=32, progress=False)
    for name, tensor in stored(four).items():
        assert torch.equal(stored(again)[name], tensor)


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from resmoe_kernels.python_ops.jobs import requantise as module
write = module.write_tensors
def killed(tensors, file):
    if file.name == "requantised-00001.safetensors":
        os.kill(os.getpid(), signal.SIGKILL)
    return write(tensors, file)
module.write_tensors = killed
module.requantise(sys.argv[1], sys.argv[2], bits=2, progress=False)
"""


def test_killed_it_goes_on_to_the_same_bytes(lowrank, tmp_path, monkeypatch):
    whole = tree(requantise(lowrank, tmp_path / "whole", bits=2, progress=False))
    command = [sys.executable, "-c", KILLED, str(lowrank), str(tmp_path / "out")]
    assert subprocess.run(command, cwd=Path.cwd()).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.unfinished").is_dir()
    from resmoe_kernels.python_ops.jobs import requantise as module

    written, write = [], module.write_tensors
    monkeypatch.setattr(module, "write_tensors", lambda t, file: written.append(file.name) or write(t, file))
    assert tree(requantise(lowrank, tmp_path / "out", bits=2, progress=False)) == whole
    assert written == ["requantised-00001.safetensors"] and not (tmp_path / ".out.unfinished").exists()


def test_requantise_refuses(dense, lowrank, tmp_path):
    for arguments, message in (
        ((dense, {"bits": 4}), f"{dense}: is not a factored checkpoint; requantise stores one anew, see compress"),
        ((lowrank, {}), "bits: must be 8, 4, 3 or 2, of all or of base or residual, got none"),
        ((lowrank, {"bits": 4, "group": 16}), "group: must be one of 32, 64, 128 columns, got 16"),
        (
            (lowrank, {"bits": 8}),
            "model.layers.0.mlp.experts.base_gate_up: is stored as int4/32, which has fewer bits than int8/128; "
            "ask for fewer",
        ),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            requantise(arguments[0], tmp_path / "out", progress=False, **arguments[1])
    assert list(tmp_path.iterdir()) == []


def test_requantise_refuses_other_factorizations(dense, tmp_path):
    joint = rk.compress(dense, tmp_path / "joint", factorization="joint", progress=False)
    with pytest.raises(ValueError, match=r"experts\.factorization: only 'stacked' is stored as codes, got 'joint'$"):
        requantise(joint, tmp_path / "out", bits=4, progress=False)


def test_names_of_the_shards(lowrank):
    """Codes and scales have names of their own in the file, and nothing else has."""
    names = sorted(name.rpartition(".")[2] for name in load_file(lowrank / "experts-00000.safetensors"))
    assert "scales_u_gate_up" in names and "base_down" in names and len(names) == 15
