"""The context gate of Engram: how much of its memory each token lets in.

For every token and branch, with h the hidden state and k the key that memory offers (Engram paper, equation 4):

    s = <RMSNorm(h), RMSNorm(k)> / sqrt(D)            RMSNorm(x) = weight * x / sqrt(mean(x^2) + eps)
    gate = sigmoid(f(s))                              f(s) = s, or sign(s) * sqrt(max(|s|, 1e-6))

The signed square root is not in the paper, but in every released DeepSeek code. Its derivative is taken as zero where
|s| is below the clamp, and as 1 / (2 sqrt(|s|)) elsewhere.

Shape suffixes: B batch, T sequence, M branches, D hidden.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CLAMP = 1e-6
"""Smallest |s| under the signed square root."""


def engram_gate(
    hidden_BTMD: Tensor,
    key_BTMD: Tensor,
    query_weight_MD: Tensor,
    key_weight_MD: Tensor,
    *,
    eps: float,
    signed_sqrt: bool,
) -> Tensor:
    """Returns the gates [B, T, M] in (0, 1).

    Args:
        hidden_BTMD: hidden states, one vector a branch; any floating dtype.
        key_BTMD: keys projected from the memory rows, same shape.
        query_weight_MD: weight of the RMSNorm over `hidden_BTMD`, per branch.
        key_weight_MD: weight of the RMSNorm over `key_BTMD`, per branch.
        eps: added to the mean squares, 1e-20 in the released models.
        signed_sqrt: the released form; False for the paper's.

    Everything inside, and the result, is fp32 (fp64 for fp64 inputs), whatever the inputs' dtype. Gradients have their
    inputs' dtypes. Saved for the backward: the inputs and three numbers a token and branch.

    Raises:
        ValueError: shapes that do not fit.
    """
    if hidden_BTMD.shape != key_BTMD.shape or hidden_BTMD.dim() != 4:
        raise ValueError(f"hidden states {tuple(hidden_BTMD.shape)} and keys {tuple(key_BTMD.shape)} must share one "
                         "shape [B, T, M, D]")  # fmt: skip
    if not query_weight_MD.shape == key_weight_MD.shape == hidden_BTMD.shape[2:]:
        raise ValueError(f"norm weights {tuple(query_weight_MD.shape)} and {tuple(key_weight_MD.shape)} must be "
                         f"[M, D] = {tuple(hidden_BTMD.shape[2:])}")  # fmt: skip
    gate_BTM: Tensor = _EngramGate.apply(hidden_BTMD, key_BTMD, query_weight_MD, key_weight_MD, eps, signed_sqrt)
    return gate_BTM


class _EngramGate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, key: Tensor, query_weight: Tensor, key_weight: Tensor, eps: float, signed_sqrt: bool
    ) -> Tensor:
        h, k, wq, wk = _wide(hidden, key, query_weight, key_weight)
        h_scale_BTM = torch.rsqrt(h.square().mean(-1) + eps)
        k_scale_BTM = torch.rsqrt(k.square().mean(-1) + eps)
        score_BTM = (h * k * (wq * wk)).sum(-1) * h_scale_BTM * k_scale_BTM / math.sqrt(h.shape[-1])
        ctx.save_for_backward(hidden, key, query_weight, key_weight, h_scale_BTM, k_scale_BTM, score_BTM)
        ctx.signed_sqrt = signed_sqrt
        return torch.sigmoid(_signed_sqrt(score_BTM) if signed_sqrt else score_BTM)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTM: Tensor) -> tuple[Tensor | None, ...]:
        hidden, key, query_weight, key_weight, h_scale_BTM, k_scale_BTM, score_BTM = ctx.saved_tensors
        h, k, wq, wk = _wide(hidden, key, query_weight, key_weight)
        width = h.shape[-1]
        gate_BTM = torch.sigmoid(_signed_sqrt(score_BTM) if ctx.signed_sqrt else score_BTM)
        dscore_BTM = grad_BTM * gate_BTM * (1 - gate_BTM)
        if ctx.signed_sqrt:
            size_BTM = score_BTM.abs()
            slope_BTM = 0.5 * torch.rsqrt(size_BTM.clamp(min=CLAMP))
            dscore_BTM = torch.where(size_BTM < CLAMP, 0.0, dscore_BTM * slope_BTM)
        ddot = (dscore_BTM * h_scale_BTM * k_scale_BTM / math.sqrt(width)).unsqueeze(-1)
        # The norms' own part: d(scale)/dx = -scale^3 x / D, and the score is proportional to either scale.
        dnorm = (dscore_BTM * score_BTM / width).unsqueeze(-1)
        weight = wq * wk
        dhidden = ddot * (k * weight) - dnorm * h_scale_BTM.square().unsqueeze(-1) * h
        dkey = ddot * (h * weight) - dnorm * k_scale_BTM.square().unsqueeze(-1) * k
        dweight_MD = (ddot * h * k).sum(dim=(0, 1))
        return (
            dhidden.to(hidden.dtype),
            dkey.to(key.dtype),
            (dweight_MD * wk).to(query_weight.dtype),
            (dweight_MD * wq).to(key_weight.dtype),
            None,
            None,
        )


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors)


def _signed_sqrt(score: Tensor) -> Tensor:
    return score.sign() * score.abs().clamp(min=CLAMP).sqrt()
