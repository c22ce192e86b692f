"""Tiny random models of every Mixture-of-Experts family that the installed transformers has.

A family is a config type whose default config, or one of its sub-configs, has a field that counts experts. No family
is listed: a new transformers brings new ones by itself. What is listed is sizes, by the names that configs give them,
and where a family wants its sizes to fit together, those of it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_log = logging.getLogger("resmoe_kernels.families")

# Sizes of a decoder. No expert is as wide as the model or as another part, so that a mix-up of two shows.
_TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 8,
    "global_head_dim": 8,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "sliding_window": 16,
    # experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts"), 2
    ),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 40),
    **dict.fromkeys(
        ("moe_shared_expert_intermediate_size", "share_expert_dim", "shared_experts_intermediate_size"), 40
    ),
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "num_expert_groups": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_layer_start_index": 1,
    "expert_ffn_hidden_size": 24,
    "ffn_hidden_size": 48,
    "moe_latent_size": 16,
    # attention in a latent space, and its index
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 16,
    # linear attention, state spaces, convolutions
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "n_groups": 2,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "block_ff_dim": 48,
    "conv_L_cache": 3,
    # other names of the same
    "d_model": 32,
    "d_ff": 48,
    "d_kv": 8,
    "n_heads": 4,
    "num_heads": 4,
    "n_layers": 2,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "moe_hidden_size": 16,
    "projector_hidden_size": 32,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64,
}
# Sizes of what looks or listens: only there so that the model is whole, no test runs it.
_SENSES: dict[str, Any] = {
    "hidden_size": 32,
    "depth": 1,
    "num_hidden_layers": 1,
    "num_heads": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 32,
    "out_hidden_size": 32,
    "patch_size": 4,
    "image_size": 16,
    "in_channels": 3,
    "num_channels": 3,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "deepstack_visual_indexes": [0],
    "embed_dim": 32,
    "hidden_dim": 32,
}
_SENSE_NAMES = ("vision", "audio", "code2wav", "image", "sound", "speech")


def _mrope(*section: int, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": section, **values}}


_LINEAR_FIRST = {"layer_types": ["linear_attention", "full_attention", "full_attention"]}
_MLA = {"num_key_value_heads": 4}  # a latent is shared by all heads
_DOTS = {**_MLA, "head_dim": 32, "qk_nope_head_dim": 24, "per_layer_config": {}}
_FULL_FIRST = {"layer_types": ["full_attention", "linear_attention", "full_attention"]}
_TWO_KINDS = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
_GLM5 = {
    **_MLA,
    "qk_rope_head_dim": 0,
    "head_dim": 0,
    "index_kpool": 4,
    "layer_types": ["indexed_attention", "linear_attention", "indexed_attention"],
    **_TWO_KINDS,
}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
# What a family wants besides; under the name of a sub-config, what that wants.
_OF_FAMILY: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "longcat_flash"),
        _MLA,
    ),
    "bailing_hybrid": {**_MLA, **_FULL_FIRST},
    "doge": {"is_moe": True},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "beam": _TWO_KINDS,
    "deepseek_ocr2": {"text_config": {**_MLA, **_TWO_KINDS}},
    "dots3_note": {
        "text_config": _DOTS,
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
        "vision_config": {
            "per_layer_config": {},
            "num_hidden_layers": 2,
            "mlp_layer_types": ["dense", "sparse"],
            "num_local_experts": 4,
            "moe_intermediate_size": 24,
            "adapter_in_dim": 32,
            "adapter_out_dim": 32,
        },
    },
    "dots3_note_text": _DOTS,
    "ernie4_5_vl_moe": {"text_config": {"moe_intermediate_size": [24, 16], **_mrope(1, 1, 2)}},
    "gemma4": {"text_config": {"enable_moe_block": True}},
    "gemma4_text": {"enable_moe_block": True},
    "glm4v_moe": {"text_config": _mrope(1, 1, 0, partial_rotary_factor=0.5)},
    "glm4v_moe_text": _mrope(1, 1, 0, partial_rotary_factor=0.5),
    "glm5_next": {"text_config": _GLM5},
    "glm5_next_text": _GLM5,
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "attention"]},
    "inkling2": {"vision_config": {"text_hidden_size": 32}},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "kimi_k25": {"text_config": _MLA},
    "kimi_linear": {**_MLA, **_FULL_FIRST},
    "lfm2_moe": {"layer_types": ["full_attention", "conv", "full_attention"]},
    "mistral4": {**_MLA, "head_dim": 16},
    "mistral_large4": {"text_config": _MLA},
    "mistral_large4_text": _MLA,
    "muse_spark": {
        "out_hidden_size": 32,
        "audio_config": {"num_hidden_layers": 4, "hidden_sizes": [8] * 4, "depths": [1] * 4},
    },
    "nemo_speechlm": {
        "audio_config": {"diarization_config": {"head_config": {"audio_hidden_size": 32}}},
        "word_timestamp_config": {"blank_token_id": 63, "num_key_value_heads": 4},
    },
    "nemotron_h_omni": {"vision_hidden_size": 32, "vision_config": {"video_temporal_patch_size": 2}},
    "qwen3_5_moe": {"text_config": _LINEAR_FIRST},
    "qwen3_5_moe_text": _LINEAR_FIRST,
    "qwen3_next": _LINEAR_FIRST,
    "qwen3_omni_moe": {
        "talker_config": {"spatial_merge_size": 2, "text_config": {"shared_expert_intermediate_size": 40}}
    },
    "qwen4_exp": {"text_config": {**_LINEAR_FIRST, **_INDEXER}},
    "qwen4_exp_text": {**_LINEAR_FIRST, **_INDEXER},
    "step3p7": {"text_config": {"moe_layers_enum": "1,2"}},
    "switch_transformers": {"encoder_sparse_step": 2, "decoder_sparse_step": 2, "num_sparse_encoder_layers": 1},
    "nllb-moe": {"encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "zaya": {"num_experts_per_tok": 1},
}
_HEADS = (
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING",
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "MODEL_MAPPING",
)


@cache
def families() -> tuple[str, ...]:
    """The names of all families, in order of the alphabet; takes some seconds.

    A config that no model is made from by itself (a part of another) is none.
    """
    return tuple(sorted(n for n in CONFIG_MAPPING if _counts_experts(n) and classes_for(CONFIG_MAPPING[n])))


def _counts_experts(name: str) -> bool:
    try:
        values = CONFIG_MAPPING[name]().to_dict()
    except Exception as error:  # of any type: a config that has no defaults
        _log.debug("%s: %s", name, error)
        return False
    return any("expert" in key for key in _keys(values))


def _keys(values: Mapping[Any, Any]):
    for key, value in values.items():
        yield str(key).lower()
        if isinstance(value, Mapping):
            yield from _keys(value)


def tiny_config(name: str) -> PreTrainedConfig:
    """A family's config with every size small."""
    kind = CONFIG_MAPPING[name]
    return kind(**_values(kind(), "", _OF_FAMILY.get(name, {})))


