"""Every class that loads a dense folder loads the compressed one, with the same numbers, or fails."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import resmoe_kernels as rk
from resmoe_kernels.python_ops.models.dense_model import native_class
from resmoe_kernels.python_ops.models.layer import FactoredExpertsLayer
from resmoe_kernels.python_ops.models.layouts import find_experts

_TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "moe_intermediate_size": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
_VISION = {
    "hidden_size": 32,
    "depth": 1,
    "num_heads": 2,
    "intermediate_size": 32,
    "out_hidden_size": 32,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


def qwen3_5():
    text = {
        **_TEXT,
        "shared_expert_intermediate_size": 24,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    config = transformers.Qwen3_5MoeConfig(text_config=text, vision_config=_VISION)
    return transformers.Qwen3_5MoeForConditionalGeneration(config)


def qwen3_vl():
    config = transformers.Qwen3VLMoeConfig(
        text_config={**_TEXT, "intermediate_size": 48}, vision_config={**_VISION, "deepstack_visual_indexes": [0]}
    )
    return transformers.Qwen3VLMoeForConditionalGeneration(config)


def thinker():
    config = transformers.Qwen3OmniMoeThinkerConfig(
        text_config={**_TEXT, "intermediate_size": 48},
        vision_config={**_VISION, "deepstack_visual_indexes": [0]},
        audio_config={
            "d_model": 32,
            "encoder_layers": 1,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "num_mel_bins": 16,
            "output_dim": 32,
            "downsample_hidden_size": 8,
        },
    )
    return transformers.Qwen3OmniMoeThinkerForConditionalGeneration(config)


def ocr():
    """Its hub names are renamed to module names by patterns that match module names again."""
    text = {
        **_TEXT,
        "num_key_value_heads": 4,
        "intermediate_size": 48,
        "mlp_layer_types": ["dense", "sparse"],
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
    }
    sam = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "mlp_dim": 32, "image_size": 64}
    sam |= {"output_channels": 16, "downsample_channels": [16, 32], "global_attn_indexes": [0], "window_size": 2}
    encoder = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    encoder |= {"intermediate_size": 32, "vocab_size": 64}
    vision = {"sam_config": sam, "encoder_config": encoder}
    config = transformers.DeepseekOcr2Config(text_config=text, vision_config=vision, image_token_id=9)
    return transformers.DeepseekOcr2ForConditionalGeneration(config)


IDS = torch.arange(20).view(1, 20) + 12


@torch.no_grad()
def output(model):
    made = model.eval()(input_ids=IDS)
    return made.logits if "logits" in made else made.last_hidden_state


def layers(model):
    return [m for m in model.modules() if isinstance(m, FactoredExpertsLayer)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Dense and compressed folders by the function that builds the model, made once."""
    made = {}

    def of(build):
        if build not in made:
            folder = tmp_path_factory.mktemp(build.__name__)
            torch.manual_seed(0)
            model = build()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        parameter.normal_(0, parameter.shape[-1] ** -0.5)
            model.save_pretrained(folder / "dense")
            made[build] = folder / "dense", rk.compress(folder / "dense", folder / "out", retain=1.0, progress=False)
        return made[build]

    return of


CLASSES = [
    (qwen3_5, transformers.Qwen3_5MoeForConditionalGeneration),
    (qwen3_5, transformers.Qwen3_5MoeForCausalLM),  # built from text_config
    (qwen3_5, transformers.Qwen3_5MoeTextModel),
    (qwen3_5, AutoModelForCausalLM),
    (qwen3_vl, AutoModel),
    (thinker, transformers.Qwen3OmniMoeThinkerForConditionalGeneration),  # initialises experts from the block around
    (ocr, transformers.DeepseekOcr2ForConditionalGeneration),
    (ocr, AutoModel),
]


