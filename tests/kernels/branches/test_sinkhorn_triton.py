"""The Triton Sinkhorn against the reference in float64."""

import os
from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor

import kernels.branches.sinkhorn as public
from kernels.branches.sinkhorn_triton import sinkhorn_backward, sinkhorn_forward
from tests.grid import grid
from tests.kernels.own_process import compile_launches, resources_of_launches

# In the interpreter: what only fills a tile has no maximum.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
BF16, FP32 = torch.bfloat16, torch.float32


def _inputs(*shape: int, device: torch.device, std: float = 1.5, dtype: torch.dtype = FP32) -> tuple[Tensor, Tensor]:
    """Logits, and a gradient of the matrices."""
    generator = torch.Generator().manual_seed(sum(shape))
    logits, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    return (logits * std).to(dtype).to(device), grad.to(device)


def _check(logits: Tensor, grad: Tensor, iterations: int, tolerance: float = 1e-5) -> Tensor:
    """Compares with fp64; returns the gradient of the logits."""
    leaf = logits.detach().cpu().double().requires_grad_()
    matrices = public.sinkhorn(leaf, iterations)
    (right,) = torch.autograd.grad(matrices, leaf, grad.cpu().double())
    actual, dlogits = sinkhorn_forward(logits, iterations), sinkhorn_backward(grad, logits, iterations)
    for result, dtype in ((actual, FP32), (dlogits, logits.dtype)):
        assert result.is_contiguous()
        assert result.dtype == dtype
    torch.testing.assert_close(actual.cpu().double(), matrices.detach(), rtol=tolerance, atol=1e-20)
    # In bf16 one rounding, to the nearest.
    relative = 2**-8 if logits.dtype == BF16 else tolerance
    largest = float(grad.abs().max()) if grad.numel() else 0.0
    torch.testing.assert_close(dlogits.cpu().double(), right, rtol=relative, atol=0.2 * tolerance * largest)
    return dlogits


@pytest.mark.parametrize(
    ("shape", "iterations"),
    grid([(1, 1), (37, 2, 2), (3, 7, 3, 3), (2, 13, 4, 4), (5, 8, 8), (1, 12, 12), (0, 4, 4)], [1, 20]),
)
def test_equals_the_reference(kernel_device: torch.device, shape: tuple[int, ...], iterations: int) -> None:
    _check(*_inputs(*shape, device=kernel_device), iterations)


@pytest.mark.parametrize("size", [3, 4])
def test_bf16_logits(kernel_device: torch.device, size: int) -> None:
    _check(*_inputs(2, 9, size, size, device=kernel_device, dtype=BF16), 20)


def test_logits_and_gradients_of_any_strides(kernel_device: torch.device) -> None:
    logits, grad = _inputs(2, 11, 4, 4, device=kernel_device)
    *_, columns = torch.cat((grad.flatten(-2)[..., :8], logits.flatten(-2)), dim=-1).split((4, 4, 16), dim=-1)
    part = columns.unflatten(-1, (4, 4))
    assert part.flatten(0, 1).data_ptr() == part.data_ptr() != columns.untyped_storage().data_ptr()
    of_wider_rows = torch.cat((grad, logits[..., :1]), dim=-1)[..., :4]
    of_sum = grad[:1, :1, :1, :1].expand_as(grad)
    for strided in (part, of_wider_rows, of_sum, logits.mT, logits.transpose(0, 1).contiguous().transpose(0, 1)):
        assert not strided.is_contiguous()
        _check(strided, grad, 2)
        _check(logits, strided, 2)


def test_no_gradient_of_logits_too_low_to_count(kernel_device: torch.device) -> None:
    logits, grad = _inputs(3, 11, 4, 4, device=kernel_device)
    logits[:, ::2, 1] -= 300
    logits[:, 1::2, :, 2] += 300
    # A column's maximum is exact, and so is the distance to it.
    logits[0, 0, :, 0] = torch.tensor([0.0, -60.0, -60.0625, 8.0 - 60])
    low = logits - logits.amax(dim=-2, keepdim=True) < -60
    assert low[0, 0, :, 0].tolist() == [False, False, True, False]
    dlogits = _check(logits, grad, 20, tolerance=5e-5)
    assert (dlogits[low] == 0).all()
    assert (dlogits[0, 0, [0, 1, 3], 0] != 0).all()


def test_far_apart_logits_stay_finite(kernel_device: torch.device) -> None:
    logits, grad = _inputs(40, 4, 4, device=kernel_device, std=300)
    matrices, dlogits = sinkhorn_forward(logits, 20), sinkhorn_backward(grad, logits, 20)
    torch.testing.assert_close(matrices.sum(-1), torch.ones(40, 4, device=kernel_device))
    assert dlogits.isfinite().all()