def _values(default: PreTrainedConfig, role: str, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a config's class: sizes for the fields that its default has, sub-configs included."""
    fields = default.to_dict()
    sizes = _SENSES if any(sense in role for sense in _SENSE_NAMES) else _TEXT
    aliases = getattr(type(default), "attribute_map", None) or {}
    values = {n: v for n, v in sizes.items() if n in fields or aliases.get(n) in fields}
    for name in getattr(type(default), "sub_configs", None) or {}:
        inner = getattr(default, name, None)
        if isinstance(inner, PreTrainedConfig):
            values[name] = {
                "model_type": inner.model_type,
                **_values(inner, f"{role}.{name}", wanted.get(name, _OF_FAMILY.get(inner.model_type, {}))),
            }
    values.update({n: v for n, v in wanted.items() if n not in values or not isinstance(v, Mapping)})
    return {n: v for n, v in values.items() if aliases.get(n) not in values}


def classes_for(config: type[PreTrainedConfig]) -> list[type[PreTrainedModel]]:
    """Every class that such a folder is loaded as, the one with most of the model first."""
    found = [getattr(modeling_auto, head, {}).get(config, ()) for head in _HEADS]
    return list(dict.fromkeys(one for kind in found for one in (kind if isinstance(kind, tuple) else (kind,))))


def build(config: PreTrainedConfig, kind: type[PreTrainedModel]) -> PreTrainedModel:
    """The model, every parameter random: norms near 1, biases near 0, matrices so that signals keep their size."""
    torch.manual_seed(0)
    model = kind(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            if parameter.dim() <= 1:
                parameter.add_(noise * 0.05)
            else:
                parameter.copy_(noise * (0.5 / max(parameter.shape[-1], 1) ** 0.5))
        for name, buffer in model.named_buffers():
            if name.endswith("bias") and buffer.is_floating_point():  # of a router
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
    return model


@torch.no_grad()
def outputs(model: PreTrainedModel) -> torch.Tensor:
    """Logits, or hidden states where the model has no head, of two rows of twenty tokens; float32."""
    torch.manual_seed(0)  # a model that denoises begins with noise
    ids = (torch.arange(40).view(2, 20) * 7) % 53 + 5
    named = {"input_ids": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        named["decoder_input_ids"] = ids[:, :7]
    made = getattr(model, "thinker", model)(**named)  # a model of several that has no forward of its own
    logits = getattr(made, "logits", None)
    return (made[0] if logits is None else logits).float()


def silence() -> None:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
