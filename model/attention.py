"""Multi-head latent attention (DeepSeek-V2 paper, section 2.1), within documents.

Shape suffixes: B batch, T sequence, D hidden, H heads, P rotary pairs.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from model.config import AttentionConfig
from model.document_attention import Documents, attend, documents
from model.layers import Linear
from model.rotary import attention_scale, rotary_angles, rotate


class AttentionContext(NamedTuple):
    """What all layers share; it follows from the positions alone."""

    documents: Documents
    """Who sees whom."""
    cosine_BTP: Tensor
    """Rotary cosines, fp32."""
    sine_BTP: Tensor
    """Rotary sines, fp32."""


def attention_context(positions_BT: Tensor, config: AttentionConfig, dtype: torch.dtype) -> AttentionContext:
    """The context of int64 positions within documents: a token sees itself and earlier tokens of its own document.

    `dtype` is that of the layers' arithmetic.
    """
    least_columns = min(config.qk_nope_dim + config.qk_rope_dim, config.v_dim)
    within = documents(positions_BT, dtype, least_columns)
    return AttentionContext(
        within, *rotary_angles(positions_BT, config.qk_rope_dim, config.rope_theta, config.rope_scaling)
    )


class Cache(Protocol):
    """Keys and values of a text's earlier tokens; see `model.decoding`."""

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Appends those of new tokens; returns those of all tokens so far."""

    def seen(self) -> Tensor | None:
        """Which of these a new token sees, bool [B, 1, 1, L]; None for all."""


class Attention(nn.Module):
    """Queries, keys and values through narrow latents; one rotary key shared by all heads.

    Submodules bear the names of Hugging Face's DeepSeek-V3. The scale is 1/sqrt(qk_nope_dim + qk_rope_dim), with YaRN
    times its temperature.
    """

    def __init__(self, config: AttentionConfig, hidden_size: int, *, norm_eps: float, std: float, output_std: float):
        super().__init__()
        self.config = config
        self.cache: Cache | None = None
        query_width = config.heads * (config.qk_nope_dim + config.qk_rope_dim)
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden_size, query_width, std)
        else:
            self.q_a_proj = Linear(hidden_size, config.q_lora_rank, std)
            self.q_a_layernorm = nn.RMSNorm(config.q_lora_rank, eps=norm_eps)
            self.q_b_proj = Linear(config.q_lora_rank, query_width, std)
        self.kv_a_proj_with_mqa = Linear(hidden_size, config.kv_lora_rank + config.qk_rope_dim, std)
        self.kv_a_layernorm = nn.RMSNorm(config.kv_lora_rank, eps=norm_eps)
        self.kv_b_proj = Linear(config.kv_lora_rank, config.heads * (config.qk_nope_dim + config.v_dim), std)
        self.o_proj = Linear(config.heads * config.v_dim, hidden_size, output_std)

    def forward(self, hidden_BTD: Tensor, context: AttentionContext) -> Tensor:
        """Returns [B, T, D] in the dtype of `hidden_BTD`."""
        query = self._query(hidden_BTD, context)
        key, value = self._key_value(hidden_BTD, context)
        seen = None
        if self.cache is not None:
            key, value = self.cache.extend(key, value)
            seen = self.cache.seen()
        scale = attention_scale(query.shape[-1], self.config.rope_scaling)
        return self.o_proj(attend(query, key, value, context.documents, scale, seen).flatten(2))

    def _query(self, hidden_BTD: Tensor, context: AttentionContext) -> Tensor:
        config = self.config
        if config.q_lora_rank is None:
            query = self.q_proj(hidden_BTD)
        else:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_BTD)))
        query = query.unflatten(-1, (config.heads, -1))
        nope, rope = query.split((config.qk_nope_dim, config.qk_rope_dim), dim=-1)
        return torch.cat((nope, rotate(rope, context.cosine_BTP, context.sine_BTP)), dim=-1)

    def _key_value(self, hidden_BTD: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        config = self.config
        latent, rope = self.kv_a_proj_with_mqa(hidden_BTD).split((config.kv_lora_rank, config.qk_rope_dim), dim=-1)
        unpacked = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (config.heads, -1))
        nope, value = unpacked.split((config.qk_nope_dim, config.v_dim), dim=-1)
        rope = rotate(rope.unsqueeze(-2), context.cosine_BTP, context.sine_BTP).expand(-1, -1, config.heads, -1)
        return torch.cat((nope, rope), dim=-1), value
