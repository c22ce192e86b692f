"""A model that brings its own code, in the style that came before stacked experts: a ModuleList of MLPs inside a block
that routes by itself, and in inference hands flattened pairs to ``moe_infer``, sorted there by expert."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_selfrouted import SelfRoutedConfig


class SelfRoutedMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.moe_intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.moe_intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.moe_intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN["silu"]

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class SelfRoutedBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_experts_per_tok = config.num_experts_per_tok
        self.experts = nn.ModuleList([SelfRoutedMLP(config) for _ in range(config.n_routed_experts)])
        self.gate = nn.Linear(config.hidden_size, config.n_routed_experts, bias=False)
        self.shared_experts = SelfRoutedMLP(config)

    def forward(self, hidden_states):
        shape = hidden_states.shape
        x = hidden_states.reshape(-1, shape[-1])
        weights, ids = self.gate(x).softmax(-1).topk(self.num_experts_per_tok, dim=-1)
        if self.training:
            y = torch.zeros_like(x)
            for slot in range(self.num_experts_per_tok):
                for e, expert in enumerate(self.experts):
                    rows = (ids[:, slot] == e).nonzero().squeeze(1)
                    y = y.index_add(0, rows, expert(x[rows]) * weights[rows, slot, None])
        else:
            y = self.moe_infer(x, ids.reshape(-1), weights.reshape(-1, 1))
        return y.view(shape) + self.shared_experts(hidden_states)

    @torch.no_grad()
    def moe_infer(self, x, flat_ids, flat_weights):
        out = torch.zeros_like(x)
        order = flat_ids.argsort()
        tokens = order // self.num_experts_per_tok
        ends = flat_ids.bincount(minlength=len(self.experts)).cumsum(0).tolist()
        for expert, start, end in zip(self.experts, [0, *ends], ends, strict=False):
            if start < end:
                rows = tokens[start:end]
                out.index_add_(0, rows, expert(x[rows]) * flat_weights[order[start:end]])
        return out


class SelfRoutedForCausalLM(PreTrainedModel):
    config_class = SelfRoutedConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([SelfRoutedBlock(config) for _ in range(config.num_hidden_layers)])
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return CausalLMOutputWithPast(logits=self.lm_head(hidden))
