"""The context gate of Engram: how much of its memory each token lets in, and what it lets in.

For every token and branch, with h the hidden state, k the key and v the value that memory offers (Engram paper,
equation 4):

    s = <RMSNorm(h), RMSNorm(k)> / sqrt(D)            RMSNorm(x) = weight * x / sqrt(mean(x^2) + eps)
    gate = sigmoid(f(s))                              f(s) = s, or sign(s) * sqrt(max(|s|, 1e-6))
    out = gate * v                                    one value for all branches

The signed square root is not in the paper, but in every released DeepSeek code. Its derivative is taken as zero where
|s| is below the clamp, and as 1 / (2 sqrt(|s|)) elsewhere; sign(0) = 0, so that a score of zero gives half a gate.

Shape suffixes: B batch, T sequence, M branches, D hidden.
"""

import math
from typing import Any

import torch
from torch import Tensor

CLAMP = 1e-6
"""Smallest |s| under the signed square root."""


def engram_gate(
    hidden_BTMD: Tensor,
    key_BTMD: Tensor,
    value_BTD: Tensor,
    query_weight_MD: Tensor,
    key_weight_MD: Tensor,
    *,
    eps: float,
    signed_sqrt: bool,
) -> Tensor:
    """Returns the gated values [B, T, M, D], contiguous, in the dtype of `value_BTD`.

    Args:
        hidden_BTMD: hidden states, one vector a branch.
        key_BTMD: keys projected from the memory rows, same shape.
        value_BTD: values projected from the memory rows, shared by the branches.
        query_weight_MD: weight of the RMSNorm over `hidden_BTMD`, per branch.
        key_weight_MD: weight of the RMSNorm over `key_BTMD`, per branch.
        eps: added to the mean squares, 1e-20 in the released models.
        signed_sqrt: the released form; False for the paper's.

    The inputs may have any floating dtypes and strides. Everything inside is fp32 (fp64 if an input is); gradients have
    their inputs' dtypes and the same bits on every run. Saved for the backward: the inputs and three numbers a token
    and branch. On a GPU this is Triton, forward and backward, except in fp64.

    Raises:
        ValueError: shapes that do not fit.
    """
    if hidden_BTMD.shape != key_BTMD.shape or hidden_BTMD.dim() != 4:
        raise ValueError(f"hidden states {tuple(hidden_BTMD.shape)} and keys {tuple(key_BTMD.shape)} must share one "
                         "shape [B, T, M, D]")  # fmt: skip
    batch, length, branches, width = hidden_BTMD.shape
    if value_BTD.shape != (batch, length, width):
        raise ValueError(f"values {tuple(value_BTD.shape)} must be [B, T, D] = {(batch, length, width)}")
    if not query_weight_MD.shape == key_weight_MD.shape == (branches, width):
        raise ValueError(f"norm weights {tuple(query_weight_MD.shape)} and {tuple(key_weight_MD.shape)} must be "
                         f"[M, D] = {(branches, width)}")  # fmt: skip
    gated_BTMD, _ = _gate(hidden_BTMD, key_BTMD, value_BTD, query_weight_MD, key_weight_MD, eps, signed_sqrt)
    return gated_BTMD


def reference_forward(
    hidden: Tensor, key: Tensor, value: Tensor, query_weight: Tensor, key_weight: Tensor, eps: float, signed_sqrt: bool
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch: the gated values, and [3, B, T, M] for the backward: both norms' scales and the score."""
    h, k, v, wq, wk = _wide(hidden, key, value, query_weight, key_weight)
    h_scale_BTM = torch.rsqrt(h.square().mean(-1) + eps)
    k_scale_BTM = torch.rsqrt(k.square().mean(-1) + eps)
    score_BTM = (h * k * (wq * wk)).sum(-1) * h_scale_BTM * k_scale_BTM / math.sqrt(h.shape[-1])
    gated_BTMD = _gate_of(score_BTM, signed_sqrt).unsqueeze(-1) * v.unsqueeze(2)
    return gated_BTMD.to(value.dtype).contiguous(), torch.stack([h_scale_BTM, k_scale_BTM, score_BTM])


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
    gate_BTM = _gate_of(score_BTM, signed_sqrt)
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
    dtype = _inner_dtype(*tensors)
    return tuple(t.to(dtype) for t in tensors)


def _inner_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _gate_of(score: Tensor, signed_sqrt: bool) -> Tensor:
    return torch.sigmoid(score.sign() * score.abs().clamp(min=CLAMP).sqrt() if signed_sqrt else score)


def _fused(*tensors: Tensor) -> bool:
    return tensors[0].is_cuda and _inner_dtype(*tensors) == torch.float32


# Custom operations, so that torch.compile takes each as it is, on every device.
@torch.library.custom_op("engram::gate", mutates_args=())
def _gate(
    hidden: Tensor, key: Tensor, value: Tensor, query_weight: Tensor, key_weight: Tensor, eps: float, signed_sqrt: bool
) -> tuple[Tensor, Tensor]:
    inputs = (hidden, key, value, query_weight, key_weight)
    if _fused(*inputs):
        from kernels.engram_gate_triton import gate_forward

        return gate_forward(*inputs, eps, signed_sqrt)
    return reference_forward(*inputs, eps, signed_sqrt)


@_gate.register_fake
def _(
    hidden: Tensor, key: Tensor, value: Tensor, query_weight: Tensor, key_weight: Tensor, eps: float, signed_sqrt: bool
) -> tuple[Tensor, Tensor]:
    saved_dtype = _inner_dtype(hidden, key, value, query_weight, key_weight)
    return value.new_empty(hidden.shape), hidden.new_empty((3, *hidden.shape[:3]), dtype=saved_dtype)


@torch.library.custom_op("engram::gate_backward", mutates_args=())
def _gate_backward(
    grad: Tensor,
    hidden: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    saved: Tensor,
    signed_sqrt: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (hidden, key, value, query_weight, key_weight)
    if _fused(*inputs):
        from kernels.engram_gate_triton import gate_backward

        return gate_backward(grad, *inputs, saved, signed_sqrt)
    return reference_backward(grad, *inputs, saved, signed_sqrt)


@_gate_backward.register_fake
def _(
    grad: Tensor,
    hidden: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    saved: Tensor,
    signed_sqrt: bool,
) -> tuple[Tensor, ...]:
    inputs = (hidden, key, value, query_weight, key_weight)
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, _eps, ctx.signed_sqrt = inputs
    ctx.save_for_backward(*tensors, output[1])


def _differentiate(ctx: Any, grad: Tensor, _grad_saved: Tensor) -> tuple[Tensor | None, ...]:
    return (*_gate_backward(grad, *ctx.saved_tensors, ctx.signed_sqrt), None, None)


_gate.register_autograd(_differentiate, setup_context=_save)