@pytest.mark.parametrize(("build", "loads"), CLASSES, ids=lambda value: value.__name__)
def test_a_class_that_loads_the_dense_folder_loads_the_compressed_one(folders, build, loads, tmp_path):
    dense, out = folders(build)
    right = output(model := loads.from_pretrained(dense))
    loaded, info = loads.from_pretrained(out, output_loading_info=True)
    assert len(layers(loaded)) == len(find_experts(model))
    assert not info["missing_keys"], info
    allowed = 2e-5 * max(right.abs().max().item(), 1)  # full rank: float32 rounding through thin products
    torch.testing.assert_close(output(loaded), right, rtol=0, atol=allowed)
    loaded.save_pretrained(tmp_path / "again")
    again = type(loaded).from_pretrained(tmp_path / "again")
    assert torch.equal(output(again), output(loaded))


def test_transposed_experts_under_their_own_names(folders, tmp_path):
    """Qwen3-VL-MoE as it is published: transformers transposes from a name to the same name."""
    dense, out = folders(qwen3_vl)
    published = tmp_path / "published"
    published.mkdir()
    (published / "config.json").write_text((dense / "config.json").read_text())
    tensors = load_file(dense / "model.safetensors")
    for name in [n for n in tensors if ".mlp.experts." in n]:
        tensors[name] = tensors[name].transpose(1, 2).contiguous()
    save_file(tensors, published / "model.safetensors", metadata={"format": "pt"})
    made = rk.compress(published, tmp_path / "out", retain=1.0, progress=False)
    for file in sorted(out.glob("experts-*")):
        assert file.read_bytes() == (made / file.name).read_bytes()


def test_a_part_with_nothing_in_the_checkpoint_is_refused(folders, tmp_path):
    """One layer left dense and its tensors gone: transformers would fill it with random numbers and a warning."""
    dense, _ = folders(qwen3_vl)
    out = rk.compress(dense, tmp_path / "out", layers="first:1", progress=False)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    lost = "model.language_model.layers.1.mlp.experts."
    for file in set(index["weight_map"].values()):
        tensors = {n: t for n, t in load_file(out / file).items() if not n.startswith(lost)}
        save_file(tensors, out / file, metadata={"format": "pt"})
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if not n.startswith(lost)}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]["digests"]  # which would tell, too
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"layers\.1\.mlp\.experts\.\w+: Qwen3VLMoe.* has dense experts there and trans"
    ):
        AutoModel.from_pretrained(out)


def test_so_is_a_class_that_none_of_the_tensors_reach(folders):
    """transformers loads the dense folder in it with random numbers throughout."""
    _, out = folders(qwen3_vl)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts\.\w+: Qwen3VLMoeTextModel has dense experts there"):
        transformers.Qwen3VLMoeTextModel.from_pretrained(out)


def test_without_its_quantisation_a_folder_is_refused_by_every_class(folders, tmp_path):
    """transformers knows no experts_implementation of ours, whether the package is imported or not."""
    _, out = folders(qwen3_5)
    copy = shutil.copytree(out, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    del config["quantization_config"], config["text_config"]["quantization_config"]
    (copy / "config.json").write_text(json.dumps(config))
    for loads in (AutoModelForCausalLM, AutoModel, transformers.Qwen3_5MoeTextModel):
        with pytest.raises(ValueError, match='experts_implementation="resmoe"'):
            loads.from_pretrained(copy)


def test_the_config_of_a_part_alone_says_that_it_describes_nothing(folders, tmp_path):
    _, out = folders(qwen3_5)
    whole = transformers.Qwen3_5MoeForConditionalGeneration.from_pretrained(out)
    whole.model.language_model.save_pretrained(tmp_path / "part")
    with pytest.raises(ValueError, match=r"config\.json is that of a part of a factored model"):
        transformers.Qwen3_5MoeTextModel.from_pretrained(tmp_path / "part")


def test_the_class_of_a_checkpoint_is_the_one_it_was_saved_from(folders):
    _, out = folders(qwen3_5)
    config = json.loads((out / "config.json").read_text())
    assert native_class(config, False) is transformers.Qwen3_5MoeForConditionalGeneration
    assert native_class({**config, "auto_map": {}}, True) is None
    assert native_class({}, False) is None
