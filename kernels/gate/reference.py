"""The gate in plain PyTorch. Formulas and shape suffixes: `kernels.gate`."""

import math

import torch
from torch import Tensor

CLAMP = 1e-6
"""Smallest |s| under the signed square root."""


def reference_forward(
    hidden: Tensor, key: Tensor, value: Tensor, query_weight: Tensor, key_weight: Tensor, eps: float, signed_sqrt: bool
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch: the gated values, and [3, B, T, M] for the backward: both norms' scales and the score."""
    h, k, v, wq, wk = _wide(hidden, key, value, query_weight, key_weight)
    saved = _scales_and_score(h, k, wq, wk, eps)
    gated_BTMD = gate_of(saved[2], signed_sqrt).unsqueeze(-1) * v.unsqueeze(2)
    return gated_BTMD.to(value.dtype).contiguous(), saved


def gate_openings(
    hidden: Tensor, key: Tensor, query_weight: Tensor, key_weight: Tensor, *, eps: float, signed_sqrt: bool
) -> Tensor:
    """How far the gate opens, 0 to 1: [B, T, M], on any device. Arguments as for `kernels.gate.engram_gate`."""
    h, k, wq, wk = _wide(hidden, key, query_weight, key_weight)
    return gate_of(_scales_and_score(h, k, wq, wk, eps)[2], signed_sqrt)


def _scales_and_score(h: Tensor, k: Tensor, wq: Tensor, wk: Tensor, eps: float) -> Tensor:
    h_scale_BTM = torch.rsqrt(h.square().mean(-1) + eps)
    k_scale_BTM = torch.rsqrt(k.square().mean(-1) + eps)
    score_BTM = (h * k * (wq * wk)).sum(-1) * h_scale_BTM * k_scale_BTM / math.sqrt(h.shape[-1])
    return torch.stack([h_scale_BTM, k_scale_BTM, score_BTM])


def reference_backward(
    grad: Tensor,
    hidden: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    saved: Tensor,
    signed_sqrt: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Plain PyTorch: gradients of the five inputs, contiguous, from that of the gated values [B, T, M, D]."""
    g, h, k, v, wq, wk = _wide(grad, hidden, key, value, query_weight, key_weight)
    h_scale_BTM, k_scale_BTM, score_BTM = saved
    width = h.shape[-1]
    gate_BTM = gate_of(score_BTM, signed_sqrt)
    dvalue = (gate_BTM.unsqueeze(-1) * g).sum(2)
    dscore_BTM = (g * v.unsqueeze(2)).sum(-1) * gate_BTM * (1 - gate_BTM)
    if signed_sqrt:
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
        dhidden.to(hidden.dtype).contiguous(),
        dkey.to(key.dtype).contiguous(),
        dvalue.to(value.dtype).contiguous(),
        (dweight_MD * wk).to(query_weight.dtype),
        (dweight_MD * wq).to(key_weight.dtype),
    )


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = inner_dtype(*tensors)
    return tuple(t.to(dtype) for t in tensors)


def inner_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of everything computed inside: fp64 if an input is, else fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def gate_of(score: Tensor, signed_sqrt: bool) -> Tensor:
    """The gates of scores s, 0 to 1, of the same shape."""
    return torch.sigmoid(score.sign() * score.abs().clamp(min=CLAMP).sqrt() if signed_sqrt else score)
