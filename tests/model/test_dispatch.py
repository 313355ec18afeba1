"""Permutation and its gradient, which no atomics compute."""

import torch

from model.dispatch import dispatch, permute


def _order(assignments: int) -> tuple[torch.Tensor, torch.Tensor]:
    order = torch.randperm(assignments, generator=torch.Generator().manual_seed(0))
    return order, order.argsort()


def test_dispatch_equals_indexing_forward_and_backward() -> None:
    order, inverse = _order(15)
    tokens = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(15, 4, dtype=torch.float64)
    copies = dispatch(tokens, order, inverse)
    assert torch.equal(copies, tokens.repeat_interleave(3, dim=0)[order])
    expected = torch.autograd.grad(tokens[order // 3], tokens, upstream)
    torch.testing.assert_close(torch.autograd.grad(copies, tokens, upstream), expected)


def test_permute_equals_indexing_forward_and_backward() -> None:
    order, inverse = _order(6)
    rows = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(6, 2, dtype=torch.float64)
    assert torch.equal(permute(rows, order, inverse), rows[order])
    actual = torch.autograd.grad(permute(rows, order, inverse), rows, upstream)
    assert torch.equal(actual[0], torch.autograd.grad(rows[order], rows, upstream)[0])
