"""What the config of a folder says of its model, in the words of a job's `model` section."""

from dataclasses import dataclass, replace
from typing import Any

from train.errors import UserError
from train.huggingface.config import BRANCH_KEYS, DEEPSEEK_V3, ENGRAM, ENGRAM_KEYS, LATENT_EPS

_FROM = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "dense_hidden_size": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "attention.heads": "num_attention_heads",
    "attention.q_lora_rank": "q_lora_rank",
    "attention.kv_lora_rank": "kv_lora_rank",
    "attention.qk_nope_dim": "qk_nope_head_dim",
    "attention.qk_rope_dim": "qk_rope_head_dim",
    "attention.v_dim": "v_head_dim",
}
_FROM_EXPERTS = {
    "dense_layers": "first_k_dense_replace",
    "moe.num_experts": "n_routed_experts",
    "moe.experts_per_token": "num_experts_per_tok",
    "moe.shared_experts": "n_shared_experts",
    "moe.expert_hidden_size": "moe_intermediate_size",
    "moe.routed_scaling_factor": "routed_scaling_factor",
    "moe.norm_topk": "norm_topk_prob",
}
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "scoring_func": ("sigmoid",),
    "attention_bias": (False,),
    "rope_interleave": (True,),
    "n_group": (1, None),
    "topk_group": (1, None),
}
"""What DeepSeek-V3's config may say, and the only values that this model has."""


@dataclass(frozen=True)
class Settings:
    """What a run that begins with a folder must agree with.

    Attributes:
        model: nested as a job's `model` section; what is not there is free.
        addresses: numbers of its row addresses' fingerprint, all or some; None without memory.
        backbone: whether the folder's backbone is one that this model has.
        block: rows and columns of a block of weights that have one scale; None for weights as they are.
    """

    model: dict[str, Any]
    addresses: dict[str, Any] | None
    backbone: bool = True
    block: tuple[int, int] | None = None


def settings_of(config: dict[str, Any]) -> Settings:
    """Reads a `config.json`.

    Raises:
        UserError: it is of no model that can be taken.
    """
    text = config.get("text_config", config)
    if "engram_layer_ids" in text:
        return _deepseek_v41(text)
    kind = config.get("model_type")
    if kind not in (DEEPSEEK_V3, ENGRAM):
        raise UserError(f"model_type is {kind}; models of {DEEPSEEK_V3} and {ENGRAM}, and tables of DeepSeek-V4.1, do")
    return replace(_own(config, kind), block=_block(config.get("quantization_config")))


def _block(quantized: dict[str, Any] | None) -> tuple[int, int] | None:
    if not quantized:
        return None
    method, block = quantized.get("quant_method"), quantized.get("weight_block_size")
    if (method, quantized.get("fmt", "e4m3")) != ("fp8", "e4m3") or not isinstance(block, list) or len(block) != 2:
        raise UserError(
            f"its weights are quantized ({method}); convert them to bf16, or to DeepSeek-V3's fp8 in blocks"
        )
    return int(block[0]), int(block[1])


def _own(config: dict[str, Any], kind: str) -> Settings:
    for key, allowed in _ONLY.items():
        if config.get(key, allowed[0]) not in allowed:
            raise UserError(f"{key} is {config[key]}, but this model has {allowed[0]} alone")
    dense = config.get("n_routed_experts") is None or config["first_k_dense_replace"] >= config["num_hidden_layers"]
    model: dict[str, Any] = {"attention": {}, "moe": None if dense else {}}
    try:
        for place, key in (_FROM if dense else _FROM | _FROM_EXPERTS).items():
            section, _, name = place.rpartition(".")
            (model[section] if section else model)[name] = config[key]
    except KeyError as error:
        raise UserError(f"has no {error.args[0]}") from None
    if kind == DEEPSEEK_V3 and model["norm_eps"] != LATENT_EPS:
        raise UserError(
            f"rms_norm_eps is {model['norm_eps']:g}, but {LATENT_EPS:g} under the latents' norms, which are one here"
        )
    model["tie_embeddings"] = config.get("tie_word_embeddings", False)
    # Its scaling is free, as that of a run's next phase.
    rope = config.get("rope_parameters") or config
    model["attention"]["rope_theta"] = float(rope.get("rope_theta", 10000.0))
    if (branches := config.get("hyper_connections")) is not None:
        model["hyper_connections"] = {key: branches[key] for key in BRANCH_KEYS}
    if (engram := config.get("engram")) is None:
        return Settings(model, None)
    addresses = engram["addresses"]
    model["engram"] = {key: engram[key] for key in ENGRAM_KEYS} | {
        key: addresses[key] for key in ("layers", "orders", "heads", "cross_documents")
    }
    return Settings(model, addresses)


def _deepseek_v41(text: dict[str, Any]) -> Settings:
    """Of DeepSeek-V4.1, whose backbone is another one (arXiv 2609.19969), the tables alone."""
    orders = list(range(2, text["engram_max_ngram_size"] + 1))
    engram = {
        "layers": text["engram_layer_ids"],
        "orders": orders,
        "heads": text["engram_n_heads"],
        "row_dim": text["engram_head_dim"],
        "pad_id": text["engram_pad_id"],
        "seed": 0,
        "compress_tokens": True,
    }
    addresses = {
        "compressed_vocabulary": text["engram_compressed_vocab_size"],
        "rows_per_head": [text["engram_vocab_size"]] * len(orders),
    }
    return Settings({"engram": engram}, addresses, backbone=False)
