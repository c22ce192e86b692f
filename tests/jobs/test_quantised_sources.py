"""Checkpoints published in fp8 blocks and in MXFP4, compressed as they are: the same as from their dense twin."""

from __future__ import annotations

import json
import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import resmoe_kernels as rk
from resmoe_kernels.python_ops.models.checkpoint import Checkpoint, ModuleReader
from resmoe_kernels.python_ops.models.dense_model import DenseModel, build_on_meta
from tests import families

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]
FORMATS = ["fp8", "mxfp4"]
BLOCK = [16, 16]


def dense_checkpoint(family, folder, **sizes):
    """A tiny model in bfloat16; its tensors by name."""
    config = families.CONFIGS[family]()
    config.update(sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.CONFIGS, family, lambda: config)
        families.build(family).to(torch.bfloat16).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def fp8_checkpoint(folder, twin):
    """DeepSeek-V3 as it is published: matrices in fp8, some scales in another file than their codes."""
    config = FineGrainedFP8Config(weight_block_size=BLOCK)
    quantize = Fp8Quantize(SimpleNamespace(quantization_config=config))
    tensors, kept = {}, ("embed", "lm_head", "mlp.gate.", "norm")
    dense = dense_checkpoint("deepseek_v3", twin, moe_intermediate_size=32)
    for name, tensor in dense.items():
        whole = tensor.dim() < 2 or any(part in name for part in kept)
        made = {name: tensor} if whole else quantize.convert({name: tensor})
        tensors |= made
        if (scales := made.get(f"{name}_scale_inv")) is not None:
            dense[name] = Fp8Dequantize(None)._dequantize_one(made[name], scales, output_dtype=torch.bfloat16)
    assert sum("weight_scale_inv" in name for name in tensors) > 30
    second = {name: t for name, t in tensors.items() if name.endswith("scale_inv") and ".mlp.experts.1." in name}
    first = {name: tensor for name, tensor in tensors.items() if name not in second}
    files = {"model-1.safetensors": first, "model-2.safetensors": second}
    index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
    quantised = {"quant_method": "fp8", "weight_block_size": BLOCK, "fmt": "e4m3"}
    write(folder, twin, dense, files, {"quantization_config": quantised})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def mxfp4_checkpoint(folder, twin):
    """GPT-OSS as it is published: experts in MXFP4, of which 32 columns are a group."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    dense = dense_checkpoint("gpt_oss", twin, intermediate_size=32)
    for name, tensor in dense.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            tensors[name] = tensor
            continue
        count, columns, rows = tensor.shape
        shape = (count, rows, columns // 32, 16)
        blocks = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
        scales = torch.randint(118, 124, shape[:3], generator=generator).to(torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        dense[name] = convert_moe_packed_tensors(blocks, scales)
    write(folder, twin, dense, {"model.safetensors": tensors}, {"quantization_config": {"quant_method": "mxfp4"}})


def write(folder, twin, dense, files, config):
    save_file(dense, twin / "model.safetensors", metadata={"format": "pt"})
    folder.mkdir()
    for file, held in files.items():
        save_file(held, folder / file, metadata={"format": "pt"})
    shutil.copy(twin / "config.json", folder)
    change_config(folder, **config)


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """For each format a folder, and one with what transformers' own functions make of its tensors."""
    made = {}
    for name, build in (("fp8", fp8_checkpoint), ("mxfp4", mxfp4_checkpoint)):
        folder, twin = (tmp_path_factory.mktemp(name) / kind for kind in ("published", "dense"))
        build(folder, twin)
        made[name] = (folder, twin)
    return made


@pytest.mark.parametrize("kind", FORMATS)
def test_every_parameter_is_read_as_transformers_loads_it(kind, checkpoints):
    folder, _ = checkpoints[kind]
    source = Checkpoint(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)  # which dequantises, where there is no GPU
    reader = ModuleReader(source, build_on_meta(source, False))
    read = reader.read("", [name for name, _ in loaded.named_parameters()])
    assert all(tensor.dtype == torch.bfloat16 for tensor in read.values())
    assert [name for name, parameter in loaded.named_parameters() if not torch.equal(read[name], parameter)] == []


@pytest.mark.parametrize("kind", FORMATS)
def test_it_compresses_to_the_numbers_of_its_dense_twin(kind, checkpoints, tmp_path, caplog):
    folder, twin = checkpoints[kind]
    settings = {"residual": "sparse", "retain": 0.25, "progress": False}
    rk.compress(twin, tmp_path / "of-twin", **settings)
    assert not [message for message in caplog.messages if "dequantised" in message]
    with caplog.at_level(logging.WARNING, "resmoe_kernels"):
        rk.compress(folder, tmp_path / "out", **settings)
    said = f"{folder}: its {kind} weights are dequantised; what is not compressed is stored in bfloat16"
    assert said in caplog.messages
    made, expected = (
        {n: t for file in sorted((tmp_path / out).glob("*.safetensors")) for n, t in load_file(file).items()}
        for out in ("out", "of-twin")
    )
    assert made.keys() == expected.keys()
    assert [n for n, t in expected.items() if t.dtype != made[n].dtype or not torch.equal(t, made[n])] == []


@pytest.mark.parametrize("kind", FORMATS)
def test_the_result_loads_and_is_the_model(kind, checkpoints, tmp_path):
    folder, twin = checkpoints[kind]
    rk.compress(folder, tmp_path / "out", method="xmoe", parts=2, progress=False)  # which changes no weight
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    expected = families.logits(AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32))
    torch.testing.assert_close(families.logits(loaded), expected, rtol=0, atol=2e-6 * float(expected.abs().max()))
    assert Checkpoint(tmp_path / "out").quantised == "resmoe"


def test_calibration_reads_it_layer_by_layer(checkpoints):
    folder, twin = checkpoints["fp8"]
    ids = torch.arange(40).view(2, 20) + 3
    left = []
    for path in (folder, twin):
        source = Checkpoint(path)
        dense = build_on_meta(source, False)
        model = DenseModel(dense, ModuleReader(source, dense))
        left.append(model.run(model.embed(ids), 0, 2).states)
    assert all(torch.equal(one, other) for one, other in zip(*left, strict=True))


@pytest.mark.parametrize(("change", "message"), [
    (
        {"quantization_config": {"quant_method": "gptq"}},
        "holds gptq-quantised weights; start from an unquantised checkpoint, or fp8 or mxfp4",
    ),
    ({"dtype": "float64"}, "config.json: dtype must be bfloat16, float16 or float32, got 'float64'"),
])  # fmt: skip
def test_what_is_refused(change, message, checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints["mxfp4"][0], tmp_path / "model")
    change_config(folder, **change)
    with pytest.raises(ValueError, match=message):
        rk.compress(folder, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_there_twice_are_refused(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints["mxfp4"][0], tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith("gate_up_proj_blocks")).removesuffix("_blocks")
    tensors[name] = convert_moe_packed_tensors(tensors[f"{name}_blocks"], tensors[f"{name}_scales"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"^{name}: stands in the checkpoint beside {name}_blocks"):
        rk.compress(folder, tmp_path / "out", progress=False)
