"""The config of a language model with Engram memory or hyper-connections, for Hugging Face's transformers."""

from typing import Any

from transformers import PretrainedConfig


class EngramConfig(PretrainedConfig):
    """Sizes under the names of DeepSeek-V3's config, and two sections of this model's own.

    Args:
        first_k_dense_replace: leading layers with one dense feed-forward network instead of experts.
        n_routed_experts: None for a model without experts.
        rope_parameters: `rope_type` is `default` or `yarn`.
        engram: None for a model without memory, else

            - `addresses`: what turns token ids into rows. `layers` (from 0) have a table each. `orders` are the lengths
              of n-grams, `heads` the rows for each. `multipliers` and `primes` have a list for each layer. `pad_id` is
              the compressed id before a document's first token; `cross_documents` tells whether n-grams reach into the
              document before. The other numbers are those from which these were derived.
            - `row_dim`, `gate`, `gate_eps`, `convolution`, `kernel_size`: of the modules.
            - `tables`: for each layer the files that, one after another, hold its rows.
        hyper_connections: `expansion`, `sinkhorn_iterations`; None for a plain residual stream.
        table_placement: where tables are while the model runs: `mapped` reads rows from the files as they are needed,
            `cpu` loads all into memory at first, `model` puts them where the model is.
    """

    model_type = "engram"
    keys_to_ignore_at_inference = ("cache", "past_key_values")

    def __init__(
        self,
        vocab_size: int = 512,
        hidden_size: int = 256,
        intermediate_size: int = 1024,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        q_lora_rank: int | None = None,
        kv_lora_rank: int = 64,
        qk_nope_head_dim: int = 32,
        qk_rope_head_dim: int = 32,
        v_head_dim: int = 64,
        first_k_dense_replace: int = 1,
        n_routed_experts: int | None = None,
        n_shared_experts: int = 0,
        num_experts_per_tok: int = 1,
        moe_intermediate_size: int = 128,
        routed_scaling_factor: float = 1.0,
        norm_topk_prob: bool = True,
        hidden_act: str = "silu",
        rms_norm_eps: float = 1e-6,
        max_position_embeddings: int = 4096,
        rope_parameters: dict[str, Any] | None = None,
        engram: dict[str, Any] | None = None,
        hyper_connections: dict[str, Any] | None = None,
        table_placement: str = "mapped",
        initializer_range: float = 0.02,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        if hidden_act != "silu":
            raise ValueError(f"hidden_act is {hidden_act}, but this model has silu alone")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads
        self.q_lora_rank = q_lora_rank
        self.kv_lora_rank = kv_lora_rank
        self.qk_nope_head_dim = qk_nope_head_dim
        self.qk_rope_head_dim = qk_rope_head_dim
        self.v_head_dim = v_head_dim
        self.first_k_dense_replace = first_k_dense_replace
        self.n_routed_experts = n_routed_experts
        self.n_shared_experts = n_shared_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_intermediate_size = moe_intermediate_size
        self.routed_scaling_factor = routed_scaling_factor
        self.norm_topk_prob = norm_topk_prob
        self.hidden_act = hidden_act
        self.rms_norm_eps = rms_norm_eps
        self.max_position_embeddings = max_position_embeddings
        self.rope_parameters = rope_parameters
        self.engram: Any = engram
        self.hyper_connections: Any = hyper_connections
        self.table_placement = table_placement
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        super().__init__(**kwargs)

    @property
    def branches(self) -> int:
        """Branches of the residual stream."""
        return self.hyper_connections["expansion"] if self.hyper_connections else 1

    @property
    def engram_layers(self) -> list[int]:
        """Layers that read memory."""
        return self.engram["addresses"]["layers"] if self.engram else []
