"""Models and batches small enough for a unit test."""

from typing import Any

import torch
from torch import Tensor

from kernels.gather import row_index
from model.config import AttentionConfig, EngramConfig, HyperConnectionsConfig, ModelConfig, MoEConfig
from model.engram import MemoryRows
from model.transformer import LanguageModel

VOCABULARY = 61
ATTENTION = AttentionConfig(heads=2, q_lora_rank=12, kv_lora_rank=8, qk_nope_dim=6, qk_rope_dim=4, v_dim=8)
MOE = MoEConfig(num_experts=6, experts_per_token=2, shared_experts=1, expert_hidden_size=16, routed_scaling_factor=1.5)
ENGRAM = EngramConfig(layers=[1, 2], orders=[2, 3], heads=2, rows_per_head=50, row_dim=8)
HYPER_CONNECTIONS = HyperConnectionsConfig(expansion=3)


def tiny_config(**changes: Any) -> ModelConfig:
    """Three blocks: dense, then two of experts with Engram; `changes` are fields of `ModelConfig`."""
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_layers": 3,
        "dense_layers": 1,
        "dense_hidden_size": 32,
        "attention": ATTENTION,
        "moe": MOE,
        "engram": ENGRAM,
    }
    return ModelConfig(**{**fields, **changes})


def tiny_model(dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> LanguageModel:
    """A model of `tiny_config`, with convolutions, choice biases and hyper-connections away from their start."""
    torch.manual_seed(seed)
    model = LanguageModel(tiny_config(**changes))
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith(("convolution.weight", "e_score_correction_bias")):
                tensor.normal_(std=0.1)
            elif "hyper_connection" in name:
                tensor.add_(torch.randn_like(tensor), alpha=0.3)
    return model.to(dtype)


def positions(*document_lengths: int, batch: int = 1) -> Tensor:
    """[batch, sum of lengths]: positions within documents that follow each other."""
    return torch.cat([torch.arange(length) for length in document_lengths]).repeat(batch, 1)


def random_tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def random_memory(config: EngramConfig, batch: int, length: int, dtype: torch.dtype = torch.float32) -> MemoryRows:
    """Rows with values of order one, and random lookups of them."""
    generator = torch.Generator().manual_seed(2)
    rows_UD = torch.randn(40, config.row_dim, generator=generator, dtype=dtype).requires_grad_()
    index_N = torch.randint(40, (batch * length * config.lookups_per_token,), generator=generator)
    return MemoryRows(rows_UD, row_index(index_N, 40))


def memories(model: LanguageModel, batch: int, length: int, dtype: torch.dtype = torch.float32) -> list[MemoryRows]:
    """What `model` needs for one batch."""
    engram = model.config.engram
    return [random_memory(engram, batch, length, dtype) for _ in engram.layers] if engram else []
