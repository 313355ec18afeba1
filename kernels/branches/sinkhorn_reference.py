"""Sinkhorn-Knopp in plain PyTorch. Formulas and shape suffixes: `kernels.branches.sinkhorn`."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOWEST = -60.0
"""A logit counts as no less than its column's maximum plus this, so that no row's sum can vanish in fp32."""


class Sinkhorn(torch.autograd.Function):
    """See `kernels.branches.sinkhorn.sinkhorn`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, iterations: int) -> Tensor:
        """See `torch.autograd.Function`."""
        ctx.save_for_backward(logits)
        ctx.iterations = iterations
        matrix_MMN = _start(_matrices_last(logits))
        for _ in range(iterations):
            matrix_MMN = matrix_MMN / matrix_MMN.sum(dim=0, keepdim=True)
            matrix_MMN = matrix_MMN / matrix_MMN.sum(dim=1, keepdim=True)
        return _matrices_first(matrix_MMN, logits.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """See `torch.autograd.Function`."""
        (logits,) = ctx.saved_tensors
        logits_MMN = _matrices_last(logits)
        start_MMN = matrix_MMN = _start(logits_MMN)
        steps = []
        for dim in (0, 1) * ctx.iterations:
            sums = matrix_MMN.sum(dim=dim, keepdim=True)
            matrix_MMN = matrix_MMN / sums
            steps.append((dim, sums, matrix_MMN))
        grad_MMN = _matrices_last(grad)
        for dim, sums, matrix_MMN in reversed(steps):
            grad_MMN = (grad_MMN - (grad_MMN * matrix_MMN).sum(dim=dim, keepdim=True)) / sums
        grad_MMN = (grad_MMN * start_MMN).masked_fill(_shifted(logits_MMN) < LOWEST, 0.0)
        return _matrices_first(grad_MMN, logits.shape).to(logits.dtype), None


def _matrices_last(matrices: Tensor) -> Tensor:
    """[M, M, N], contiguous: rows and columns are summed by adding long vectors."""
    wide = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
    return wide.reshape(-1, *matrices.shape[-2:]).permute(1, 2, 0).contiguous()


def _matrices_first(matrices_MMN: Tensor, shape: torch.Size) -> Tensor:
    return matrices_MMN.permute(2, 0, 1).reshape(shape)


def _shifted(logits_MMN: Tensor) -> Tensor:
    return logits_MMN - logits_MMN.amax(dim=0, keepdim=True)


def _start(logits_MMN: Tensor) -> Tensor:
    return _shifted(logits_MMN).clamp(min=LOWEST).exp()
