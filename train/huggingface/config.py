"""The config of an export, and what it says of a model.

A model with neither memory nor branches is a DeepSeek-V3 (`deepseek_v3`, which the library has), unless a setting of it
cannot be said there; every other is `engram`, whose code is exported with it.
"""

from typing import Any

from model.config import AttentionConfig, ModelConfig

ENGRAM, DEEPSEEK_V3 = "engram", "deepseek_v3"
ENGRAM_KEYS = ("row_dim", "gate", "gate_eps", "convolution", "kernel_size")
BRANCH_KEYS = ("expansion", "sinkhorn_iterations")
LATENT_EPS = 1e-6
"""Under the norms of the latents, whatever the config says, in the library's DeepSeek-V3."""


def why_not_deepseek_v3(model: ModelConfig) -> str | None:
    """What of a model the library's DeepSeek-V3 cannot express; None if nothing."""
    if model.engram is not None:
        return "model.engram"
    if model.branches > 1:
        return "model.hyper_connections"
    if model.norm_eps != LATENT_EPS:
        return f"model.norm_eps={model.norm_eps:g}, which is {LATENT_EPS:g} under the norms of its latents"
    if model.moe is not None and model.moe.shared_experts == 0:
        return "model.moe.shared_experts=0, of which it has at least one"
    if model.moe is not None and model.moe.num_experts == 1:
        return "model.moe.num_experts=1, of which it has at least two"
    return None


def backbone_config(model: ModelConfig, longest: int) -> dict[str, Any]:
    """The entries of a config that DeepSeek-V3 has; `longest` is the length of training's sequences, in tokens."""
    attention, moe = model.attention, model.moe
    experts: dict[str, Any] = {"n_routed_experts": None, "first_k_dense_replace": model.num_layers}
    if moe is not None:
        experts = {
            "first_k_dense_replace": model.dense_layers,
            "n_routed_experts": moe.num_experts,
            "n_shared_experts": moe.shared_experts,
            "num_experts_per_tok": moe.experts_per_token,
            "moe_intermediate_size": moe.expert_hidden_size,
            "routed_scaling_factor": moe.routed_scaling_factor,
            "norm_topk_prob": moe.norm_topk,
        }
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.dense_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.heads,
        "q_lora_rank": attention.q_lora_rank,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_nope_head_dim": attention.qk_nope_dim,
        "qk_rope_head_dim": attention.qk_rope_dim,
        "v_head_dim": attention.v_dim,
        **experts,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "initializer_range": model.init_std,
        "max_position_embeddings": longest,
        "rope_parameters": _rope_parameters(attention),
        "tie_word_embeddings": model.tie_embeddings,
    }


def deepseek_v3_config(model: ModelConfig, longest: int) -> dict[str, Any]:
    """The config of a model that `why_not_deepseek_v3` has nothing against."""
    found = backbone_config(model, longest)
    rope = found["rope_parameters"]
    # Under these names too, for readers of before `rope_parameters`.
    found["rope_theta"] = rope["rope_theta"]
    found["rope_scaling"] = {"type": "yarn", **rope} if rope["rope_type"] == "yarn" else None
    if model.moe is None:  # all layers are dense, and the numbers without a meaning
        found["n_routed_experts"] = 2
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": DEEPSEEK_V3,
        **found,
        "rope_interleave": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "n_group": 1,
        "topk_group": 1,
        "num_nextn_predict_layers": 0,
        "attention_bias": False,
    }


def engram_config(
    model: ModelConfig, longest: int, addresses: dict[str, Any] | None, tables: list[dict[str, Any]]
) -> dict[str, Any]:
    """The config of any other.

    Args:
        model: the `model` section.
        longest: length of training's sequences, in tokens.
        addresses: fingerprint of the row addresses; None without memory.
        tables: of each Engram layer its number, its rows, and the files that hold them.
    """
    engram = None
    if model.engram is not None:
        sizes = {key: getattr(model.engram, key) for key in ENGRAM_KEYS}
        engram = {**sizes, "addresses": addresses, "tables": tables}
    branches = None
    if model.hyper_connections is not None and model.branches > 1:
        branches = {key: getattr(model.hyper_connections, key) for key in BRANCH_KEYS}
    return {
        "architectures": ["EngramForCausalLM"],
        "model_type": ENGRAM,
        "auto_map": {
            "AutoConfig": "configuration_engram.EngramConfig",
            "AutoModel": "modeling_engram.EngramModel",
            "AutoModelForCausalLM": "modeling_engram.EngramForCausalLM",
        },
        **backbone_config(model, longest),
        "engram": engram,
        "hyper_connections": branches,
    }


def _rope_parameters(attention: AttentionConfig) -> dict[str, Any]:
    """Rotary positions; YaRN's under the names of DeepSeek-V3's config."""
    scaling = attention.rope_scaling
    if scaling is None:
        return {"rope_type": "default", "rope_theta": attention.rope_theta}
    return {
        "rope_type": "yarn",
        "rope_theta": attention.rope_theta,
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_length,
        "beta_slow": scaling.alpha,
        "beta_fast": scaling.beta,
        "mscale": scaling.mscale,
        "mscale_all_dim": scaling.mscale,
        # Of cosines and sines: 1, which readers derive from two equal mscales, but not from 0. Where it is said, vLLM's
        # DeepSeek-V3 leaves mscale out of the attention's scale.
        **({"attention_factor": 1.0} if scaling.mscale == 0 else {}),
    }
