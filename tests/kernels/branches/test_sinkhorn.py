"""Doubly stochastic to a tolerance, its gradient, matrices that would vanish, and what is kept for the backward."""

import pytest
import torch
from torch import Tensor

from kernels.branches.sinkhorn import sinkhorn


def _logits(*shape: int, std: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype) * std


@pytest.mark.parametrize("size", [1, 2, 4, 7])
def test_doubly_stochastic_after_twenty_iterations(size: int) -> None:
    matrices = sinkhorn(_logits(50, 2, size, size, std=0.5), 20)
    assert matrices.shape == (50, 2, size, size)
    assert matrices.min() > 0
    torch.testing.assert_close(matrices.sum(-1), torch.ones(50, 2, size), rtol=0, atol=1e-6)
    torch.testing.assert_close(matrices.sum(-2), torch.ones(50, 2, size), rtol=0, atol=1e-5)


def test_equals_the_iterations_as_they_are_written() -> None:
    logits = _logits(5, 4, 4, std=2, dtype=torch.float64)
    expected = logits.exp()
    for _ in range(3):
        expected = expected / expected.sum(-2, keepdim=True)
        expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(sinkhorn(logits, 3), expected)


@pytest.mark.parametrize("iterations", [1, 20])
def test_gradients(iterations: int) -> None:
    logits = _logits(2, 3, 4, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sinkhorn(x, iterations), logits)


def test_rows_and_columns_far_below_the_others_stay_finite() -> None:
    logits = _logits(3, 4, 4)
    logits[0, 1] -= 300
    logits[1, :, 2] += 300
    logits[2] *= 300
    matrices = sinkhorn(logits.requires_grad_(), 20)
    torch.testing.assert_close(matrices.sum(-1), torch.ones(3, 4))
    torch.testing.assert_close(matrices[:2].sum(-2), torch.ones(2, 4), rtol=0, atol=1e-3)
    (matrices * _logits(3, 4, 4)).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_bf16_logits_are_iterated_in_fp32() -> None:
    logits = _logits(9, 4, 4).bfloat16().requires_grad_()
    matrices = sinkhorn(logits, 20)
    assert torch.equal(matrices, sinkhorn(logits.detach().float(), 20))
    matrices.square().sum().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


def test_only_the_logits_are_kept() -> None:
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        sinkhorn(_logits(10, 4, 4).requires_grad_(), 20)
    assert kept == [160]


@pytest.mark.parametrize(("shape", "iterations"), [((2, 3), 5), ((4,), 5), ((3, 3), 0)])
def test_what_is_no_square_matrix_is_refused(shape: tuple[int, ...], iterations: int) -> None:
    with pytest.raises(ValueError, match="must be square"):
        sinkhorn(torch.zeros(shape), iterations)