@pytest.mark.parametrize("size", [3, 4])
def test_nan_is_not_hidden_and_stays_in_its_matrix(kernel_device: torch.device, size: int) -> None:
    logits, grad = _inputs(5, size, size, device=kernel_device)
    logits[2, 1, 0] = torch.nan
    for result in (sinkhorn_forward(logits, 20), sinkhorn_backward(grad, logits, 20)):
        assert result.isnan().flatten(1).all(dim=1).tolist() == [False, False, True, False, False]
        assert result.isnan().flatten(1).any(dim=1).tolist() == [False, False, True, False, False]


def test_offsets_beyond_32_bits(kernel_device: torch.device) -> None:
    """In memory of which only the pages in use exist on a CPU."""
    logits, grad = _inputs(3, 4, 4, device=kernel_device, dtype=BF16)
    far = torch.empty(2**31 + 4096, dtype=BF16, device=kernel_device).as_strided((3, 4, 4), (2**30, 4, 1))
    _check(far.copy_(logits), grad, 2)
    _check(logits, far.copy_(grad), 2)


def test_same_bits_again(kernel_device: torch.device) -> None:
    logits, grad = _inputs(50 if kernel_device.type == "cuda" else 9, 4, 4, device=kernel_device)
    assert torch.equal(sinkhorn_forward(logits, 20), sinkhorn_forward(logits, 20))
    assert torch.equal(sinkhorn_backward(grad, logits, 20), sinkhorn_backward(grad, logits, 20))


def test_public_function_reaches_the_kernels(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(public, "_fused", lambda *_: True)
    logits, grad = _inputs(2, 5, 4, 4, device=kernel_device)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        matrices = public.sinkhorn(logits.requires_grad_(), 20)
    assert [x.data_ptr() for x in kept] == [logits.data_ptr()]
    matrices.backward(grad)
    assert torch.equal(matrices, sinkhorn_forward(logits.detach(), 20))
    assert torch.equal(logits.grad, sinkhorn_backward(grad, logits.detach(), 20))


def test_operations_keep_what_they_promise_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled here: no interpreter for CPU tensors")
    logits, grad = _inputs(2, 5, 4, 4, device=torch.device("cpu"), dtype=BF16)
    torch.library.opcheck(public._fused_sinkhorn, (logits.requires_grad_(), 3))
    torch.library.opcheck(public._fused_sinkhorn_backward, (grad, logits.detach(), 3))


@pytest.mark.gpu
def test_picked_on_a_gpu_and_compiled_whole() -> None:
    logits, grad = (
        _inputs(2, 11, 24, device=torch.device("cuda"))[0],
        _inputs(2, 11, 4, 4, device=torch.device("cuda"))[1],
    )

    def of_part(logits: Tensor) -> Tensor:
        return public.sinkhorn(logits[..., 8:].unflatten(-1, (4, 4)), 20)

    part = logits[..., 8:].unflatten(-1, (4, 4))
    expected = sinkhorn_forward(part, 20), sinkhorn_backward(grad, part, 20)
    logits.requires_grad_()
    for function in (of_part, torch.compile(of_part, fullgraph=True)):
        matrices = function(logits)
        (dlogits,) = torch.autograd.grad(matrices, logits, grad)
        # Compiled, the kernels may be handed other strides and add in another order.
        torch.testing.assert_close(matrices, expected[0], rtol=2e-6, atol=0)
        torch.testing.assert_close(dlogits[..., 8:].unflatten(-1, (4, 4)), expected[1], rtol=1e-5, atol=2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "iterations", "fused"), [(FP32, 32, 1), (FP32, 33, 0), (torch.float64, 20, 0)])
def test_not_in_fp64_nor_for_more_iterations_than_registers_hold(
    dtype: torch.dtype, iterations: int, fused: int
) -> None:
    logits, grad = (t.to(dtype) for t in _inputs(2, 11, 4, 4, device=torch.device("cuda")))
    with mock.patch("kernels.branches.sinkhorn_triton.sinkhorn_backward", wraps=sinkhorn_backward) as kernel:
        public.sinkhorn(logits.requires_grad_(), iterations).backward(grad)
    assert kernel.call_count == fused


def launches(tokens: int, size: int, iterations: int) -> None:
    logits = torch.empty(1, tokens, 2 * size + size**2)[..., 2 * size :].unflatten(-1, (size, size))
    sinkhorn_backward(sinkhorn_forward(logits, iterations), logits, iterations)


@pytest.mark.parametrize(
    "form",
    [(64, 4, public._MOST_FUSED)]
    + [
        pytest.param(form, marks=pytest.mark.long)
        for form in ((1, 4, 1), (64, 2, 20), (64, 3, 20), (64, 4, 20), (64, 8, 20))
    ],
    ids=str,
)
def test_compiles_for_an_h100_without_spills(form: tuple[int, int, int]) -> None:
    compiled = compile_launches(partial(launches, *form))
    assert [name for name, _ in compiled] == ["_forward_kernel", "_backward_kernel"]
    assert not any("atom" in code for _, code in compiled)
    assert {(needs.stack, needs.local) for _, needs in resources_of_launches(partial(launches, *form))} == {(0, 0)}
