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

from typing import Any

import torch
from torch import Tensor

from kernels.gate.reference import gate_of, gate_openings, inner_dtype, reference_backward, reference_forward

__all__ = ["engram_gate", "gate_of", "gate_openings", "reference_backward", "reference_forward"]


def engram_gate(
    hidden_BTMD: Tensor,
    key_BTMD: Tensor,
    value_BTD: Tensor,
    query_weight_MD: Tensor,
    key_weight_MD: Tensor,
    *,
    eps: float,
    signed_sqrt: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the gated values [B, T, M, D], contiguous, in the dtype of `value_BTD`, and the scores s [B, T, M].

    The scores, fp32 (fp64 if an input is), have no gradient; `gate_of` makes gates of them.

    Args:
        hidden_BTMD: hidden states, one vector per branch.
        key_BTMD: keys projected from the memory rows, same shape.
        value_BTD: values projected from the memory rows, shared by the branches.
        query_weight_MD: weight of the RMSNorm over `hidden_BTMD`, per branch.
        key_weight_MD: weight of the RMSNorm over `key_BTMD`, per branch.
        eps: added to the mean squares, 1e-20 in the released models.
        signed_sqrt: the released form; False for the paper's.

    The inputs may have any floating dtypes and strides. Everything inside is fp32 (fp64 if an input is); gradients have
    their inputs' dtypes and the same bits on every run. Saved for the backward: the inputs and three numbers per token
    and branch. On a GPU this is Triton, forward and backward, except in fp64.

    Raises:
        ValueError: the shapes do not fit together.
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
    gated_BTMD, saved = _gate(hidden_BTMD, key_BTMD, value_BTD, query_weight_MD, key_weight_MD, eps, signed_sqrt)
    return gated_BTMD, saved[2].detach()


def _fused(*tensors: Tensor) -> bool:
    return tensors[0].is_cuda and inner_dtype(*tensors) == torch.float32


# Custom operations, so that torch.compile takes each as it is, on every device.
@torch.library.custom_op("engram::gate", mutates_args=())
def _gate(
    hidden: Tensor, key: Tensor, value: Tensor, query_weight: Tensor, key_weight: Tensor, eps: float, signed_sqrt: bool
) -> tuple[Tensor, Tensor]:
    inputs = (hidden, key, value, query_weight, key_weight)
    if _fused(*inputs):
        from kernels.gate.triton import gate_forward

        return gate_forward(*inputs, eps, signed_sqrt)
    return reference_forward(*inputs, eps, signed_sqrt)


@_gate.register_fake
def _(
    hidden: Tensor, key: Tensor, value: Tensor, query_weight: Tensor, key_weight: Tensor, eps: float, signed_sqrt: bool
) -> tuple[Tensor, Tensor]:
    saved_dtype = inner_dtype(hidden, key, value, query_weight, key_weight)
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
        from kernels.gate.triton import gate_backward

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
