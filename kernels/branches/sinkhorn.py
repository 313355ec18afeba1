"""Sinkhorn-Knopp: scales a matrix until it is doubly stochastic (Sinkhorn and Knopp 1967).

    M_0 = exp(L)        M_t = R(C(M_(t-1)))        C, R: every column, every row divided by its sum

After the last step rows sum to 1 up to rounding, columns as closely as the iterations got. Shifting a row or a column
of L does not change the result; exp is taken of L minus its columns' maxima, of which the first C removes every trace.

Shape suffixes: M rows and columns, N matrices.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.branches.sinkhorn_reference import Sinkhorn

_MOST_FUSED = 32
"""The most iterations that the Triton backward keeps in registers."""


def sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """Returns the doubly stochastic matrices [..., M, M] that belong to `logits` [..., M, M].

    Computed and returned in fp32 (fp64 for fp64 logits). Saved for the backward: the logits alone; the backward repeats
    the iterations. On a GPU this is Triton, one launch forward and one backward, except in fp64 and with more than 32
    iterations.

    Raises:
        ValueError: the matrices are not square, or there are no iterations.
    """
    if logits.dim() < 2 or logits.shape[-1] != logits.shape[-2] or iterations < 1:
        raise ValueError(f"{iterations} Sinkhorn iterations of matrices {tuple(logits.shape)}, which must be square")
    matrices: Tensor = (_fused_sinkhorn if _fused(logits, iterations) else Sinkhorn.apply)(logits, iterations)
    return matrices


def _fused(logits: Tensor, iterations: int) -> bool:
    return logits.is_cuda and logits.dtype != torch.float64 and iterations <= _MOST_FUSED


# Custom operations, so that torch.compile takes each as it is. The reference is not one: on a CPU, the loops that
# torch.compile generates from it are better.
@torch.library.custom_op("engram::sinkhorn", mutates_args=())
def _fused_sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    from kernels.branches.sinkhorn_triton import sinkhorn_forward

    return sinkhorn_forward(logits, iterations)


@_fused_sinkhorn.register_fake
def _(logits: Tensor, iterations: int) -> Tensor:
    return logits.new_empty(logits.shape, dtype=torch.float32)


@torch.library.custom_op("engram::sinkhorn_backward", mutates_args=())
def _fused_sinkhorn_backward(grad: Tensor, logits: Tensor, iterations: int) -> Tensor:
    from kernels.branches.sinkhorn_triton import sinkhorn_backward

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
