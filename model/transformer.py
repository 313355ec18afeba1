"""The language model: embedding, blocks, head.

Submodules bear the names of Hugging Face's DeepSeek-V3 (`model.layers.N.self_attn`, `.mlp`, ...), which DeepSpeed
looks for; `.engram` is ours. Matrices are drawn from normal(0, init_std); those that write attention's and the
feed-forward networks' results into the residual stream from normal(0, init_std / sqrt(2 num_layers)), as in GPT-2.

Shape suffixes: B batch, T sequence, M branches of the residual stream, D hidden, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import Attention, AttentionContext, attention_context
from model.balance import counted_once, sequence_balance
from model.config import ModelConfig
from model.engram import Engram, MemoryRows
from model.hyper_connections import BranchedStream, HyperConnection, replicate
from model.layers import Embedding, Linear
from model.loss import IGNORED, linear_cross_entropy
from model.mlp import SwiGLU
from model.moe import MoE


class Block(nn.Module):
    """Engram where the config has one here, attention, then a dense network or experts.

    Each result is added to the residual stream; with hyper-connections, Engram's to all branches, the others' by them.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        size, eps, std = config.hidden_size, config.norm_eps, config.init_std
        output_std = std / math.sqrt(2 * config.num_layers)
        branches = config.branches
        self.engram = None
        if config.engram is not None and layer in config.engram.layers:
            self.engram = Engram(config.engram, size, branches=branches, norm_eps=eps, std=std)
        self.input_layernorm = nn.RMSNorm(size, eps=eps)
        self.self_attn = Attention(config.attention, size, norm_eps=eps, std=std, output_std=output_std)
        self.post_attention_layernorm = nn.RMSNorm(size, eps=eps)
        self.mlp: nn.Module
        if config.moe is not None and config.has_experts(layer):
            self.mlp = MoE(config.moe, size, std=std, output_std=output_std)
        else:
            self.mlp = SwiGLU(size, config.dense_hidden_size, std=std, output_std=output_std)
        wants_balance = config.has_experts(layer) and config.moe is not None and config.moe.sequence_balance_factor > 0
        self.balanced_choices = config.moe.experts_per_token if config.moe and wants_balance else None

        self.attn_hyper_connection = self.mlp_hyper_connection = None
        if config.hyper_connections is not None and branches > 1:
            mappings = config.hyper_connections
            self.attn_hyper_connection = HyperConnection(mappings, size, sublayer=2 * layer, norm_eps=eps)
            self.mlp_hyper_connection = HyperConnection(mappings, size, sublayer=2 * layer + 1, norm_eps=eps)

    def forward(
        self, stream: Tensor, context: AttentionContext, positions_BT: Tensor, memory: MemoryRows | None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the residual stream after the block, and its `sequence_balance` [B] if the config wants one.

        The stream is [B, T, D], or [B, T, M, D] with M > 1 branches. `memory` is given where the block has Engram.
        """
        if self.attn_hyper_connection is None or self.mlp_hyper_connection is None:
            return self._plain(stream, context, positions_BT, memory)
        if self.engram is not None:
            stream = stream + self.engram(stream, memory, positions_BT)
        branched = BranchedStream(stream)
        hidden_BTD = branched.read(self.attn_hyper_connection)
        branched.write(self.self_attn(self.input_layernorm(hidden_BTD), context))
        hidden_BTD = branched.read(self.mlp_hyper_connection)
        hidden_BTD = self.post_attention_layernorm(hidden_BTD)
        branched.write(self.mlp(hidden_BTD))
        return branched.merged(), self._balance(hidden_BTD)

    def _plain(
        self, hidden_BTD: Tensor, context: AttentionContext, positions_BT: Tensor, memory: MemoryRows | None
    ) -> tuple[Tensor, Tensor | None]:
        if self.engram is not None:
            hidden_BTD = hidden_BTD + self.engram(hidden_BTD.unsqueeze(2), memory, positions_BT).squeeze(2)
        hidden_BTD = hidden_BTD + self.self_attn(self.input_layernorm(hidden_BTD), context)
        normed_BTD = self.post_attention_layernorm(hidden_BTD)
        return hidden_BTD + self.mlp(normed_BTD), self._balance(normed_BTD)

    def _balance(self, hidden_BTD: Tensor) -> Tensor | None:
        moe: Any = self.mlp
        return sequence_balance(moe, hidden_BTD, self.balanced_choices) if self.balanced_choices else None


class Transformer(nn.Module):
    """Everything but the head: token ids to normalised hidden states."""

    def __init__(self, config: ModelConfig, *, recompute: bool = False) -> None:
        """`recompute` keeps only the stream between blocks for the backward, which computes each block again."""
        super().__init__()
        self.config = config
        self.recompute = recompute
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, config.init_std)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)

    def forward(
        self, tokens_BT: Tensor, positions_BT: Tensor, memory: Sequence[MemoryRows] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """Returns hidden states [B, T, D], and the sum over the layers of `sequence_balance` [B] if there is any.

        Arguments as for `LanguageModel`.
        """
        layers = self.config.engram.layers if self.config.engram else []
        if len(memory) != len(layers):
            raise ValueError(f"memory rows of {len(memory)} tables were given, but Engram layers are {layers}")
        memory_of = dict(zip(layers, memory, strict=True))
        stream = self.embed_tokens(tokens_BT)
        context = attention_context(positions_BT, self.config.attention, stream.dtype)
        branches = self.config.branches
        if branches > 1:
            stream = replicate(stream, branches)
        balances: list[Tensor] = []
        for layer, block in enumerate(self.layers):
            inputs = stream, context, positions_BT, memory_of.get(layer)
            recompute = self.recompute and torch.is_grad_enabled()
            stream, balance_B = _recomputed(block, *inputs) if recompute else block(*inputs)
            balances += [] if balance_B is None else [balance_B]
        hidden_BTD = self.norm(stream.mean(dim=2) if branches > 1 else stream)
        return hidden_BTD, torch.stack(balances).sum(dim=0) if balances else None


class Head(Linear):
    """Hidden states to logits, or to the loss.

    Both are this module's forward, so that hooks that gather its weight, such as ZeRO 3's, run for both.
    """

    def forward(
        self,
        hidden_BTD: Tensor,
        labels_BT: Tensor | None = None,
        tell: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Returns logits [B, T, V], or with labels their summed cross-entropy (see `model.loss`).

        `tell` is given each label's, [B, T], without a gradient.
        """
        if labels_BT is None:
            return super().forward(hidden_BTD)
        losses_BT = None
        if tell is not None:
            losses_BT = hidden_BTD.new_empty(
                labels_BT.shape, dtype=torch.promote_types(hidden_BTD.dtype, torch.float32)
            )
        loss = linear_cross_entropy(
            hidden_BTD.flatten(0, 1),
            self.weight,
            labels_BT.flatten(),
            losses_N=None if losses_BT is None else losses_BT.view(-1),
        )
        if tell is not None and losses_BT is not None:
            tell(losses_BT)
        return loss


class LanguageModel(nn.Module):
    """A decoder-only language model, drawn from torch's global generator.

    Example:
        >>> model = LanguageModel(ModelConfig(vocab_size=512))
        >>> loss_sum = model(tokens_BT, positions_BT, labels_BT=labels_BT)
    """

    # Buffers that DeepSpeed leaves in fp32 when it casts, before and after it renames their modules.
    _keep_in_fp32_modules_strict = ("e_score_correction_bias", "tokens_per_expert")

    def __init__(self, config: ModelConfig, *, recompute: bool = False) -> None:
        """`recompute` (activation checkpointing) as for `Transformer`."""
        super().__init__()
        self.config = config
        self.model = Transformer(config, recompute=recompute)
        self.lm_head = Head(config.hidden_size, config.vocab_size, config.init_std)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor,
        memory: Sequence[MemoryRows] = (),
        labels_BT: Tensor | None = None,
        tell: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Returns the summed loss, or the logits.

        Args:
            tokens_BT: int64 token ids.
            positions_BT: int64 position within the token's document; 0 begins a document. The first column is 0.
            memory: one `MemoryRows` for each of the config's `engram.layers`, in that order.
            labels_BT: int64 next tokens, `IGNORED` where there is no loss.
            tell: is given each label's cross-entropy [B, T], in fp32 and without a gradient; 0 where there is no label.

        Returns:
            With labels: fp32 scalar, the *sum* of the cross-entropies in nats over labels that are not `IGNORED`;
            0, with zero gradients, if all are. Without: logits [B, T, V] in the parameters' dtype. With
            `moe.sequence_balance_factor` the gradient, but not the value, includes this factor times the balance loss
            of all layers, for each label: the mean over the labels is that of the loss plus the factored balance.

        Raises:
            ValueError: there is not one `MemoryRows` for each Engram layer, or one has another batch shape.
        """
        hidden_BTD, balance_B = self.model(tokens_BT, positions_BT, memory)
        result = self.lm_head(hidden_BTD, labels_BT, tell)
        if labels_BT is None or balance_B is None:
            return result
        return result + self._balance_gradient(balance_B, labels_BT)

    def _balance_gradient(self, balance_B: Tensor, labels_BT: Tensor) -> Tensor:
        """Zero, with the gradient of the balance loss: each sequence's weighs as much as its labels."""
        assert self.config.moe is not None
        total = (balance_B * (labels_BT != IGNORED).sum(dim=1)).sum() * self.config.moe.sequence_balance_factor
        return total - total.detach()


def _recomputed(block: nn.Module, *inputs: object) -> tuple[Tensor, Tensor | None]:
    outputs: tuple[Tensor, Tensor | None] = checkpoint(
        block,
        *inputs,
        use_reentrant=False,  # the gradients of tables' rows, within a tuple, would be lost otherwise
        preserve_rng_state=False,  # nothing is drawn
        context_fn=lambda: (nullcontext(), counted_once(block)),
    )
    return outputs
