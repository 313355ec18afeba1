"""Multi-head latent attention (DeepSeek-V2 paper, section 2.1), within documents.

Shape suffixes: B batch, T sequence, D hidden, H heads, P rotary pairs, V value columns.
"""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import AttentionConfig
from model.layers import Linear
from model.rotary import rotary_angles, rotate


class AttentionContext(NamedTuple):
    """What all layers share; it follows from the positions alone."""

    mask_B1TT: Tensor
    """Added to the logits, in the compute dtype: 0 where the query may see the key, -inf elsewhere."""
    cosine_BTP: Tensor
    """Rotary cosines, fp32."""
    sine_BTP: Tensor
    """Rotary sines, fp32."""


def attention_context(positions_BT: Tensor, config: AttentionConfig, dtype: torch.dtype) -> AttentionContext:
    """Builds it from int64 positions within documents: a token sees itself and earlier tokens of its own document."""
    length = positions_BT.shape[1]
    document_BT = (positions_BT == 0).cumsum(dim=1)
    same_BTT = document_BT.unsqueeze(2) == document_BT.unsqueeze(1)
    causal_TT = torch.ones(length, length, dtype=torch.bool, device=positions_BT.device).tril()
    mask_BTT = torch.zeros(same_BTT.shape, dtype=dtype, device=positions_BT.device)
    mask_BTT.masked_fill_(~(same_BTT & causal_TT), float("-inf"))
    return AttentionContext(mask_BTT.unsqueeze(1), *rotary_angles(positions_BT, config.qk_rope_dim, config.rope_theta))


class Cache(Protocol):
    """Keys and values of a text's earlier tokens; see `model.decoding`."""

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Takes those of new tokens; returns those of all tokens so far."""


class Attention(nn.Module):
    """Queries, keys and values through narrow latents; one rotary key shared by all heads.

    Submodules bear the names of Hugging Face's DeepSeek-V3. The scale is 1/sqrt(qk_nope_dim + qk_rope_dim).
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
        if self.cache is not None:
            key, value = self.cache.extend(key, value)
        mixed_BHTV = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=context.mask_B1TT
        )
        return self.o_proj(mixed_BHTV.transpose(1, 2).flatten(2))

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
