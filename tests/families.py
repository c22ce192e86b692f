"""Tiny random models of the covered families: they prove shapes, layouts and conversions, never quality."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
}


def _config(name: str, **changes: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(**{**_COMMON, **changes})


_FEW = {"num_experts_per_tok": 2}
CONFIGS: dict[str, Callable[[], Any]] = {
    "mixtral": _config("MixtralConfig", intermediate_size=48, num_local_experts=4, **_FEW),
    "deepseek_v2": _config("DeepseekV2Config", **_MLA, q_lora_rank=None, n_group=1, topk_group=1, topk_method="greedy"),
    "deepseek_v3": _config("DeepseekV3Config", **_MLA, q_lora_rank=16, n_group=2, topk_group=1),
    # 24 and 40 are no multiples of 32: the sparse layouts end in a narrower word
    "qwen2_moe": _config(
        "Qwen2MoeConfig",
        intermediate_size=48,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        num_experts=4,
        **_FEW,
    ),
    "qwen3_moe": _config("Qwen3MoeConfig", head_dim=8, moe_intermediate_size=40, num_experts=4, **_FEW),
    "olmoe": _config("OlmoeConfig", intermediate_size=24, num_experts=4, **_FEW),
    "granitemoe": _config("GraniteMoeConfig", intermediate_size=24, num_local_experts=4, **_FEW),  # stacked on disk
    "phimoe": _config("PhimoeConfig", intermediate_size=24, num_local_experts=4, **_FEW),
    "jamba": _config(
        "JambaConfig",
        intermediate_size=24,
        num_experts=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=4,
        mamba_dt_rank=4,
        **_FEW,
    ),
    # transposed, and shared experts in a class of nearly the same name
    "aria": _config("AriaTextConfig", intermediate_size=24, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
    # interleaved, transposed, biased, and a clamped gate of its own
    "gpt_oss": _config(
        "GptOssConfig", head_dim=8, intermediate_size=24, num_local_experts=4, sliding_window=16, **_FEW
    ),
    # a ModuleDict behind a one-hot contract, ungated, encoder and decoder; capacity 4 makes tokens overflow
    "switch": lambda: transformers.SwitchTransformersConfig(
        d_model=32,
        d_ff=48,
        d_kv=8,
        num_heads=4,
        num_layers=2,
        num_sparse_encoder_layers=1,
        num_decoder_layers=2,
        num_sparse_decoder_layers=1,
        num_experts=4,
        expert_capacity=4,
        vocab_size=64,
        decoder_start_token_id=0,
    ),
}


def build(family: str) -> PreTrainedModel:
    """The family's dense model with every parameter random, biases and norms included."""
    torch.manual_seed(0)
    config = CONFIGS[family]()
    model = getattr(transformers, _class_name(family))(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 or (parameter.dim() == 2 and not parameter.any()):  # norms, and biases of zeros
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def _class_name(family: str) -> str:
    names = {"switch": "SwitchTransformersForConditionalGeneration"}
    config = CONFIGS[family]()
    return names.get(family) or transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__


def inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Two rows of twenty tokens, and a start for the decoder where there is one."""
    ids = torch.arange(40).view(2, 20) + 3
    return (
        {"input_ids": ids, "decoder_input_ids": ids[:, :7]} if model.config.is_encoder_decoder else {"input_ids": ids}
    )


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(**inputs(model)).logits
