"""The gate against the formula written out with autograd, and the conventions at its corners."""

import math

import pytest
import torch
from torch import Tensor

from kernels.gate import engram_gate
from kernels.gate.reference import CLAMP

SHAPE = (2, 3, 4, 8)


def _inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, key = (torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(2))
    value = torch.randn(SHAPE[0], SHAPE[1], SHAPE[3], generator=generator, dtype=torch.float64)
    weights = [1 + 0.3 * torch.randn(SHAPE[2:], generator=generator, dtype=torch.float64) for _ in range(2)]
    return [t.to(dtype).requires_grad_() for t in (hidden, key, value, *weights)]


def _upstream(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


def _by_autograd(
    hidden: Tensor, key: Tensor, value: Tensor, wq: Tensor, wk: Tensor, eps: float, signed_sqrt: bool
) -> Tensor:
    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight

    score = (norm(hidden, wq) * norm(key, wk)).sum(-1) / math.sqrt(hidden.shape[-1])
    if signed_sqrt:
        score = score.sign() * score.abs().clamp(min=CLAMP).sqrt()
    return score.sigmoid().unsqueeze(-1) * value.unsqueeze(2)


@pytest.mark.parametrize("signed_sqrt", [True, False])
@pytest.mark.parametrize("eps", [1e-20, 0.1])
def test_equals_the_formula_forward_and_backward(signed_sqrt: bool, eps: float) -> None:
    inputs = _inputs()
    gated, _ = engram_gate(*inputs, eps=eps, signed_sqrt=signed_sqrt)
    expected = _by_autograd(*inputs, eps, signed_sqrt)
    torch.testing.assert_close(gated, expected)
    torch.testing.assert_close(
        torch.autograd.grad(gated, inputs, _upstream()), torch.autograd.grad(expected, inputs, _upstream())
    )


@pytest.mark.parametrize("signed_sqrt", [True, False])
def test_numeric_gradient(signed_sqrt: bool) -> None:
    assert torch.autograd.gradcheck(lambda *args: engram_gate(*args, eps=0.01, signed_sqrt=signed_sqrt)[0], _inputs())


def test_no_gradient_below_the_clamp_and_full_slope_above() -> None:
    ones = torch.ones(1, 2, dtype=torch.float64)
    hidden = torch.tensor([1.0, 1.0], dtype=torch.float64).view(1, 1, 1, 2)
    for tilt, expected_zero in ((0.5e-6, True), (2e-6, False)):
        # <norm(h), norm(k)> / sqrt(2) = tilt for a key almost at a right angle to the hidden state.
        key = torch.tensor([1.0 + tilt / math.sqrt(2), -1.0 + tilt / math.sqrt(2)], dtype=torch.float64)
        key = key.view(1, 1, 1, 2).requires_grad_()
        gate, _ = engram_gate(hidden, key, ones.view(1, 1, 2), ones, ones, eps=0.0, signed_sqrt=True)
        gate.sum().backward()
        assert key.grad is not None
        assert (key.grad == 0).all() == expected_zero
        expected = 1 / (1 + math.exp(-math.sqrt(max(tilt, CLAMP))))
        assert gate.flatten().tolist() == pytest.approx([expected] * 2, abs=1e-9)


def test_zero_key_gives_half_a_gate_and_finite_gradients() -> None:
    inputs = [t.detach() for t in _inputs(torch.float32)]
    inputs[1] = torch.zeros_like(inputs[1])
    inputs = [t.requires_grad_() for t in inputs]
    gated, _ = engram_gate(*inputs, eps=1e-20, signed_sqrt=True)
    gated.sum().backward()
    assert torch.equal(gated, (0.5 * inputs[2]).unsqueeze(2).expand(SHAPE))
    assert all(t.grad is not None and t.grad.isfinite().all() for t in inputs)


def test_bf16_inputs_are_computed_in_fp32_and_rounded_once() -> None:
    inputs = _inputs(torch.bfloat16)
    wide = [t.detach().float().requires_grad_() for t in inputs]
    gated, _ = engram_gate(*inputs, eps=1e-20, signed_sqrt=True)
    in_fp32, _ = engram_gate(*wide, eps=1e-20, signed_sqrt=True)
    assert torch.equal(gated, in_fp32.bfloat16())
    upstream = _upstream(torch.bfloat16)
    gradients = torch.autograd.grad(gated, inputs, upstream)
    wide_gradients = torch.autograd.grad(in_fp32, wide, upstream.float())
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(gradients, wide_gradients, strict=True))


def test_saves_its_inputs_and_three_numbers_a_token_and_branch() -> None:
    inputs = _inputs(torch.float32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        engram_gate(*inputs, eps=1e-20, signed_sqrt=True)
    own = [t for t in saved if t.data_ptr() not in {i.data_ptr() for i in inputs}]
    assert [t.shape for t in own] == [(3, *SHAPE[:3])]


def test_operations_are_what_they_declare() -> None:
    hidden, *rest = (t.detach().requires_grad_() for t in _inputs(torch.float32))
    permuted = hidden.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    for first in (hidden, permuted):
        torch.library.opcheck(torch.ops.engram.gate.default, (first, *rest, 1e-20, True))


def test_compiled_whole() -> None:
    """No graph break, and the same bits, with inputs of two dtypes as under autocast."""
    inputs = _inputs(torch.float32)
    inputs[1:3] = [t.detach().bfloat16().requires_grad_() for t in inputs[1:3]]

    def model(*inputs: Tensor) -> Tensor:
        return engram_gate(*inputs, eps=1e-20, signed_sqrt=True)[0].square()

    results = []
    for function in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        out = function(*inputs)
        results.append((out, *torch.autograd.grad(out, inputs, _upstream(torch.bfloat16))))
    assert all(torch.equal(eager, compiled) for eager, compiled in zip(*results, strict=True))


def test_shapes_that_do_not_fit_are_refused() -> None:
    hidden, key, value, wq, wk = _inputs()
    with pytest.raises(ValueError, match=r"share one shape \[B, T, M, D\]"):
        engram_gate(hidden, key[:, :2], value, wq, wk, eps=0.0, signed_sqrt=True)
    with pytest.raises(ValueError, match=r"values \(2, 3, 7\) must be \[B, T, D\] = \(2, 3, 8\)"):
        engram_gate(hidden, key, value[..., 1:], wq, wk, eps=0.0, signed_sqrt=True)
    with pytest.raises(ValueError, match=r"must be \[M, D\] = \(4, 8\)"):
        engram_gate(hidden, key, value, wq, wk[:1], eps=0.0, signed_sqrt=True)
