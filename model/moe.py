"""Mixture of experts: sigmoid scores, a choice balanced by a bias, no token dropped (DeepSeek-V3 report, 2.1.2).

An engine may replace the layer to spread the experts over ranks. Until then the forward below runs; the replacement
computes the same function of the same weights, under names and in pieces of its own (`train/engine/auto_ep.py`).

The bias must stay fp32 in a bf16 model. DeepSpeed casts buffers if `data_types.buffer_dtype` is set or the model is
built under `zero.Init`, except those that `_keep_in_fp32_modules_strict` names; a plain `.to(bfloat16)` is undone by
`Float32Buffers`.

Shape suffixes: N tokens, K experts per token, A = N*K assignments, E experts, D hidden, F expert width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import MoEConfig
from model.dispatch import dispatch, permute
from model.layers import draw_normal
from model.mlp import SwiGLU
from model.router_logits import router_logits


class Float32Buffers(nn.Module):
    """A module whose own floating buffers keep fp32 when it is cast to another floating dtype."""

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> nn.Module:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, *args, **kwargs)
        for name, buffer in self.named_buffers(recurse=False):
            if before[name].dtype == torch.float32 != buffer.dtype:
                setattr(self, name, before[name].to(buffer.device))
        return self


class Router(Float32Buffers):
    """Scores tokens for experts and chooses the experts of each."""

    _keep_in_fp32_modules_strict = ("e_score_correction_bias",)
    e_score_correction_bias: Tensor
    """fp32 [E], added to the scores for the choice only; moved by `model.balance`, not by gradients."""

    def __init__(self, config: MoEConfig, hidden_size: int, std: float) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        draw_normal(self.weight, std)
        self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts, dtype=torch.float32))

    def forward(self, tokens_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the chosen experts' weights [N, K], their numbers [N, K] in int64, and all scores [N, E].

        Weights and scores are in fp32 or wider.
        """
        scores_NE = torch.sigmoid(router_logits(tokens_ND, self.weight))
        choice_NE = (scores_NE + self.e_score_correction_bias).detach()
        experts_NK = choice_NE.topk(self.config.experts_per_token, dim=-1, sorted=False).indices
        weights_NK = scores_NE.gather(1, experts_NK)
        if self.config.norm_topk:
            weights_NK = weights_NK / (weights_NK.sum(dim=-1, keepdim=True) + 1e-20)
        return weights_NK * self.config.routed_scaling_factor, experts_NK, scores_NE


class Experts(nn.Module):
    """The routed experts: one SwiGLU each, their weights stacked."""

    def __init__(self, config: MoEConfig, hidden_size: int, *, std: float, output_std: float) -> None:
        super().__init__()
        experts, width = config.num_experts, config.expert_hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden_size, width))
        draw_normal(self.gate_up_proj, std)
        draw_normal(self.down_proj, output_std)

    def forward(self, sorted_AD: Tensor, ends_E: Tensor) -> Tensor:
        """Applies expert e to rows [ends_E[e-1], ends_E[e]) of `sorted_AD`; `ends_E` is int32, the last one A."""
        if _grouped_mm_fits(sorted_AD, self.gate_up_proj, self.down_proj):
            gate_up = F.grouped_mm(sorted_AD, self.gate_up_proj.transpose(1, 2), offs=ends_E)
            return F.grouped_mm(_swiglu(gate_up), self.down_proj.transpose(1, 2), offs=ends_E)
        return self._one_by_one(sorted_AD, ends_E)

    @torch._disable_dynamo  # sizes that only the data tells; as torch.compiler.disable, without its import
    def _one_by_one(self, sorted_AD: Tensor, ends_E: Tensor) -> Tensor:
        groups = sorted_AD.tensor_split(ends_E[:-1].tolist())
        # unbind, not indexing: its backward stacks all experts' gradients once and gives an idle expert zeros.
        weights = zip(groups, self.gate_up_proj.unbind(), self.down_proj.unbind(), strict=True)
        return torch.cat([F.linear(_swiglu(F.linear(x, gate_up)), down) for x, gate_up, down in weights if len(x)])


class MoE(Float32Buffers):
    """Shared experts, plus the weighted sum of each token's chosen experts."""

    tokens_per_expert: Tensor
    """fp32 [E]: assignments since the last balance update, in training mode only; not saved."""

    def __init__(self, config: MoEConfig, hidden_size: int, *, std: float, output_std: float) -> None:
        super().__init__()
        self.gate = Router(config, hidden_size, std)
        self.experts = Experts(config, hidden_size, std=std, output_std=output_std)
        self.shared_experts = None
        if config.shared_experts:
            inner_size = config.shared_experts * config.expert_hidden_size
            self.shared_experts = SwiGLU(hidden_size, inner_size, std=std, output_std=output_std)
        counts = torch.zeros(config.num_experts, dtype=torch.float32)
        self.register_buffer("tokens_per_expert", counts, persistent=False)

    @property
    def choice_bias(self) -> Tensor:
        """The router's bias, fp32 [E]."""
        return self.gate.e_score_correction_bias

    def scores(self, hidden_BTD: Tensor) -> Tensor:
        """The router's scores [B, T, E] before the bias, fp32 or wider."""
        return self.gate(hidden_BTD.flatten(0, 1))[2].unflatten(0, hidden_BTD.shape[:2])

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Returns [B, T, D] in the dtype of `hidden_BTD`; the weighted sum over experts is taken in fp32."""
        tokens_ND = hidden_BTD.flatten(0, 1)
        weights_NK, experts_NK, _ = self.gate(tokens_ND)
        sorted_A, order_A = experts_NK.flatten().sort(stable=True)
        ends_E = torch.searchsorted(sorted_A, torch.arange(len(self.tokens_per_expert), device=sorted_A.device),
                                    right=True, out_int32=True)  # fmt: skip
        if self.training:
            self.tokens_per_expert += ends_E.diff(prepend=ends_E.new_zeros(1))
        inverse_A = torch.empty_like(order_A)
        inverse_A[order_A] = torch.arange(len(order_A), device=order_A.device)
        results_AD = self.experts(dispatch(tokens_ND, order_A, inverse_A), ends_E)
        results_NKD = permute(results_AD, inverse_A, order_A).unflatten(0, experts_NK.shape)
        output_BTD = (results_NKD * weights_NK.unsqueeze(-1)).sum(dim=1).to(hidden_BTD.dtype).view_as(hidden_BTD)
        return output_BTD if self.shared_experts is None else output_BTD + self.shared_experts(hidden_BTD)


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _grouped_mm_fits(tokens: Tensor, *weights: Tensor) -> bool:
    aligned = all(size % 8 == 0 for weight in weights for size in weight.shape[1:])
    return tokens.is_cuda and tokens.dtype == torch.bfloat16 and aligned
