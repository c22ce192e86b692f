"""What config.json says of factored layers: damaged in any way it is an error in one sentence, never a wrong load."""

from __future__ import annotations

import copy
import json
import random
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import resmoe_kernels as rk
from resmoe_kernels.python_ops.calibration.calibrate import collect
from resmoe_kernels.python_ops.cli import inspect_checkpoint
from resmoe_kernels.python_ops.models.dense_model import DenseModel
from tests import families

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS: dict[str, dict[str, Any]] = {
    "lowrank": {"retain": 0.5},
    "bitmap": {"retain": 0.5, "residual": "sparse", "sparse_layout": "bitmap"},
    "pruned": {"method": "moe-i2", "prune": 0.25, "retain": 0.5},
    "merged": {"method": "mc-smoe", "stage": "merge", "groups": 2},
    "parts": {"method": "xmoe", "parts": 2, "parts_per_token": 1.5},
    "threshold": {"method": "xmoe", "experts_per_token": 1.5},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints of every kind of spec, not to be changed."""
    place, made = tmp_path_factory.mktemp("specs"), {}
    for name, settings in METHODS.items():
        model = families.build("qwen3_moe")
        needed = "method" in settings
        statistics = collect(DenseModel(model), families.inputs(model)["input_ids"], progress=False) if needed else None
        rk.swap_experts(model, statistics=statistics, progress=False, **settings)
        model.save_pretrained(place / name)
        made[name] = place / name
    return made


ODD = (None, True, False, -1, 0, 1, 2, 3, 10**12, 2**63, 10**40, 0.5, 1e308, float("nan"), float("inf"), -0.0)
ODD += ("", "x", "float32", "int32", "complex64", "softmax", "before", "é" * 300, [], [0], [-1], [1, [2]], {}, {"a": 1})


def nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) below a JSON value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from nodes(value[key])


def mutated(config: dict[str, Any], chance: random.Random, keep_digests: bool) -> dict[str, Any]:
    """One or two changes somewhere in quantization_config."""
    config = copy.deepcopy(config)
    quantization = config["quantization_config"]
    if not keep_digests:
        del quantization["digests"]
    for _ in range(chance.choice((1, 1, 2))):
        places = [p for p in nodes(quantization) if p[1] != "settings"]
        container, key = chance.choice(places)
        way = chance.randrange(4)
        if way == 0:
            del container[key]
        elif way == 1 and isinstance(container, dict):
            container[str(key) + chance.choice(("", "x", ".0"))] = container.pop(key)
        elif way == 2 and isinstance(container[key], int | float):
            container[key] = container[key] + chance.choice((-1, 1, 7, 2**31))
        else:
            container[key] = copy.deepcopy(chance.choice(ODD))
    return config


def fuzz(folder: Path, count: int, seed: int, load_every: int, work: Path) -> dict[str, int]:
    """How many mutations were accepted and refused; raises whatever is not one sentence, and for a wrong load."""
    chance, seen = random.Random(seed), {"refused": 0, "accepted": 0, "loads refused": 0, "loads right": 0}
    config = json.loads((folder / "config.json").read_text())
    expected = families.logits(AutoModelForCausalLM.from_pretrained(folder).eval())
    for path in folder.iterdir():
        (work / path.name).symlink_to(path)
    (work / "config.json").unlink()
    for number in range(count):
        loads = number % load_every == 0
        changed = mutated(config, chance, keep_digests=loads)
        (work / "config.json").write_text(json.dumps(changed))
        try:
            inspect_checkpoint(work)
            seen["accepted"] += 1
        except ValueError as error:
            assert "\n" not in str(error), error
            seen["refused"] += 1
        if not loads:
            continue
        try:
            model = AutoModelForCausalLM.from_pretrained(work).eval()
        except ValueError:
            seen["loads refused"] += 1
        except Exception as error:  # transformers reads any key that is called dtype itself, before it asks us
            files = {frame.filename for frame in traceback.extract_tb(error.__traceback__)[1:]}
            assert all("transformers" in file for file in files), files
            seen["loads refused"] += 1
        else:
            assert torch.equal(families.logits(model), expected), (number, changed["quantization_config"])
            seen["loads right"] += 1
    return seen


@pytest.mark.parametrize("name", METHODS)
def test_mutations_are_refused_or_make_no_difference(name, folders, tmp_path):
    seen = fuzz(folders[name], 120, 1, 12, tmp_path)
    assert seen["refused"] > 40 and seen["loads refused"] > 3


# What of a pruned (8 slots) or split layer does not fit: a sentence each, at inspect and at load.
ROUTERS = [
    (
        "merged",
        {"expert_of_slot": [0, 1, 2, 0]},
        r"router\.expert_of_slot: entries must be in \[-1, 2\), got \[0, 1, 2",
    ),
    ("merged", {"expert_of_slot": [0, -2, 1, 0]}, "scoring: needed where slots are pruned"),
    ("parts", {"parts": 4}, r"router: the model's router has 4 slots, this change is of one with 2"),
    ("parts", {"parts": 10**12}, r"router\.parts: must divide the layer's 8 experts, got 1000000000000"),
    ("parts", {"parts": 2.0}, r"router\.parts: must be a whole number, got 2\.0"),
    ("threshold", {"scoring": None}, "scoring: needed where slots are pruned or a threshold chooses"),
    ("threshold", {"masked": "never"}, "masked: must be one of before, after"),
    ("threshold", {"no_such": 1}, "router: unknown name 'no_such'; known are expert_of_slot"),
    ("pruned", {"expert_of_slot": [0, 0, 1]}, r"needed where|model's router has 4 slots, this change is of one with 3"),
]


@pytest.mark.parametrize(("name", "change", "message"), ROUTERS)
def test_a_router_change_that_does_not_fit_its_layer(name, change, message, folders, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    for path in folders[name].iterdir():
        (work / path.name).symlink_to(path)
    config = json.loads((work / "config.json").read_text())
    del config["quantization_config"]["digests"]
    for spec in config["quantization_config"]["layers"].values():
        spec["router"] |= change
    (work / "config.json").unlink()
    (work / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(work)


def test_a_description_changed_since_is_refused_unless_its_digests_go(folders, tmp_path):
    """A threshold of another mass is as good as any, so only the digest tells; without digests it is what counts."""
    for path in folders["threshold"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    for spec in config["quantization_config"]["layers"].values():
        spec["router"]["threshold"]["mass"] = 0.123
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"layers: config\.json does not describe them as it did when it was written"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    del config["quantization_config"]["digests"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    layer = AutoModelForCausalLM.from_pretrained(tmp_path).model.layers[0].mlp.experts
    assert layer.router_change.threshold.mass == 0.123


# ---- numbers stored twice: the model's own word counts


def chosen(model) -> int:
    """The most experts that a token of the sample uses in the last layer."""
    seen = []
    hook = model.model.layers[-1].mlp.experts.register_forward_pre_hook(
        lambda _, given: seen.append(int((given[1] >= 0).sum(-1).max()))
    )
    families.logits(model.eval())
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("name", ["lowrank", "pruned", "merged"])
@pytest.mark.parametrize("asked", [1, 3])
def test_experts_per_token_asked_for_at_load_and_after_it(name, asked, folders):
    assert chosen(AutoModelForCausalLM.from_pretrained(folders[name])) == 2
    assert chosen(AutoModelForCausalLM.from_pretrained(folders[name], num_experts_per_tok=asked)) == asked
    model = AutoModelForCausalLM.from_pretrained(folders[name])
    for layer in model.model.layers:
        layer.mlp.gate.top_k = asked
    assert chosen(model) == asked


def test_weights_normalised_or_not_at_load(folders):
    """As the dense model's router would, which reads it from the config."""
    both = [AutoModelForCausalLM.from_pretrained(folders["pruned"], norm_topk_prob=flag) for flag in (True, False)]
    scorings = [model.model.layers[0].mlp.experts.router_change.scoring for model in both]
    assert [s.normalised for s in scorings] == [True, False]


def test_experts_per_token_of_a_threshold_are_refused(folders):
    match = r"a threshold says how many experts a token uses here, so 3 of them cannot be asked for; leave .* at 2"
    with pytest.raises(ValueError, match=match):
        AutoModelForCausalLM.from_pretrained(folders["threshold"], num_experts_per_tok=3)
    model = AutoModelForCausalLM.from_pretrained(folders["threshold"])
    model.model.layers[1].mlp.gate.top_k = 3
    with pytest.raises(ValueError, match=match):
        families.logits(model)
