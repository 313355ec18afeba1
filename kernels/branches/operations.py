"""The Triton forms of kernels/branches/__init__.py as custom operations, so that torch.compile takes each as it is.

The reference is not one: on a CPU, the loops that torch.compile generates from it are better.
"""

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("engram::mix_branches", mutates_args=())
def fused_mix(weights: Tensor, base: Tensor, outputs: list[Tensor]) -> Tensor:
    """`mix_branches` in Triton."""
    from kernels.branches.triton import mix_forward

    return mix_forward(weights, base, outputs)


@fused_mix.register_fake
def _(weights: Tensor, base: Tensor, outputs: list[Tensor]) -> Tensor:
    return base.new_empty((*weights.shape[:3], base.shape[-1]))


@torch.library.custom_op("engram::mix_branches_backward", mutates_args=())
def fused_mix_backward(grad: Tensor, weights: Tensor, base: Tensor, outputs: list[Tensor]) -> list[Tensor]:
    """Gradients of the weights, of the base and of every output."""
    from kernels.branches.triton import mix_backward

    return mix_backward(grad, weights, base, outputs)


@fused_mix_backward.register_fake
def _(grad: Tensor, weights: Tensor, base: Tensor, outputs: list[Tensor]) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in (weights, base, *outputs)]


def _save_mix(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weights, base, outputs = inputs
    ctx.save_for_backward(weights, base, *outputs)


def _differentiate_mix(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    weights, base, *outputs = ctx.saved_tensors
    dweights, dbase, *doutputs = fused_mix_backward(grad, weights, base, outputs)
    return dweights, dbase, doutputs


fused_mix.register_autograd(_differentiate_mix, setup_context=_save_mix)


@torch.library.custom_op("engram::project_branches", mutates_args=())
def fused_project(
    projection: Tensor, eps: float, weights: Tensor | None, base: Tensor, outputs: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """`project_branches` in Triton, and the scales of the norm."""
    from kernels.branches.projections_triton import project_forward

    return project_forward(projection, weights, base, outputs, eps)


@fused_project.register_fake
def _(
    projection: Tensor, eps: float, weights: Tensor | None, base: Tensor, outputs: list[Tensor]
) -> tuple[Tensor, Tensor]:
    projected = base.new_empty((*base.shape[:2], len(projection)), dtype=torch.float32)
    return projected, base.new_empty(base.shape[:2], dtype=torch.float32)


@torch.library.custom_op("engram::project_branches_backward", mutates_args=())
def _fused_project_backward(
    grad: Tensor,
    projected: Tensor,
    scale: Tensor,
    projection: Tensor,
    weights: Tensor | None,
    base: Tensor,
    outputs: list[Tensor],
) -> list[Tensor]:
    from kernels.branches.projections_triton import project_backward

    return project_backward(grad, projected, scale, projection, weights, base, outputs)


@_fused_project_backward.register_fake
def _(
    grad: Tensor,
    projected: Tensor,
    scale: Tensor,
    projection: Tensor,
    weights: Tensor | None,
    base: Tensor,
    outputs: list[Tensor],
) -> list[Tensor]:
    inputs = (projection, *(() if weights is None else (weights,)), base, *outputs)
    return [tensor.new_empty(tensor.shape) for tensor in inputs]


def _save_project(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    projection, _eps, weights, base, outputs = inputs
    ctx.save_for_backward(*output, projection, weights, base, *outputs)


def _differentiate_project(ctx: Any, grad: Tensor, _grad_scale: Tensor) -> tuple[Any, ...]:
    projected, scale, projection, weights, base, *outputs = ctx.saved_tensors
    grads = _fused_project_backward(grad, projected, scale, projection, weights, base, outputs)
    dprojection, *grads = grads
    dweights = None if weights is None else grads.pop(0)
    return dprojection, None, dweights, grads[0], grads[1:]


fused_project.register_autograd(_differentiate_project, setup_context=_save_project)
