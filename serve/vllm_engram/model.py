"""The model as vLLM runs it: a batch's tokens side by side, whatever requests they are of.

Shape suffixes: T tokens of a batch, D hidden, M branches, N ids of an n-gram, V vocabulary.
"""

from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import cached_file
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe import fused_moe_make_expert_params_mapping
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.deepseek_v2 import DeepseekV2MLP, DeepseekV2MoE

from .addresses import Addresses
from .config import EngramConfig
from .history import History
from .layers import Attention, Engram, HyperConnection
from .tables import Table, Tables


class Block(nn.Module):
    """Engram where there is one, attention, then a dense network or experts."""

    def __init__(self, vllm_config: VllmConfig, config: EngramConfig, layer: int, prefix: str) -> None:
        super().__init__()
        quantization, hidden = vllm_config.quant_config, config.hidden_size
        has_engram = layer in config.engram_layers
        self.engram = Engram(vllm_config, config, f"{prefix}.engram") if has_engram else None
        self.input_layernorm = RMSNorm(hidden, eps=config.rms_norm_eps)
        self.self_attn = Attention(vllm_config, config, f"{prefix}.self_attn")
        self.post_attention_layernorm = RMSNorm(hidden, eps=config.rms_norm_eps)
        if config.n_routed_experts is not None and layer >= config.first_k_dense_replace:
            self.mlp = DeepseekV2MoE(
                config, vllm_config.parallel_config, quantization, prefix=f"{prefix}.mlp",
                apply_routed_scale_to_output=True,
            )  # fmt: skip
        else:
            self.mlp = DeepseekV2MLP(hidden, config.intermediate_size, "silu", quantization, prefix=f"{prefix}.mlp")
        branched = config.branches > 1
        self.attn_hyper_connection: Any = HyperConnection(config) if branched else None
        self.mlp_hyper_connection: Any = HyperConnection(config) if branched else None

    def forward(self, stream_TMD: Tensor, memory: Future[Tensor] | None, positions_T: Tensor) -> Tensor:
        """Returns the residual stream [T, M, D] after the block."""
        dtype = stream_TMD.dtype
        if self.engram is not None:
            stream_TMD = stream_TMD + self.engram(stream_TMD, memory, positions_T)

        def attention(hidden_TD: Tensor) -> Tensor:
            return self.self_attn(self.input_layernorm(hidden_TD), positions_T)

        def network(hidden_TD: Tensor) -> Tensor:
            return self.mlp(self.post_attention_layernorm(hidden_TD))

        if self.attn_hyper_connection is None:
            hidden_TD = stream_TMD.squeeze(1)
            hidden_TD = hidden_TD + attention(hidden_TD)
            return (hidden_TD + network(hidden_TD)).unsqueeze(1)
        wide_TMD = stream_TMD.float()
        for connection, sublayer in ((self.attn_hyper_connection, attention), (self.mlp_hyper_connection, network)):
            pre, post, res = connection(wide_TMD, dtype)
            output_TD = sublayer((pre.unsqueeze(1) @ wide_TMD).squeeze(1).to(dtype))
            wide_TMD = res @ wide_TMD + post.unsqueeze(-1) * output_TD.float().unsqueeze(1)
        return wide_TMD.to(dtype)


class EngramModel(nn.Module):
    """Token ids to normalised hidden states."""

    def __init__(self, vllm_config: VllmConfig, config: EngramConfig, prefix: str) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=f"{prefix}.embed_tokens"
        )
        self.layers = nn.ModuleList(
            Block(vllm_config, config, layer, f"{prefix}.layers.{layer}") for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if config.engram:
            numbers = config.engram["addresses"]
            self.compressed_ids = nn.Parameter(torch.zeros(config.vocab_size, dtype=torch.int64), requires_grad=False)
            self.addresses = Addresses(numbers)
            back = [*range(1, max(numbers["orders"]))]
            self.history = History(
                1, torch.int64, back, numbers["pad_id"], f"{prefix}.layers.{config.engram_layers[0]}.engram.ids"
            )
            self.tables = Tables([Table(_files(vllm_config, entry)) for entry in config.engram["tables"]])

    def forward(self, input_ids_T: Tensor, positions_T: Tensor) -> Tensor:
        """Returns [T, D]. The rows of all layers are under way before the first one begins."""
        memory = dict(zip(self.config.engram_layers, self._memory(input_ids_T, positions_T), strict=True))
        stream_TMD = self.embed_tokens(input_ids_T).unsqueeze(1).expand(-1, self.config.branches, -1)
        for layer, block in enumerate(self.layers):
            stream_TMD = block(stream_TMD, memory.get(layer), positions_T)
        return self.norm(stream_TMD.mean(dim=1))

    def _memory(self, input_ids_T: Tensor, positions_T: Tensor) -> list[Future[Tensor]]:
        if not self.config.engram:
            return []
        ids_T1 = self.compressed_ids[input_ids_T].unsqueeze(1)
        ids_TN = torch.cat([ids_T1, self.history(ids_T1, positions_T).squeeze(2)], dim=1)
        return self.tables.fetch(self.addresses(ids_TN))


def _files(vllm_config: VllmConfig, entry: dict[str, Any]) -> list[Path]:
    """A table's files: of the export's folder, or of a repository of that name."""
    told = vllm_config.model_config
    return [Path(cached_file(told.model, file, revision=told.revision)) for file in entry["files"]]


class EngramForCausalLM(nn.Module):
    """The model with its output head."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        self.model = EngramModel(vllm_config, config, f"{prefix}.model".lstrip("."))
        self.lm_head = (
            self.model.embed_tokens
            if config.tie_word_embeddings
            else ParallelLMHead(config.vocab_size, config.hidden_size, prefix=f"{prefix}.lm_head".lstrip("."))
        )
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Embeddings [T, D]; vLLM asks every model for them."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self, input_ids: Tensor, positions: Tensor, intermediate_tensors: Any = None, inputs_embeds: Any = None
    ) -> Tensor:
        """Hidden states [T, D] of a batch's tokens (int [T]) at these positions of their requests."""
        return self.model(input_ids, positions)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits [T, V]."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Takes the tensors of an export; returns the names of those that were filled."""
        experts = fused_moe_make_expert_params_mapping(
            self, "gate_proj", "down_proj", "up_proj", self.config.n_routed_experts or 0
        )
        parameters, loaded = dict(self.named_parameters()), set()
        for name, tensor in weights:
            options: tuple[Any, ...] = ()
            if ".mlp.experts." in name:
                target, part, expert, shard = next(entry for entry in experts if entry[1] in name)
                name, options = name.replace(part, target), (name.replace(part, target), shard, expert)
            else:
                for number, part in enumerate(("gate_proj", "up_proj")):
                    if f".{part}." in name:
                        name, options = name.replace(part, "gate_up_proj"), (number,)
            parameter = parameters[name]
            getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor, *options)
            loaded.add(name)
        return loaded
