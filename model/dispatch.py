"""Moving tokens to experts and back, with backwards that gather.

Autograd's own backward of indexing adds with atomics, in an order that changes from run to run. Here every backward is
a gather, followed for `dispatch` by a sum over a token's experts in a fixed order: bitwise repeatable on any device.

Shape suffixes: N tokens, K experts per token, A = N*K assignments, D hidden.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def dispatch(tokens_ND: Tensor, order_A: Tensor, inverse_A: Tensor) -> Tensor:
    """Returns [A, D]: the token of each assignment, assignments in the order `order_A`.

    Assignment a is the (a mod K)-th expert of token a // K. `order_A` is a permutation of the assignments and
    `inverse_A` its inverse, both int64.
    """
    copies_AD: Tensor = _Dispatch.apply(tokens_ND, order_A, inverse_A)
    return copies_AD


def permute(rows_AD: Tensor, order_A: Tensor, inverse_A: Tensor) -> Tensor:
    """Returns `rows_AD[order_A]`, where `inverse_A` is the inverse of the permutation `order_A`."""
    permuted_AD: Tensor = _Permute.apply(rows_AD, order_A, inverse_A)
    return permuted_AD


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens_ND: Tensor, order_A: Tensor, inverse_A: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_A)
        ctx.copies = len(order_A) // len(tokens_ND)
        return tokens_ND.index_select(0, order_A // ctx.copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_AD: Tensor) -> tuple[Tensor | None, ...]:
        (inverse_A,) = ctx.saved_tensors
        return grad_AD.index_select(0, inverse_A).unflatten(0, (-1, ctx.copies)).sum(dim=1), None, None


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_AD: Tensor, order_A: Tensor, inverse_A: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_A)
        return rows_AD.index_select(0, order_A)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_AD: Tensor) -> tuple[Tensor | None, ...]:
        (inverse_A,) = ctx.saved_tensors
        return grad_AD.index_select(0, inverse_A), None, None
