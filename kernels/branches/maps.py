"""The small matrices of hyper-connections, a few numbers per token: from projections to mappings, and their products.

Each step alone is so little work that a GPU would spend its time on launches. On a GPU they are therefore Triton,
except in fp64 and with more than four branches: one launch for a projection's mappings, one for a product, and as many
backward. Formulas: model/hyper_connections.py.

Shape suffixes: B batch, T sequence, M branches, K = 2 M + M * M projections, J = 1 or M, I parts of the stream.
"""

from typing import Any

import torch
from torch import Tensor

_MOST_BRANCHES = 4


def stream_mappings(projected_BTK: Tensor, alpha_3: Tensor, bias_K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns H_pre [B, T, M], H_post [B, T, M] and the logits of H_res [B, T, M, M], in the projections' dtype.

    Args:
        projected_BTK: P RMSNorm(vec x), fp32 or fp64.
        alpha_3: one factor for each of the three, any floating dtype.
        bias_K: b, any floating dtype.

    Raises:
        ValueError: K is not 2 M + M * M for any M, or not the number of biases.
    """
    branches = int((len(bias_K) + 1) ** 0.5) - 1
    if not projected_BTK.shape[-1] == len(bias_K) == branches * (branches + 2):
        raise ValueError(f"{projected_BTK.shape[-1]} projections and {len(bias_K)} biases must be M * (M + 2) each")
    if _fused(projected_BTK, branches):
        fused: tuple[Tensor, Tensor, Tensor] = _fused_mappings(projected_BTK, alpha_3, bias_K, branches)
        return fused
    dtype = projected_BTK.dtype
    sizes = (branches, branches, branches * branches)
    factors = [factor.expand(size) for factor, size in zip(alpha_3.to(dtype), sizes, strict=True)]
    logits = projected_BTK * torch.cat(factors) + bias_K.to(dtype)
    pre, post, res = logits.split(sizes, dim=-1)
    return pre.sigmoid(), 2 * post.sigmoid(), res.unflatten(-1, (branches, branches))


def compose(mapping_BTJM: Tensor, weights_BTMI: Tensor | None, written_BTJ: Tensor | None = None) -> Tensor:
    """Returns a mapping of the stream as a mapping of its parts, H W [B, T, J, I], and of a new part if `written`.

    Args:
        mapping_BTJM: H.
        weights_BTMI: W of the stream; None if the stream is its base, and I = M.
        written_BTJ: weights of a new last part, appended as they are.
    """
    if weights_BTMI is None and written_BTJ is None:
        return mapping_BTJM
    if _fused(mapping_BTJM, mapping_BTJM.shape[-1]):
        fused: Tensor = _fused_compose(mapping_BTJM, weights_BTMI, written_BTJ)
        return fused
    composed = mapping_BTJM if weights_BTMI is None else mapping_BTJM @ weights_BTMI
    return composed if written_BTJ is None else torch.cat((composed, written_BTJ.unsqueeze(-1)), dim=-1)


def _fused(numbers: Tensor, branches: int) -> bool:
    return numbers.is_cuda and numbers.dtype == torch.float32 and branches <= _MOST_BRANCHES


# Custom operations, so that torch.compile takes each as it is.
@torch.library.custom_op("engram::stream_mappings", mutates_args=())
def _fused_mappings(projected: Tensor, alpha: Tensor, bias: Tensor, branches: int) -> tuple[Tensor, Tensor, Tensor]:
    from kernels.branches.mappings_triton import mappings_forward

    return mappings_forward(projected, alpha, bias, branches)


@_fused_mappings.register_fake
def _(projected: Tensor, alpha: Tensor, bias: Tensor, branches: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*projected.shape[:-1], branches)
    return projected.new_empty(shape), projected.new_empty(shape), projected.new_empty((*shape, branches))


@torch.library.custom_op("engram::stream_mappings_backward", mutates_args=())
def _fused_mappings_backward(
    dpre: Tensor, dpost: Tensor, dres: Tensor, pre: Tensor, post: Tensor, projected: Tensor, alpha: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from kernels.branches.mappings_triton import mappings_backward

    return mappings_backward(dpre, dpost, dres, pre, post, projected, alpha, bias)


@_fused_mappings_backward.register_fake
def _(
    dpre: Tensor, dpost: Tensor, dres: Tensor, pre: Tensor, post: Tensor, projected: Tensor, alpha: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return projected.new_empty(projected.shape), alpha.new_empty(alpha.shape), bias.new_empty(bias.shape)


def _save_mappings(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    projected, alpha, bias, _branches = inputs
    ctx.save_for_backward(*output[:2], projected, alpha, bias)


def _differentiate_mappings(ctx: Any, dpre: Tensor, dpost: Tensor, dres: Tensor) -> tuple[Tensor | None, ...]:
    return (*_fused_mappings_backward(dpre, dpost, dres, *ctx.saved_tensors), None)


_fused_mappings.register_autograd(_differentiate_mappings, setup_context=_save_mappings)


@torch.library.custom_op("engram::compose_mapping", mutates_args=())
def _fused_compose(mapping: Tensor, weights: Tensor | None, written: Tensor | None) -> Tensor:
    from kernels.branches.compose_triton import compose_forward

    return compose_forward(mapping, weights, written)


@_fused_compose.register_fake
def _(mapping: Tensor, weights: Tensor | None, written: Tensor | None) -> Tensor:
    parts = (mapping if weights is None else weights).shape[-1] + (written is not None)
    return mapping.new_empty((*mapping.shape[:-1], parts))


@torch.library.custom_op("engram::compose_mapping_backward", mutates_args=())
def _fused_compose_backward(
    grad: Tensor, mapping: Tensor, weights: Tensor | None, written: Tensor | None
) -> list[Tensor]:
    from kernels.branches.compose_triton import compose_backward

    return compose_backward(grad, mapping, weights, written)


@_fused_compose_backward.register_fake
def _(grad: Tensor, mapping: Tensor, weights: Tensor | None, written: Tensor | None) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in (mapping, weights, written) if tensor is not None]


def _save_compose(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_compose(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    grads = iter(_fused_compose_backward(grad, *inputs))
    return tuple(None if tensor is None else next(grads) for tensor in inputs)


_fused_compose.register_autograd(_differentiate_compose, setup_context=_save_compose)
