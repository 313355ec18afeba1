"""Sinkhorn-Knopp: scales a matrix until it is doubly stochastic (Sinkhorn and Knopp 1967).

    M_0 = exp(L)        M_t = R(C(M_(t-1)))        C, R: every column, every row divided by its sum

After the last step rows sum to 1 to rounding, columns as nearly as the iterations got. The result does not change if a
row or a column of L is shifted; exp is taken of L less its columns' maxima, of which the first C leaves no trace.

Shape suffixes: M rows and columns, N matrices.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOWEST = -60.0
"""A logit counts for no less than its column's maximum and this: no row's sum can vanish in fp32."""
_MOST_FUSED = 32
"""Most iterations of which the Triton backward keeps all in registers."""


def sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """Returns the doubly stochastic matrices [..., M, M] that belong to `logits` [..., M, M].

    Computed, and returned, in fp32 (fp64 for fp64 logits). Saved for the backward: the logits alone; the backward goes
    through the iterations again. On a GPU this is Triton, one launch forward and one backward, except in fp64 and with
    more than 32 iterations.

    Raises:
        ValueError: the matrices are not square, or there is no iteration.
    """
    if logits.dim() < 2 or logits.shape[-1] != logits.shape[-2] or iterations < 1:
        raise ValueError(f"{iterations} Sinkhorn iterations of matrices {tuple(logits.shape)}, which must be square")
    matrices: Tensor = (_fused_sinkhorn if _fused(logits, iterations) else _Sinkhorn.apply)(logits, iterations)
    return matrices


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, iterations: int) -> Tensor:
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


def _fused(logits: Tensor, iterations: int) -> bool:
    return logits.is_cuda and logits.dtype != torch.float64 and iterations <= _MOST_FUSED


# Custom operations, so that torch.compile takes each as it is. The reference is none: what is compiled for a CPU is
# better off with the loops that torch.compile makes of it.
@torch.library.custom_op("engram::sinkhorn", mutates_args=())
def _fused_sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    from kernels.sinkhorn_triton import sinkhorn_forward

    return sinkhorn_forward(logits, iterations)


@_fused_sinkhorn.register_fake
def _(logits: Tensor, iterations: int) -> Tensor:
    return logits.new_empty(logits.shape, dtype=torch.float32)


@torch.library.custom_op("engram::sinkhorn_backward", mutates_args=())
def _fused_sinkhorn_backward(grad: Tensor, logits: Tensor, iterations: int) -> Tensor:
    from kernels.sinkhorn_triton import sinkhorn_backward

    return sinkhorn_backward(grad, logits, iterations)


@_fused_sinkhorn_backward.register_fake
def _(grad: Tensor, logits: Tensor, iterations: int) -> Tensor:
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    logits, ctx.iterations = inputs
    ctx.save_for_backward(logits)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _fused_sinkhorn_backward(grad, *ctx.saved_tensors, ctx.iterations), None


_fused_sinkhorn.register_autograd(_differentiate, setup_context=_save)
