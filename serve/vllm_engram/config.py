"""The config of an export, with what vLLM's layers of DeepSeek-V3 ask of a config beside."""

from typing import Any

from transformers import PretrainedConfig

ARCHITECTURE = "EngramForCausalLM"


class EngramConfig(PretrainedConfig):
    """`config.json` as it is: docs/serve.md describes its keys.

    Attributes:
        n_shared_experts: None for none.
        moe_router_dtype: experts are chosen in fp32.
    """

    model_type = "engram"
    # What DeepSeek-V3's configs may say, and this model has alone.
    scoring_func, topk_method, n_group, topk_group = "sigmoid", "noaux_tc", 1, 1
    moe_router_dtype = "float32"

    def __init__(self, **settings: Any) -> None:
        settings["n_shared_experts"] = settings.get("n_shared_experts") or None
        super().__init__(**settings)

    @property
    def branches(self) -> int:
        """Branches of the residual stream."""
        return self.hyper_connections["expansion"] if self.hyper_connections else 1

    @property
    def engram_layers(self) -> list[int]:
        """Layers that read memory, from 0."""
        return self.engram["addresses"]["layers"] if self.engram else []
