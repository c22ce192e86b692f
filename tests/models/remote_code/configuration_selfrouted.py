from transformers import PreTrainedConfig


class SelfRoutedConfig(PreTrainedConfig):
    model_type = "self_routed"

    def __init__(self, vocab_size=64, hidden_size=32, moe_intermediate_size=24, num_hidden_layers=2, n_routed_experts=6,
                 num_experts_per_tok=2, **kwargs):  # fmt: skip
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.moe_intermediate_size = moe_intermediate_size
        self.n_routed_experts, self.num_experts_per_tok = n_routed_experts, num_experts_per_tok
        super().__init__(**kwargs)
