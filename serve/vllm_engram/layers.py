"""What DeepSeek-V3 as vLLM has it lacks: attention without latents in the cache, Engram, hyper-connections.

Shape suffixes: T tokens of a batch, D hidden, M branches, H heads, E memory width, K taps before the token's own.
"""

import math
from concurrent.futures import Future
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention as CachedAttention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from .config import EngramConfig
from .history import History

_GATE_CLAMP = 1e-6
_SINKHORN_LOWEST = -60.0


class Attention(nn.Module):
    """Multi-head latent attention, whose keys and values are unpacked into the cache.

    vLLM's attention on a CPU has certain widths of heads alone: keys, queries and values are filled up with zeros.
    """

    def __init__(self, vllm_config: VllmConfig, config: EngramConfig, prefix: str) -> None:
        super().__init__()
        self.nope, self.rope, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.latent, total, hidden = config.kv_lora_rank, config.num_attention_heads, config.hidden_size
        self.heads = total // get_tensor_model_parallel_world_size()
        self.width = padded_width(max(self.nope + self.rope, self.value))
        options = {"bias": False, "return_bias": False, "quant_config": vllm_config.quant_config}
        self.compressed = config.q_lora_rank is not None
        width = total * (self.nope + self.rope)
        if self.compressed:
            self.q_a_proj = ReplicatedLinear(hidden, config.q_lora_rank, prefix=f"{prefix}.q_a_proj", **options)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps=config.rms_norm_eps)
            self.q_b_proj = ColumnParallelLinear(config.q_lora_rank, width, prefix=f"{prefix}.q_b_proj", **options)
        else:
            self.q_proj = ColumnParallelLinear(hidden, width, prefix=f"{prefix}.q_proj", **options)
        self.kv_a_proj_with_mqa = ReplicatedLinear(
            hidden, self.latent + self.rope, prefix=f"{prefix}.kv_a_proj_with_mqa", **options
        )
        self.kv_a_layernorm = RMSNorm(self.latent, eps=config.rms_norm_eps)
        self.kv_b_proj = ColumnParallelLinear(
            self.latent, total * (self.nope + self.value), prefix=f"{prefix}.kv_b_proj", **options
        )
        self.o_proj = RowParallelLinear(total * self.value, hidden, prefix=f"{prefix}.o_proj", **options)
        scale, rope = (self.nope + self.rope) ** -0.5, config.rope_parameters
        if rope["rope_type"] != "default":
            scale *= (0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1) ** 2
        self.register_buffer("frequency_P", rotary_frequencies(rope, self.rope), persistent=False)
        self.attn = CachedAttention(
            self.heads, self.width, scale, num_kv_heads=self.heads, cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config, prefix=f"{prefix}.attn",
        )  # fmt: skip

    def forward(self, hidden_TD: Tensor, positions_T: Tensor) -> Tensor:
        """Returns [T, D]."""
        compressed = self.q_a_layernorm(self.q_a_proj(hidden_TD)) if self.compressed else hidden_TD
        query = (self.q_b_proj if self.compressed else self.q_proj)(compressed).unflatten(-1, (self.heads, -1))
        latent, key_rope = self.kv_a_proj_with_mqa(hidden_TD).split((self.latent, self.rope), dim=-1)
        unpacked = self.kv_b_proj(self.kv_a_layernorm(latent.contiguous())).unflatten(-1, (self.heads, -1))
        query_nope, query_rope = query.split((self.nope, self.rope), dim=-1)
        key_nope, value = unpacked.split((self.nope, self.value), dim=-1)
        angle_TP = positions_T.unsqueeze(1) * self.get_buffer("frequency_P")
        query = torch.cat((query_nope, rotated(query_rope, angle_TP)), dim=-1)
        key = torch.cat((key_nope, rotated(key_rope.unsqueeze(1), angle_TP).expand(-1, self.heads, -1)), dim=-1)
        mixed = self.attn(*(F.pad(part, (0, self.width - part.shape[-1])) for part in (query, key, value)))
        return self.o_proj(mixed.view(-1, self.heads, self.width)[..., : self.value].flatten(1))


def rotary_frequencies(rope: dict[str, Any], columns: int) -> Tensor:
    """Angle per position of each pair of columns [P], in fp32; with YaRN (arXiv 2309.00071) interpolated.

    vLLM's own rotary positions end at YaRN's factor times its original length, which training need not keep to.
    """
    theta = rope["rope_theta"]
    frequency = theta ** -(torch.arange(0, columns, 2, dtype=torch.float32) / columns)
    if rope["rope_type"] == "default":
        return frequency
    length = rope["original_max_position_embeddings"]

    def pair_that_turns(times: float) -> float:
        return columns * math.log(length / (2 * math.pi * times)) / (2 * math.log(theta))

    first = max(math.floor(pair_that_turns(rope["beta_fast"])), 0)
    last = min(math.ceil(pair_that_turns(rope["beta_slow"])), columns - 1)
    pair = torch.arange(columns // 2, dtype=torch.float32)
    share = ((pair - first) / (last - first if last > first else 1e-3)).clamp(0, 1)
    return frequency * (1 - share) + frequency / rope["factor"] * share


def rotated(x_THR: Tensor, angle_TP: Tensor) -> Tensor:
    """Turns each pair of columns (2p, 2p + 1) by its angle."""
    even, odd = x_THR[..., 0::2].float(), x_THR[..., 1::2].float()
    cosine, sine = angle_TP.cos().unsqueeze(1), angle_TP.sin().unsqueeze(1)
    return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1).flatten(-2).to(x_THR.dtype)


