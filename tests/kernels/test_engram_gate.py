"""The gate against the formula written out with autograd, and the conventions at its corners."""

import math

import pytest
import torch
from torch import Tensor

from kernels.engram_gate import CLAMP, engram_gate

SHAPE = (2, 3, 4, 8)


def _inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, key = (torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(2))
    weights = [1 + 0.3 * torch.randn(SHAPE[2:], generator=generator, dtype=torch.float64) for _ in range(2)]
    return [t.to(dtype).requires_grad_() for t in (hidden, key, *weights)]


def _by_autograd(hidden: Tensor, key: Tensor, wq: Tensor, wk: Tensor, eps: float, signed_sqrt: bool) -> Tensor:
    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight

    score = (norm(hidden, wq) * norm(key, wk)).sum(-1) / math.sqrt(hidden.shape[-1])
    if signed_sqrt:
        score = score.sign() * score.abs().clamp(min=CLAMP).sqrt()
    return score.sigmoid()


@pytest.mark.parametrize("signed_sqrt", [True, False])
@pytest.mark.parametrize("eps", [1e-20, 0.1])
def test_equals_the_formula_forward_and_backward(signed_sqrt: bool, eps: float) -> None:
    inputs = _inputs()
    upstream = torch.randn(SHAPE[:3], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gate = engram_gate(*inputs, eps=eps, signed_sqrt=signed_sqrt)
    expected = _by_autograd(*inputs, eps, signed_sqrt)
    torch.testing.assert_close(gate, expected)
    torch.testing.assert_close(
        torch.autograd.grad(gate, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)
    )


@pytest.mark.parametrize("signed_sqrt", [True, False])
def test_numeric_gradient(signed_sqrt: bool) -> None:
    assert torch.autograd.gradcheck(lambda *args: engram_gate(*args, eps=0.01, signed_sqrt=signed_sqrt), _inputs())


def test_no_gradient_below_the_clamp_and_full_slope_above() -> None:
    ones = torch.ones(1, 2, dtype=torch.float64)
    hidden = torch.tensor([1.0, 1.0], dtype=torch.float64).view(1, 1, 1, 2)
    for tilt, expected_zero in ((0.5e-6, True), (2e-6, False)):
        # <norm(h), norm(k)> / sqrt(2) = tilt for a key almost at a right angle to the hidden state.
        key = torch.tensor([1.0 + tilt / math.sqrt(2), -1.0 + tilt / math.sqrt(2)], dtype=torch.float64)
        key = key.view(1, 1, 1, 2).requires_grad_()
        gate = engram_gate(hidden, key, ones, ones, eps=0.0, signed_sqrt=True)
        gate.sum().backward()
        assert key.grad is not None
        assert (key.grad == 0).all() == expected_zero
        assert gate.item() == pytest.approx(1 / (1 + math.exp(-math.sqrt(max(tilt, CLAMP)))), abs=1e-9)


def test_zero_key_gives_half_a_gate_and_finite_gradients() -> None:
    inputs = [t.detach() for t in _inputs(torch.float32)]
    inputs[1] = torch.zeros_like(inputs[1])
    inputs = [t.requires_grad_() for t in inputs]
    gate = engram_gate(*inputs, eps=1e-20, signed_sqrt=True)
    gate.sum().backward()
    assert (gate == 0.5).all()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in inputs)


def test_bf16_inputs_are_computed_in_fp32() -> None:
    inputs = _inputs(torch.bfloat16)
    gate = engram_gate(*inputs, eps=1e-20, signed_sqrt=True)
    assert gate.dtype == torch.float32
    torch.testing.assert_close(gate, engram_gate(*(t.float() for t in inputs), eps=1e-20, signed_sqrt=True))
    gate.sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.bfloat16 for t in inputs)


def test_shapes_that_do_not_fit_are_refused() -> None:
    hidden, key, wq, wk = _inputs()
    with pytest.raises(ValueError, match=r"share one shape \[B, T, M, D\]"):
        engram_gate(hidden, key[:, :2], wq, wk, eps=0.0, signed_sqrt=True)
    with pytest.raises(ValueError, match=r"must be \[M, D\] = \(4, 8\)"):
        engram_gate(hidden, key, wq, wk[:1], eps=0.0, signed_sqrt=True)
