"""A language model with Engram memory (arXiv 2601.07372), for Hugging Face's transformers.

The backbone is a DeepSeek-V3: multi-head latent attention, mixture of experts; with `hyper_connections` its residual
stream has branches. Some layers begin with Engram, which reads rows that the last tokens' n-grams address. The tables
are no parameters: they stay in the files beside the model, memory-mapped, and may be larger than memory.

Shape suffixes: B batch, T tokens of a call, L tokens so far, D hidden, M branches, H heads, P rotary pairs, E memory
width, S sub-tables (orders x heads), N tokens or lookups, K experts per token.
"""

import json
import math
import os
import shutil
import warnings
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import cached_file

from .configuration_engram import EngramConfig

_GATE_CLAMP = 1e-6
_SINKHORN_LOWEST = -60.0
_FETCHING = ("cache_dir", "revision", "token", "local_files_only", "subfolder")


class Table:
    """The rows of one layer's memory, in safetensors files of one tensor each.

    Args:
        files: in the order of the rows.
        placement: see `EngramConfig.table_placement`.
    """

    def __init__(self, files: list[Path], placement: str) -> None:
        if placement not in ("mapped", "cpu", "model"):
            raise ValueError(f"table_placement is {placement}: set it to mapped, cpu or model")
        self.files, self.placement = files, placement
        self.parts = [_mapped(file) for file in files]
        if placement != "mapped":
            self.parts = [torch.cat([part.clone() for part in self.parts])]
        self.starts = torch.tensor([0, *(len(part) for part in self.parts)]).cumsum(0)

    def __call__(self, rows_N: Tensor) -> Tensor:
        """The values [N, row_dim] of rows (int64 [N]), on the device of the rows."""
        if self.placement == "model":
            self.parts = [part.to(rows_N.device) for part in self.parts]
        if len(self.parts) == 1:
            return self.parts[0][rows_N.to(self.parts[0].device)].to(rows_N.device)
        rows = rows_N.cpu()
        values = self.parts[0].new_empty(len(rows), self.parts[0].shape[1])
        part_N = torch.bucketize(rows, self.starts, right=True) - 1
        for number in part_N.unique().tolist():
            here = part_N == number
            values[here] = self.parts[number][rows[here] - self.starts[number]]
        return values.to(rows_N.device)


