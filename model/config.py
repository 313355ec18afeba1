"""What a model is made of: the `model` section of a job's config."""

from typing import Literal

from pydantic import BaseModel, Field, model_validator

from model.huggingface_names import HuggingFaceNames


class RopeScalingConfig(
    BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
):
    """YaRN (arXiv 2309.00071, section 3): rotary positions for sequences longer than those of earlier training."""

    factor: float = Field(10.0, ge=1)
    """How many times longer sequences become; frequencies are divided by this."""
    original_length: int = Field(4096, ge=1, le=1_000_000_000)
    """Sequence length of the earlier training."""
    alpha: float = Field(1.0, gt=0)
    """Columns that turn at most this often in the original length have their frequency divided by the whole factor."""
    beta: float = Field(32.0, gt=0)
    """Columns that turn at least this often keep their frequency."""
    mscale: float = Field(0.707, ge=0)
    """f of the attention's temperature: logits are multiplied by (0.1 f ln factor + 1)^2."""

    @model_validator(mode="after")
    def _ordered(self) -> "RopeScalingConfig":
        if self.alpha >= self.beta:
            raise ValueError(f"alpha must be below beta, but they are {self.alpha:g} and {self.beta:g}")
        return self


class AttentionConfig(
    BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
):
    """Multi-head latent attention (DeepSeek-V2 paper, section 2.1)."""

    heads: int = Field(4, ge=1, le=65_536)
    """Attention heads."""
    q_lora_rank: int | None = Field(None, ge=1, le=65_536)
    """Width that queries are compressed to; null projects them straight from the hidden state."""
    kv_lora_rank: int = Field(64, ge=1, le=65_536)
    """Width that keys and values are compressed to together."""
    qk_nope_dim: int = Field(32, ge=1, le=65_536)
    """Columns of a head's query and key without position."""
    qk_rope_dim: int = Field(32, ge=2, multiple_of=2, le=65_536)
    """Columns of a head's query and key that carry the rotary position; the key's are shared by all heads."""
    v_dim: int = Field(64, ge=1, le=65_536)
    """Columns of a head's value."""
    rope_theta: float = Field(10000.0, gt=1)
    """Base of the rotary frequencies."""
    rope_scaling: RopeScalingConfig | None = None
    """Scaling of the frequencies for longer sequences; null: none."""


class MoEConfig(
    BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
):
    """Mixture of experts with sigmoid scores and bias-balanced choice (DeepSeek-V3 report, section 2.1.2)."""

    num_experts: int = Field(8, ge=1, le=65_536)
    """Routed experts in each MoE layer."""
    experts_per_token: int = Field(2, ge=1, le=65_536)
    """Routed experts that each token visits."""
    shared_experts: int = Field(1, ge=0, le=1_024)
    """Experts that every token visits, computed as one SwiGLU of this many times the expert width."""
    expert_hidden_size: int = Field(128, ge=1, le=1_000_000)
    """Inner width of one expert."""
    routed_scaling_factor: float = Field(1.0, gt=0)
    """Factor on the routed experts' weights."""
    norm_topk: bool = True
    """Whether a token's chosen weights are divided by their sum."""
    balance_rate: float = Field(1e-3, ge=0)
    """Change of the router bias per training step (auxiliary-loss-free balancing); 0 switches it off."""
    sequence_balance_factor: float = Field(0.0, ge=0)
    """Factor on the balance loss within each sequence, which adds to the gradient but not to the reported loss; 0
    switches it off (DeepSeek-V3 has 1e-4)."""

    @model_validator(mode="after")
    def _enough_experts(self) -> "MoEConfig":
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token is {self.experts_per_token}, but there are only {self.num_experts} experts "
                "(num_experts): lower the first or raise the second"
            )
        return self


