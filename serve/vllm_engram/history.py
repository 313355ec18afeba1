"""What tokens look back to, kept in pages of vLLM's cache: one more layer that shares the blocks of keys and values.

So it follows its request wherever the scheduler takes it: other batches, prompts in chunks, prefixes that requests
share, guesses that are taken back. Shape suffixes: T tokens of a batch, K earlier tokens of each, W width.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from .pages import earlier, keep, request_of


@dataclass
class Batch:
    """Where a batch's tokens lie: the part of vLLM's description of it that is needed here."""

    tokens: int
    starts_R1: Tensor
    blocks_RB: Tensor
    slots_T: Tensor


class BatchBuilder(AttentionMetadataBuilder[Batch]):
    """Makes a `Batch` of what vLLM tells."""

    def __init__(self, *told: Any) -> None:
        super().__init__(*told)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Batch:
        """As for vLLM's own."""
        told = common_attn_metadata
        return Batch(told.num_actual_tokens, told.query_start_loc, told.block_table_tensor, told.slot_mapping)


class HistoryBackend(AttentionBackend):
    """Says that nothing here computes attention."""

    supported_dtypes: ClassVar = [torch.float16, torch.bfloat16, torch.float32]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        """Its name in vLLM's logs."""
        return "ENGRAM_HISTORY"

    @staticmethod
    def get_impl_cls() -> Any:
        """There is none."""
        raise NotImplementedError

    @staticmethod
    def get_builder_cls() -> type[BatchBuilder]:
        """What describes a batch."""
        return BatchBuilder


class History(nn.Module, AttentionLayerBase):
    """Values of a request's tokens, by their positions.

    Args:
        width: of a token's values.
        dtype: theirs.
        distances: how far back tokens look, at least 1 each.
        empty: what stands before a request's first token.
        prefix: the layer's name.
    """

    supports_dcp = False

    def __init__(self, width: int, dtype: torch.dtype, distances: list[int], empty: float, prefix: str) -> None:
        super().__init__()
        self.width, self.dtype, self.distances, self.empty, self.prefix = width, dtype, distances, empty, prefix
        self.pages = torch.empty(0)
        get_current_vllm_config().compilation_config.static_forward_context[prefix] = self

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Takes the pages that vLLM has for this layer: [blocks, 1, tokens of a block, width]."""
        super().bind_kv_cache(kv_cache)
        self.pages = kv_cache.squeeze(1)

    def get_attn_backend(self) -> type[AttentionBackend]:
        """As for vLLM's own layers."""
        return HistoryBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """A page of a key as wide as the values, and no value; for all tokens, as the layers of attention have them."""
        return FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=self.width,
            head_size_v=0,
            dtype=self.dtype,
        )

    def forward(self, new_TW: Tensor, positions_T: Tensor) -> Tensor:
        """Keeps the values of a batch's tokens; returns those [T, K, W] at the distances before each."""
        told: Any = get_forward_context().attn_metadata
        if told is None:  # a batch of no requests, by which vLLM measures memory
            return new_TW.new_full((len(new_TW), len(self.distances), self.width), self.empty)
        batch: Batch = told[self.prefix]
        keep(self.pages, new_TW[: batch.tokens], batch.slots_T[: batch.tokens])
        request_T = request_of(batch.starts_R1, len(new_TW))
        return earlier(self.pages, positions_T, request_T, batch.blocks_RB, self.distances, self.empty)