def padded_width(width: int) -> int:
    """The least width of heads that vLLM's attention has, and is not below `width`."""
    wider = [size for size in CPUAttentionBackend.get_supported_head_sizes() if size >= width]
    if not wider:
        raise ValueError(f"vllm-engram: heads of {width} columns are wider than any that vLLM's attention has")
    return min(wider)


class Convolution(nn.Module):
    """x -> SiLU(Conv(RMSNorm(x))) + x: causal, depthwise, dilated by the longest n-gram."""

    def __init__(self, vllm_config: VllmConfig, config: EngramConfig, prefix: str) -> None:
        super().__init__()
        engram, channels = config.engram, config.branches * config.hidden_size
        taps, dilation, self.eps = engram["kernel_size"], max(engram["addresses"]["orders"]), config.rms_norm_eps
        self.norm_weight = nn.Parameter(torch.empty(channels), requires_grad=False)
        self.weight = nn.Parameter(torch.empty(taps * channels), requires_grad=False)
        distances = [tap * dilation for tap in range(1, taps)]
        dtype = vllm_config.model_config.dtype
        self.history = History(channels, dtype, distances, 0, f"{prefix}.history") if distances else None

    def forward(self, values_TMD: Tensor, positions_T: Tensor) -> Tensor:
        """Returns [T, M, D]; taps before the request's first token are zero."""
        normed = F.rms_norm(values_TMD, values_TMD.shape[-1:], eps=self.eps).flatten(1) * self.norm_weight
        weight = self.weight.view(-1, normed.shape[1])
        total = normed.float() * weight[0]
        if self.history is not None:
            earlier_TKW = self.history(normed, positions_T)
            for tap in range(1, len(weight)):
                total = total + earlier_TKW[:, tap - 1].float() * weight[tap]
        return F.silu(total).to(values_TMD.dtype).view_as(values_TMD) + values_TMD


class Engram(nn.Module):
    """Gates what the tables hold for the last tokens into the residual stream (equations 3 to 6 of the paper)."""

    def __init__(self, vllm_config: VllmConfig, config: EngramConfig, prefix: str) -> None:
        super().__init__()
        engram, hidden, self.branches = config.engram, config.hidden_size, config.branches
        addresses = engram["addresses"]
        width = len(addresses["orders"]) * addresses["heads"] * engram["row_dim"]
        self.eps, self.signed_sqrt = engram["gate_eps"], engram["gate"] == "signed_sqrt"
        self.value_proj = nn.Linear(width, hidden, bias=False)
        self.key_projs = nn.ModuleList(nn.Linear(width, hidden, bias=False) for _ in range(self.branches))
        self.query_norm_weight = nn.Parameter(torch.empty(self.branches * hidden))
        self.key_norm_weight = nn.Parameter(torch.empty(self.branches * hidden))
        self.convolution = Convolution(vllm_config, config, f"{prefix}.convolution") if engram["convolution"] else None

    def forward(self, stream_TMD: Tensor, memory: Future[Tensor], positions_T: Tensor) -> Tensor:
        """What is added to the stream [T, M, D]; `memory` [T, E] is waited for here."""
        memory_TE = memory.result().to(stream_TMD.device, stream_TMD.dtype)
        key_TMD = torch.stack([project(memory_TE) for project in self.key_projs], dim=1)
        value_TD = self.value_proj(memory_TE)
        weight_MD = (self.query_norm_weight.float() * self.key_norm_weight.float()).view(self.branches, -1)
        query, key = stream_TMD.float(), key_TMD.float()
        scale = torch.rsqrt(query.square().mean(-1) + self.eps) * torch.rsqrt(key.square().mean(-1) + self.eps)
        score = (query * key * weight_MD).sum(-1) * scale / math.sqrt(query.shape[-1])
        if self.signed_sqrt:
            score = score.sign() * score.abs().clamp(min=_GATE_CLAMP).sqrt()
        gated_TMD = (score.sigmoid().unsqueeze(-1) * value_TD.float().unsqueeze(1)).to(value_TD.dtype)
        return gated_TMD if self.convolution is None else self.convolution(gated_TMD, positions_T)


class HyperConnection(nn.Module):
    """The mappings of one sublayer in a stream of branches (mHC, arXiv 2512.24880), computed anew for every token."""

    def __init__(self, config: EngramConfig) -> None:
        super().__init__()
        self.branches, self.eps = config.branches, config.rms_norm_eps
        self.iterations = config.hyper_connections["sinkhorn_iterations"]
        outputs = self.branches * (self.branches + 2)
        self.weight = nn.Parameter(torch.empty(outputs, self.branches * config.hidden_size))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.alpha = nn.Parameter(torch.empty(3))

    def forward(self, stream_TMD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """H_pre [T, M], H_post [T, M] and H_res [T, M, M] in fp32; `dtype` is the model's."""
        flat = stream_TMD.to(dtype).float().flatten(1)
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