class EngramConfig(
    BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
):
    """Engram memory: tables of rows, looked up by hashed n-grams, that some layers read."""

    layers: list[int] = Field(default=[1], min_length=1)
    """Layers, counted from 0, that begin with an Engram module. Each has its own table."""
    orders: list[int] = Field(default=[2, 3], min_length=1)
    """Lengths of the n-grams that are looked up, in tokens."""
    heads: int = Field(4, ge=1, le=65_536)
    """Hash functions, and so rows, per order."""
    rows_per_head: int = Field(10_000, ge=1, le=10_000_000_000_000)
    """Minimum rows of one head's table; each gets the next unused prime. With 1, each has a single row for all n-grams:
    the module without its memory, as a control."""
    row_dim: int = Field(16, ge=1, le=65_536)
    """Columns of one row."""
    seed: int = Field(0, ge=0, le=2**63 - 1)
    """Seed of the hash multipliers."""
    pad_id: int | None = Field(None, ge=0, le=2**31 - 1)
    """Token id, before compression, that pads n-grams before a document's first token; null: the tokenizer's."""
    compress_tokens: bool = True
    """Whether token ids that spell the same text up to case, accents and spaces are hashed as one."""
    cross_documents: bool = False
    """Whether n-grams and the convolution look back across the start of a document."""
    gate: Literal["signed_sqrt", "plain"] = "signed_sqrt"
    """Input of the gate's sigmoid: the released models' signed square root, or the paper's plain score."""
    gate_eps: float = Field(1e-20, gt=0)
    """Added to the mean squares under the gate's norms; keys may be small, so it is far below `norm_eps`."""
    convolution: bool = True
    """Whether the gated values pass a short causal convolution, whose dilation is the largest order."""
    kernel_size: int = Field(4, ge=1, le=1_024)
    """Taps of that convolution."""
    init_std: float = Field(0.02, ge=0)
    """Standard deviation of the rows before training."""

    @property
    def lookups_per_token(self) -> int:
        """Rows that one token looks up in one table."""
        return len(self.orders) * self.heads

    @property
    def memory_width(self) -> int:
        """Columns of a token's rows put side by side."""
        return self.lookups_per_token * self.row_dim

    @model_validator(mode="after")
    def _well_formed(self) -> "EngramConfig":
        for key, values, least in (("layers", self.layers, 0), ("orders", self.orders, 1)):
            if values != sorted(set(values)) or values[0] < least:
                raise ValueError(f"{key} must be ascending, without duplicates and at least {least}, not {values}")
        if self.gate == "plain" and self.init_std == 0:
            raise ValueError(
                "init_std must be above 0 with gate: plain, as the gate's slope is unbounded at a zero key"
            )
        return self


class HyperConnectionsConfig(
    BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
):
    """Manifold-constrained hyper-connections (arXiv 2512.24880): several branches instead of one residual stream."""

    expansion: int = Field(4, ge=1, le=256)
    """Branches of the residual stream; 1 is a plain residual."""
    sinkhorn_iterations: int = Field(20, ge=1, le=1_000)
    """Row and column normalisations that make the residual mappings doubly stochastic."""
    alpha_init: float = Field(0.01, gt=0)
    """Initial factor on the part of the mappings that depends on the stream."""


class ModelConfig(
    HuggingFaceNames,
    BaseModel,
    extra="forbid",
    frozen=True,
    use_attribute_docstrings=True,
    strict=True,
    allow_inf_nan=False,
):
    """A decoder-only language model: dense, mixture of experts, or either with Engram memory."""

    vocab_size: int = Field(ge=2, le=2**31 - 1)
    """Token ids; at least the tokenizer's."""
    hidden_size: int = Field(256, ge=1, le=1_000_000)
    """Columns of the residual stream."""
    num_layers: int = Field(4, ge=1, le=1_024)
    """Transformer blocks."""
    dense_layers: int = Field(1, ge=0, le=1_024)
    """Leading blocks with one dense feed-forward network instead of experts. Without `moe`, all are dense."""
    dense_hidden_size: int = Field(1024, ge=1, le=10_000_000)
    """Inner width of a dense feed-forward network."""
    tie_embeddings: bool = False
    """Whether the output head shares the input embedding's weights."""
    norm_eps: float = Field(1e-6, gt=0)
    """Added to the mean squares under the norms."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of matrices before training; output projections have it divided by sqrt(2 num_layers)."""
    attention: AttentionConfig = AttentionConfig()
    """Sizes of the attention."""
    moe: MoEConfig | None = None
    """The experts; null for a dense model."""
    engram: EngramConfig | None = None
    """The memory; null for none."""
    hyper_connections: HyperConnectionsConfig | None = None
    """The residual stream's branches; null for a plain residual."""

    @property
    def branches(self) -> int:
        """Branches of the residual stream."""
        return self.hyper_connections.expansion if self.hyper_connections else 1

    def has_experts(self, layer: int) -> bool:
        """Whether block `layer`, counted from 0, has experts."""
        return self.moe is not None and layer >= self.dense_layers

    @model_validator(mode="after")
    def _layers_fit(self) -> "ModelConfig":
        if self.moe is not None and self.dense_layers >= self.num_layers:
            raise ValueError(
                f"dense_layers is {self.dense_layers} of num_layers {self.num_layers}, which leaves no layer for the "
                "experts: lower it, or set moe: null for a dense model"
            )
        if self.engram is not None and self.engram.layers[-1] >= self.num_layers:
            raise ValueError(
                f"engram.layers names layer {self.engram.layers[-1]}, but the layers are 0 to {self.num_layers - 1}"
            )
        return self
