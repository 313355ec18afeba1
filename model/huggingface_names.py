"""The names under which Hugging Face configs of the DeepSeek-V3 family state what our config states.

DeepSpeed's expert parallelism reads them from `model.config` (`train/engine/auto_ep.py`).
"""

from typing import TYPE_CHECKING, Any


class HuggingFaceNames:
    """Read-only aliases of a `ModelConfig`; None where the model has no experts."""

    if TYPE_CHECKING:
        num_layers: int
        moe: Any

    @property
    def model_type(self) -> str:
        """Our own: DeepSpeed would ask for the transformers library if it read `deepseek_v3` here."""
        return "engram"

    @property
    def hidden_act(self) -> str:
        """Activation inside the SwiGLU."""
        return "silu"

    @property
    def num_hidden_layers(self) -> int:
        """Transformer blocks."""
        return self.num_layers

    @property
    def n_routed_experts(self) -> int | None:
        """Routed experts in each MoE layer."""
        return self.moe.num_experts if self.moe else None

    @property
    def n_shared_experts(self) -> int | None:
        """Experts that every token visits."""
        return self.moe.shared_experts if self.moe else None

    @property
    def num_experts_per_tok(self) -> int | None:
        """Routed experts that each token visits."""
        return self.moe.experts_per_token if self.moe else None

    @property
    def moe_intermediate_size(self) -> int | None:
        """Inner width of one expert."""
        return self.moe.expert_hidden_size if self.moe else None

    @property
    def norm_topk_prob(self) -> bool | None:
        """Whether a token's chosen weights are divided by their sum."""
        return self.moe.norm_topk if self.moe else None

    @property
    def routed_scaling_factor(self) -> float | None:
        """Factor on the routed experts' weights."""
        return self.moe.routed_scaling_factor if self.moe else None

    @property
    def scoring_func(self) -> str:
        """Function from router logits to scores."""
        return "sigmoid"

    @property
    def n_group(self) -> None:
        """Expert groups: the choice is not limited to groups."""
        return

    @property
    def topk_group(self) -> None:
        """Groups a token may choose from: not limited."""
        return