def _mapped(file: Path) -> Tensor:
    """The only tensor of a safetensors file, read-only and memory-mapped: pages that are read can be dropped again."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    (entry,) = (value for name, value in header.items() if name != "__metadata__")
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[entry["dtype"]]
    shape = (entry["shape"][0], entry["shape"][1] * dtype.itemsize)
    data = np.memmap(file, np.uint8, "r", 8 + length + entry["data_offsets"][0], shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not writable is what is wanted
        return torch.from_numpy(data).view(dtype)


class EngramCacheLayer(DynamicLayer):
    """A layer's attention cache, and the last tokens that its Engram looks back to.

    What is looked back to is reordered, repeated and selected with the rest. To be cropped it must be recorded:
    `activate_past_recording` is called before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.past: dict[str, Tensor] = {}
        self.reach: dict[str, int] = {}
        self.record_past = False

    def look_back(self, name: str, new: Tensor, reach: int, empty: float) -> Tensor:
        """`new` [B, T, ...] after the `reach` tokens before it, which are `empty` before the first one."""
        whole = torch.cat([self.past.get(name, _nothing(new, reach, empty)), new], dim=1)
        self.reach[name] = reach
        self.past[name] = whole if self.record_past else whole[:, whole.shape[1] - reach :]
        return whole[:, whole.shape[1] - reach - new.shape[1] :]

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` leaves no trace."""
        return self.record_past

    def activate_past_recording(self) -> None:
        """Keeps all that Engram looked back to from now on."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens, and what was recorded beyond need."""
        if not self.record_past:
            raise RuntimeError("call activate_past_recording on the cache before what is to be cropped")
        super().crop(tokens_to_remove)
        for name, past in self.past.items():
            end = past.shape[1] - abs(tokens_to_remove)
            self.past[name] = past[:, end - self.reach[name] : end]

    def reset(self) -> None:
        """Forgets all."""
        super().reset()
        self.past = {}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes the rows `beam_idx` of the batch, as beams continue each other."""
        super().reorder_cache(beam_idx)
        self._each(lambda past: past.index_select(0, beam_idx.to(past.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row of the batch."""
        super().batch_repeat_interleave(repeats)
        self._each(lambda past: past.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows of the batch."""
        super().batch_select_indices(indices)
        self._each(lambda past: past[indices])

    def _each(self, change: Any) -> None:
        self.past = {name: change(past) for name, past in self.past.items()}


def _nothing(new: Tensor, reach: int, empty: float) -> Tensor:
    return new.new_full((new.shape[0], reach, *new.shape[2:]), empty)


class Context:
    """What all layers share in a call: who sees whom, rotary angles, and where documents begin.

    Args:
        attention_mask: [B, L], 0 for padding; None for none.
        position_ids: [B, T] within documents; None to count the tokens that are no padding.
        cache: of the tokens before; None without.
        hidden: of the call [B, T, D], for its shape and device.
    """

    def __init__(
        self,
        config: EngramConfig,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        hidden: Tensor,
    ) -> None:
        batch, length = hidden.shape[:2]
        self.cache = cache
        past = cache.get_seq_length() if cache is not None else 0
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"attention_mask has {attention_mask.dim()} dimensions: give one of shape [batch, length]")
        packed = position_ids is not None and attention_mask is None and past == 0
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -length:]
        elif position_ids is None:
            position_ids = torch.arange(past, past + length, device=hidden.device).unsqueeze(0)
        self.positions_BT = position_ids.to(hidden.device).expand(batch, length)
        self.real_BT = None if attention_mask is None else attention_mask[:, -length:].to(hidden.device).bool()
        self.mask = self._mask(attention_mask, past, packed)
        self.cosine_BTP, self.sine_BTP = _rotary_angles(config, self.positions_BT)

    def _mask(self, attention_mask: Tensor | None, past: int, packed: bool) -> Tensor | None:
        """[B, 1, T, L], true where a token sees another; None if it sees all before it."""
        positions_BT = self.positions_BT
        length, device = positions_BT.shape[1], positions_BT.device
        padded = attention_mask is not None and not bool(attention_mask.all())
        packed = packed and bool((positions_BT[:, 1:] == 0).any())
        if not padded and not packed and (past == 0 or length == 1):
            return None
        place_L = torch.arange(past + length, device=device)
        seen_BTL = (place_L <= place_L[past:].unsqueeze(1)).unsqueeze(0)
        if packed:
            document_BT = (positions_BT == 0).cumsum(dim=1)
            seen_BTL = seen_BTL & (document_BT.unsqueeze(2) == document_BT.unsqueeze(1))
        if padded and attention_mask is not None:
            seen_BTL = seen_BTL & attention_mask.to(device).bool().unsqueeze(1)
            seen_BTL |= place_L == place_L[past:].unsqueeze(1)  # itself: a row that sees nothing would be NaN
        return seen_BTL.unsqueeze(1)


def _rotary_angles(config: EngramConfig, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine [B, T, P] of position * frequency, in fp32; with YaRN (arXiv 2309.00071) interpolated."""
    rope: Any = config.rope_parameters
    columns = config.qk_rope_head_dim
    theta, device = rope["rope_theta"], positions_BT.device
    exponent = torch.arange(0, columns, 2, dtype=torch.float32, device=device) / columns
    frequency = theta**-exponent
    if rope["rope_type"] == "yarn":
        length = rope["original_max_position_embeddings"]

        def pair_that_turns(times: float) -> float:
            return columns * math.log(length / (2 * math.pi * times)) / (2 * math.log(theta))

        first = max(math.floor(pair_that_turns(rope["beta_fast"])), 0)
        last = min(math.ceil(pair_that_turns(rope["beta_slow"])), columns - 1)
        pair = torch.arange(columns // 2, dtype=torch.float32, device=device)
        share = ((pair - first) / (last - first if last > first else 1e-3)).clamp(0, 1)
        frequency = frequency * (1 - share) + frequency / rope["factor"] * share
    angle = positions_BT.float().unsqueeze(-1) * frequency
    return angle.cos(), angle.sin()


def _rotate(x_BTHR: Tensor, context: Context) -> Tensor:
    """Turns each pair of columns (2p, 2p + 1) by its angle."""
    even, odd = x_BTHR[..., 0::2], x_BTHR[..., 1::2]
    cosine, sine = context.cosine_BTP.unsqueeze(2), context.sine_BTP.unsqueeze(2)
    turned = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1)
    return turned.flatten(-2).to(x_BTHR.dtype)


class Attention(nn.Module):
    """Multi-head latent attention; the cache holds the latents and the one rotary key of all heads."""

    def __init__(self, config: EngramConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.heads, self.nope, self.rope = (
            layer, config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim,
        )  # fmt: skip
        self.latent, self.value = config.kv_lora_rank, config.v_head_dim
        hidden, eps, width = config.hidden_size, config.rms_norm_eps, self.heads * (self.nope + self.rope)
        self.compressed = config.q_lora_rank is not None
        if config.q_lora_rank is not None:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=False)
            self.q_a_layernorm = nn.RMSNorm(config.q_lora_rank, eps=eps)
            self.q_b_proj = nn.Linear(config.q_lora_rank, width, bias=False)
        else:
            self.q_proj = nn.Linear(hidden, width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.latent + self.rope, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(self.latent, eps=eps)
        self.kv_b_proj = nn.Linear(self.latent, self.heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value, hidden, bias=False)
        rope: Any = config.rope_parameters
        self.scale = (self.nope + self.rope) ** -0.5
        if rope["rope_type"] == "yarn":
            self.scale *= (0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1) ** 2

    def forward(self, hidden_BTD: Tensor, context: Context) -> Tensor:
        """Returns [B, T, D]."""
        compressed = self.q_a_layernorm(self.q_a_proj(hidden_BTD)) if self.compressed else hidden_BTD
        query = (self.q_b_proj if self.compressed else self.q_proj)(compressed).unflatten(-1, (self.heads, -1))
        query_nope, query_rope = query.split((self.nope, self.rope), dim=-1)
        query = torch.cat((query_nope, _rotate(query_rope, context)), dim=-1).transpose(1, 2)
        latent, rope = self.kv_a_proj_with_mqa(hidden_BTD).split((self.latent, self.rope), dim=-1)
        latent, rope = self.kv_a_layernorm(latent).unsqueeze(1), _rotate(rope.unsqueeze(2), context).transpose(1, 2)
        if context.cache is not None:
            latent, rope = context.cache.update(latent, rope, self.layer)
        unpacked = self.kv_b_proj(latent.squeeze(1)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        nope, value = unpacked.split((self.nope, self.value), dim=-1)
        key = torch.cat((nope, rope.expand(-1, self.heads, -1, -1)), dim=-1)
        causal = context.mask is None and query.shape[2] > 1
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=context.mask, is_causal=causal, scale=self.scale
        )
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """A gated feed-forward network."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Maps the last dimension."""
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class Router(nn.Module):
    """Chooses experts by sigmoid scores and a bias, in fp32."""

    e_score_correction_bias: Tensor

    def __init__(self, config: EngramConfig) -> None:
        super().__init__()
        self.config = config
        experts = config.n_routed_experts or 0
        self.weight = nn.Parameter(torch.zeros(experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(experts, dtype=torch.float32))

    def forward(self, tokens_ND: Tensor) -> tuple[Tensor, Tensor]:
        """The weights [N, K] of the chosen experts, and their numbers."""
        scores = torch.sigmoid(F.linear(tokens_ND.float(), self.weight.float()))
        chosen_NK = (scores + self.e_score_correction_bias).topk(self.config.num_experts_per_tok, sorted=False).indices
        weights_NK = scores.gather(1, chosen_NK)
        if self.config.norm_topk_prob:
            weights_NK = weights_NK / (weights_NK.sum(dim=-1, keepdim=True) + 1e-20)
        return weights_NK * self.config.routed_scaling_factor, chosen_NK


class MoE(nn.Module):
    """The weighted sum of each token's experts, plus those that every token visits."""

    def __init__(self, config: EngramConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.moe_intermediate_size
        self.gate = Router(config)
        self.experts = nn.ModuleList(MLP(hidden, inner) for _ in range(config.n_routed_experts or 0))
        self.shared_experts = MLP(hidden, config.n_shared_experts * inner) if config.n_shared_experts else None

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Returns [B, T, D]."""
        tokens_ND = hidden_BTD.flatten(0, 1)
        weights_NK, chosen_NK = self.gate(tokens_ND)
        results = tokens_ND.new_empty(*chosen_NK.shape, tokens_ND.shape[1])
        for number in chosen_NK.unique().tolist():
            token, place = (chosen_NK == number).nonzero(as_tuple=True)
            results[token, place] = self.experts[number](tokens_ND[token])
        mixed = (results * weights_NK.unsqueeze(-1)).sum(dim=1).to(hidden_BTD.dtype).view_as(hidden_BTD)
        return mixed if self.shared_experts is None else mixed + self.shared_experts(hidden_BTD)


class ShortConvolution(nn.Module):
    """x -> SiLU(Conv(RMSNorm(x))) + x: causal, depthwise, dilated by the longest n-gram."""

    def __init__(self, config: EngramConfig) -> None:
        super().__init__()
        engram, channels = config.engram, config.branches * config.hidden_size
        self.taps, self.dilation = engram["kernel_size"], max(engram["addresses"]["orders"])
        self.cross_documents, self.eps = engram["addresses"]["cross_documents"], config.rms_norm_eps
        self.norm_weight = nn.Parameter(torch.ones(channels))
        self.weight = nn.Parameter(torch.zeros(self.taps * channels))

    def forward(self, values_BTMD: Tensor, context: Context, layer: int) -> Tensor:
        """Returns [B, T, M, D]; taps that lie before a document's first token, or in padding, are zero."""
        length, branches, width = values_BTMD.shape[1:]
        if context.real_BT is not None:
            values_BTMD = values_BTMD * context.real_BT[:, :, None, None]
        reach = (self.taps - 1) * self.dilation
        whole = _look_back(context, layer, "values", values_BTMD, reach, 0)
        normed = (F.rms_norm(whole, (width,), eps=self.eps) * self.norm_weight.view(branches, width)).float()
        weight = self.weight.view(self.taps, branches, width)
        total = normed[:, reach:] * weight[0]
        for tap in range(1, self.taps):
            distance = tap * self.dilation
            earlier = normed[:, reach - distance : reach - distance + length]
            if not self.cross_documents:
                earlier = earlier.masked_fill((context.positions_BT < distance)[:, :, None, None], 0)
            total = total + earlier * weight[tap]
        return F.silu(total).to(values_BTMD.dtype) + values_BTMD


def _look_back(context: Context, layer: int, name: str, new: Tensor, reach: int, empty: float) -> Tensor:
    if context.cache is None:
        return torch.cat([_nothing(new, reach, empty), new], dim=1)
    return context.cache.layers[layer].look_back(name, new, reach, empty)


class Engram(nn.Module):
    """Gates what the tables hold for the last tokens into the residual stream (equations 3 to 6 of the paper)."""

    def __init__(self, config: EngramConfig, layer: int) -> None:
        super().__init__()
        engram, hidden, self.branches = config.engram, config.hidden_size, config.branches
        addresses = engram["addresses"]
        width = len(addresses["orders"]) * addresses["heads"] * engram["row_dim"]
        self.layer, self.eps, self.signed_sqrt = layer, engram["gate_eps"], engram["gate"] == "signed_sqrt"
        self.value_proj = nn.Linear(width, hidden, bias=False)
        self.key_projs = nn.ModuleList(nn.Linear(width, hidden, bias=False) for _ in range(self.branches))
        self.query_norm_weight = nn.Parameter(torch.ones(self.branches * hidden))
        self.key_norm_weight = nn.Parameter(torch.ones(self.branches * hidden))
        self.convolution = ShortConvolution(config) if engram["convolution"] else None

    def forward(self, stream_BTMD: Tensor, memory_BTE: Tensor, context: Context) -> Tensor:
        """What is added to the stream [B, T, M, D]."""
        memory_BTE = memory_BTE.to(stream_BTMD.device, stream_BTMD.dtype)
        key_BTMD = torch.stack([project(memory_BTE) for project in self.key_projs], dim=2)
        value_BTD = self.value_proj(memory_BTE)
        weight_MD = (self.query_norm_weight.float() * self.key_norm_weight.float()).view(self.branches, -1)
        query, key = stream_BTMD.float(), key_BTMD.float()
        scale = torch.rsqrt(query.square().mean(-1) + self.eps) * torch.rsqrt(key.square().mean(-1) + self.eps)
        score = (query * key * weight_MD).sum(-1) * scale / math.sqrt(query.shape[-1])
        if self.signed_sqrt:
            score = score.sign() * score.abs().clamp(min=_GATE_CLAMP).sqrt()
        gated_BTMD = (score.sigmoid().unsqueeze(-1) * value_BTD.float().unsqueeze(2)).to(value_BTD.dtype)
        return gated_BTMD if self.convolution is None else self.convolution(gated_BTMD, context, self.layer)


class HyperConnection(nn.Module):
    """The mappings of one sublayer in a stream of branches (mHC, arXiv 2512.24880), computed anew for every token."""

    def __init__(self, config: EngramConfig) -> None:
        super().__init__()
        self.branches, self.eps = config.branches, config.rms_norm_eps
        self.iterations = config.hyper_connections["sinkhorn_iterations"]
        outputs = self.branches * (self.branches + 2)
        self.weight = nn.Parameter(torch.zeros(outputs, self.branches * config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.alpha = nn.Parameter(torch.zeros(3))

    def forward(self, stream_BTMD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """H_pre [B, T, M], H_post [B, T, M] and H_res [B, T, M, M] in fp32; `dtype` is the model's."""
        flat = stream_BTMD.to(dtype).float().flatten(2)
        projected = F.linear(flat, self.weight.float()) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + self.eps)
        sizes = (self.branches, self.branches, self.branches**2)
        factors = torch.cat([factor.expand(size) for factor, size in zip(self.alpha.float(), sizes, strict=True)])
        pre, post, res = (projected * factors + self.bias.float()).split(sizes, dim=-1)
        res = res.unflatten(-1, (self.branches, -1))
        res = (res - res.amax(dim=-2, keepdim=True)).clamp(min=_SINKHORN_LOWEST).exp()
        for _ in range(self.iterations):
            res = res / res.sum(dim=-2, keepdim=True)
            res = res / res.sum(dim=-1, keepdim=True)
        return pre.sigmoid(), 2 * post.sigmoid(), res


class Block(nn.Module):
    """Engram where there is one, attention, then a dense network or experts."""

    def __init__(self, config: EngramConfig, layer: int) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.engram: Any = Engram(config, layer) if layer in config.engram_layers else None
        self.input_layernorm = nn.RMSNorm(hidden, eps=eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps=eps)
        has_experts = config.n_routed_experts is not None and layer >= config.first_k_dense_replace
        self.mlp = MoE(config) if has_experts else MLP(hidden, config.intermediate_size)
        branched = config.branches > 1
        self.attn_hyper_connection: Any = HyperConnection(config) if branched else None
        self.mlp_hyper_connection: Any = HyperConnection(config) if branched else None

    def forward(self, stream_BTMD: Tensor, memory_BTE: Tensor | None, context: Context) -> Tensor:
        """Returns the residual stream [B, T, M, D] after the block."""
        dtype = stream_BTMD.dtype
        if self.engram is not None:
            stream_BTMD = stream_BTMD + self.engram(stream_BTMD, memory_BTE, context)

        def attention(hidden_BTD: Tensor) -> Tensor:
            return self.self_attn(self.input_layernorm(hidden_BTD), context)

        def network(hidden_BTD: Tensor) -> Tensor:
            return self.mlp(self.post_attention_layernorm(hidden_BTD))

        if self.attn_hyper_connection is None:
            hidden_BTD = stream_BTMD.squeeze(2)
            hidden_BTD = hidden_BTD + attention(hidden_BTD)
            return (hidden_BTD + network(hidden_BTD)).unsqueeze(2)
        wide_BTMD = stream_BTMD.float()
        for connection, sublayer in ((self.attn_hyper_connection, attention), (self.mlp_hyper_connection, network)):
            pre, post, res = connection(wide_BTMD, dtype)
            output_BTD = sublayer((pre.unsqueeze(2) @ wide_BTMD).squeeze(2).to(dtype))
            wide_BTMD = res @ wide_BTMD + post.unsqueeze(-1) * output_BTD.float().unsqueeze(2)
        return wide_BTMD.to(dtype)


class EngramPreTrainedModel(PreTrainedModel):
    """What both classes below share with the library."""

    config_class = EngramConfig
    base_model_prefix = "model"
    _no_split_modules = ("Block",)
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ("gate.weight", "e_score_correction_bias")
    tables: list[Table]
    """One for each of the config's `engram_layers`, once `open_tables` was called."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As the library's; the tables are opened as well."""
        told = {key: kwargs[key] for key in _FETCHING if key in kwargs}
        found = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model: Any = found[0] if isinstance(found, tuple) else found
        model.open_tables(pretrained_model_name_or_path, **told)
        return found

    def open_tables(self, name: str | os.PathLike[str], **told: Any) -> None:
        """Opens the tables of a folder, or of a repository, from which `told` says how files are fetched."""
        self.base_model.tables = [
            Table([Path(cached_file(str(name), file, **told)) for file in entry["files"]], self.config.table_placement)
            for entry in (self.config.engram or {"tables": []})["tables"]
        ]

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """As the library's; the tables' files are copied."""
        if is_main_process:
            self._copy_tables(save_directory)
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)

    def _copy_tables(self, save_directory: str | os.PathLike[str]) -> None:
        for entry, table in zip((self.config.engram or {"tables": []})["tables"], self.base_model.tables, strict=True):
            for name, source in zip(entry["files"], table.files, strict=True):
                target = Path(save_directory, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                if not (target.exists() and target.samefile(source)):
                    shutil.copyfile(source, target)


class EngramModel(EngramPreTrainedModel):
    """Token ids to normalised hidden states."""

    def __init__(self, config: EngramConfig) -> None:
        super().__init__(config)
        self.tables = []
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if config.engram:
            # The id that is hashed for each token id.
            self.register_buffer("compressed_ids", torch.zeros(config.vocab_size, dtype=torch.int64))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """Arguments as for `EngramForCausalLM`."""
        if use_cache and cache is None:
            cache = DynamicCache()
        _add_engram_layers(cache, self.config)
        hidden_BTD = self.embed_tokens(input_ids)
        context = Context(self.config, attention_mask, position_ids, cache, hidden_BTD)
        memory = dict(zip(self.config.engram_layers, self._memory(input_ids, context), strict=True))
        stream_BTMD = hidden_BTD.unsqueeze(2).expand(-1, -1, self.config.branches, -1)
        for layer, block in enumerate(self.layers):
            stream_BTMD = block(stream_BTMD, memory.get(layer), context)
        return BaseModelOutputWithPast(self.norm(stream_BTMD.mean(dim=2)), cache if use_cache else None)

    def _memory(self, input_ids: Tensor, context: Context) -> list[Tensor]:
        """For each Engram layer, the rows [B, T, E] that the tokens read side by side."""
        if self.config.engram is None:
            return []
        if len(self.tables) != len(self.config.engram_layers):
            raise ValueError("the model has no tables: load it with from_pretrained, or call open_tables(folder)")
        rows_LBTS = self._hash(input_ids, context)
        return [
            table(rows_BTS.flatten()).view(*input_ids.shape, -1)
            for table, rows_BTS in zip(self.tables, rows_LBTS, strict=True)
        ]

    def _hash(self, input_ids: Tensor, context: Context) -> list[Tensor]:
        """For each Engram layer, the numbers [B, T, S] of the rows that the tokens read."""
        numbers, length = self.config.engram["addresses"], input_ids.shape[1]
        ids_BT, pad = self.compressed_ids[input_ids], numbers["pad_id"]
        if context.real_BT is not None:
            ids_BT = torch.where(context.real_BT, ids_BT, pad)
        reach = max(numbers["orders"]) - 1
        whole = _look_back(context, self.config.engram_layers[0], "ids", ids_BT, reach, pad)
        looked_back = [whole[:, reach - back : reach - back + length] for back in range(reach + 1)]
        if not numbers["cross_documents"]:
            positions_BT = context.positions_BT
            looked_back = [torch.where(positions_BT >= back, ids, pad) for back, ids in enumerate(looked_back)]
        found = []
        for multipliers, primes in zip(numbers["multipliers"], numbers["primes"], strict=True):
            primes_S = torch.tensor(primes, device=ids_BT.device)
            mix_BT, mixes = torch.zeros_like(ids_BT), []
            for back, (ids, multiplier) in enumerate(zip(looked_back, multipliers, strict=True)):
                mix_BT = mix_BT ^ (ids * multiplier)  # below 2**63 by the choice of the multipliers
                mixes += [mix_BT] * numbers["heads"] if back + 1 in numbers["orders"] else []
            found.append(torch.stack(mixes, dim=-1) % primes_S + primes_S.cumsum(0) - primes_S)
        return found


def _add_engram_layers(cache: Cache | None, config: EngramConfig) -> None:
    """Makes room in an empty cache for what Engram looks back to."""
    if cache is None or cache.get_seq_length():
        return
    if not isinstance(cache, DynamicCache):
        raise ValueError(f"the cache is a {type(cache).__name__}, but this model needs a DynamicCache")
    while len(cache.layers) < config.num_hidden_layers:
        cache.layers.append(DynamicLayer())
    for layer in config.engram_layers:
        if not isinstance(cache.layers[layer], EngramCacheLayer):
            cache.layers[layer] = EngramCacheLayer()


class EngramForCausalLM(EngramPreTrainedModel, GenerationMixin):
    """The model with its output head."""

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: EngramConfig) -> None:
        super().__init__(config)
        self.model = EngramModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        _add_engram_layers(model_kwargs.get("cache"), self.config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits, and with `labels` the loss.

        Args:
            input_ids: [B, T].
            attention_mask: [B, L], 0 for padding on either side.
            position_ids: [B, T], within documents: where one is 0, a document begins, across which neither attention
                nor (unless the config says so) n-grams reach.
            cache: of the tokens before; `past_key_values` is its older name.
            labels: [B, T], -100 where there is no loss.
            logits_to_keep: of how many last tokens, or of which; 0 for all.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("give input_ids: n-grams are made of token ids, which inputs_embeds do not tell")
        cache = past_key_values if cache is None else cache
        use_cache = self.config.use_cache if use_cache is None else use_cache
        found = self.model(input_ids, attention_mask, position_ids, cache, use_cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(found.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        result = CausalLMOutputWithPast(loss, logits, found.cache)
        return result.to_tuple() if return_dict is False else result
