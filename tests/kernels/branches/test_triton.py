"""The Triton mixtures and projections of a stream in parts against the reference in float64."""

import os
from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor

import kernels.branches as public
from kernels.branches import operations
from kernels.branches.projections_triton import project_backward, project_forward
from kernels.branches.triton import mix_backward, mix_forward
from tests.grid import grid
from tests.kernels.own_process import compile_launches, resources_of_launches

BF16, FP32, EPS, ROWS = torch.bfloat16, torch.float32, 1e-5, 24
SHAPES = [(2, 2, 4, 5), (1, 3, 4, 40), (2, 1, 2, 300), (1, 1, 3, 1032), (0, 3, 4, 8)]
"""Batch, length, branches and width, of which none is a multiple of a tile."""


class Stream:
    """Weights, base and outputs of a stream, and gradients of what comes of it."""

    def __init__(
        self, shape: tuple[int, ...], outputs: int, dtype: torch.dtype, device: torch.device, *, one: bool = False
    ) -> None:
        batch, length, branches, width = shape
        generator = torch.Generator().manual_seed(sum(shape) + outputs)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        rows = 1 if one else branches
        self.weights = (draw(batch, length, rows, branches + outputs) / 2).to(device)
        self.base = draw(*shape).to(device, dtype)
        self.outputs = [draw(batch, length, width).to(device, dtype) for _ in range(outputs)]
        self.projection = (draw(ROWS, branches * width) / (branches * width) ** 0.5).to(device, dtype)
        self.grad = draw(batch, length, rows, width).to(device, dtype)
        self.grad_projected = draw(batch, length, ROWS).to(device)


def _close(actual: list[Tensor], expected: tuple[Tensor, ...], tolerance: float) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.is_contiguous()
        largest = float(other.detach().abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(one.cpu().double(), other, rtol=tolerance, atol=tolerance * largest / 4)


def _check_mixtures(stream: Stream) -> None:
    inputs = [stream.weights, stream.base, *stream.outputs]
    leaves = [x.cpu().double().requires_grad_() for x in inputs]
    mixed = public.mix_branches(*leaves)
    right = torch.autograd.grad(mixed, leaves, stream.grad.cpu().double())
    actual = mix_forward(stream.weights, stream.base, stream.outputs)
    grads = mix_backward(stream.grad, stream.weights, stream.base, stream.outputs)
    assert [x.dtype for x in (actual, *grads)] == [stream.base.dtype, *(x.dtype for x in inputs)]
    # In bf16 one rounding, of results alone: the weights' gradient is of fp32.
    rounding = 2**-8 if stream.base.dtype == BF16 else 1e-5
    _close([actual, *grads[1:]], (mixed.detach(), *right[1:]), rounding)
    _close(grads[:1], right[:1], 1e-5)


def _check_projections(stream: Stream, *, alone: bool) -> None:
    weights = None if alone else stream.weights
    parts = [stream.base] if alone else [stream.weights, stream.base, *stream.outputs]
    leaves = [x.cpu().double().requires_grad_() for x in (stream.projection, *parts)]
    projection, *rest = leaves
    projected = public.project_branches(projection, *((None, *rest) if alone else rest), eps=EPS)
    right = torch.autograd.grad(projected, leaves, stream.grad_projected.cpu().double())
    outputs = [] if alone else stream.outputs
    actual, scale = project_forward(stream.projection, weights, stream.base, outputs, EPS)
    grads = project_backward(stream.grad_projected, actual, scale, stream.projection, weights, stream.base, outputs)
    assert [x.dtype for x in (actual, *grads)] == [FP32, *(x.dtype for x in (stream.projection, *parts))]
    # In bf16 the stream is rounded before it is multiplied, and what is multiplied by P and by it.
    tolerance = 2**-6 if stream.base.dtype == BF16 else 1e-5
    _close([actual, *grads], (projected.detach(), *right), tolerance)


@pytest.mark.parametrize(("shape", "outputs", "dtype"), grid(SHAPES, [2, 1, 0], [BF16, FP32]))
def test_mixtures_equal_the_reference(
    kernel_device: torch.device, shape: tuple[int, ...], outputs: int, dtype: torch.dtype
) -> None:
    for one in (False, True):
        _check_mixtures(Stream(shape, outputs, dtype, kernel_device, one=one))


@pytest.mark.parametrize(("shape", "outputs", "dtype"), grid(SHAPES, [2, None, 1, 0], [FP32, BF16]))
def test_projections_equal_the_reference(
    kernel_device: torch.device, shape: tuple[int, ...], outputs: int | None, dtype: torch.dtype
) -> None:
    _check_projections(Stream(shape, outputs or 0, dtype, kernel_device), alone=outputs is None)


@pytest.mark.parametrize("dtype", [pytest.param(FP32, marks=pytest.mark.long), BF16])
def test_arguments_of_any_strides(kernel_device: torch.device, dtype: torch.dtype) -> None:
    """A base that is one state in every branch, parts of wider tensors, gradients of sums."""
    stream = Stream((2, 2, 4, 24), 2, dtype, kernel_device)
    stream.weights = stream.weights.transpose(2, 3).contiguous().transpose(2, 3)
    stream.base = stream.base[:, :, :1].expand(-1, -1, 4, -1)
    stream.outputs[0] = torch.stack(stream.outputs, dim=-2)[:, :, 0]
    stream.outputs[1] = stream.outputs[1].mT.contiguous().mT
    stream.grad = stream.grad.transpose(1, 2).contiguous().transpose(1, 2)
    stream.grad_projected = stream.grad_projected[:1, :1, :1].expand(2, 2, ROWS)
    _check_mixtures(stream)
    _check_projections(stream, alone=False)
    _check_projections(stream, alone=True)
    stream.grad = stream.grad[:1, :1, :1, :1].expand(2, 2, 4, 24)
    _check_mixtures(stream)


def _everything(stream: Stream) -> list[Tensor]:
    parts = stream.weights, stream.base, stream.outputs
    projected, scale = project_forward(stream.projection, *parts, EPS)
    return [
        mix_forward(*parts),
        *mix_backward(stream.grad, *parts),
        projected,
        *project_backward(stream.grad_projected, projected, scale, stream.projection, *parts),
    ]


@pytest.mark.parametrize("dtype", [pytest.param(FP32, marks=pytest.mark.long), BF16])
def test_same_bits_again(kernel_device: torch.device, dtype: torch.dtype) -> None:
    # In the interpreter nothing runs side by side.
    shape = (2, 300, 4, 264) if kernel_device.type == "cuda" else (1, 2, 4, 264)
    stream = Stream(shape, 2, dtype, kernel_device)
    assert all(torch.equal(a, b) for a, b in zip(_everything(stream), _everything(stream), strict=True))


def test_offsets_beyond_32_bits(kernel_device: torch.device) -> None:
    """In memory of which only the pages in use exist on a CPU."""
    stream = Stream((1, 3, 2, 8), 1, BF16, kernel_device)
    far = torch.empty(2**31 + 4096, dtype=BF16, device=kernel_device)
    stream.base = far.as_strided((1, 3, 2, 8), (0, 2**30, 8, 1)).copy_(stream.base)
    stream.outputs[0] = far[64:].as_strided((1, 3, 8), (0, 2**30, 1)).copy_(stream.outputs[0])
    _check_mixtures(stream)
    _check_projections(stream, alone=False)


def _publicly(stream: Stream, *, alone: bool) -> list[Tensor]:
    """Results and gradients by the public functions."""
    leaves = [x.detach().requires_grad_() for x in (stream.projection, stream.weights, stream.base, *stream.outputs)]
    projection, weights, base, *outputs = leaves
    mixed = public.mix_branches(weights, base, *outputs)
    stated = (None, base) if alone else (weights, base, *outputs)
    projected = public.project_branches(projection, *stated, eps=EPS)
    torch.autograd.backward((mixed, projected), (stream.grad, stream.grad_projected))
    return [mixed, projected, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize(("outputs", "alone"), grid([0, 2], [True, False]))
def test_public_functions_reach_the_kernels(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch, outputs: int, alone: bool
) -> None:
    stream = Stream((2, 2, 4, 24), outputs, FP32, kernel_device)
    monkeypatch.setattr(public, "_fused", lambda *_: False)
    expected = _publicly(stream, alone=alone)
    monkeypatch.setattr(public, "_fused", lambda *_: True)
    with mock.patch("kernels.branches.projections_triton.project_backward", wraps=project_backward) as kernel:
        torch.testing.assert_close(_publicly(stream, alone=alone), expected)
    assert kernel.call_count == 1


def test_operations_keep_what_they_promise_to_torch() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled here: no interpreter for CPU tensors")
    stream = Stream((1, 2, 2, 24), 1, FP32, torch.device("cpu"))
    parts = [x.requires_grad_() for x in (stream.weights, stream.base, *stream.outputs)]
    weights, base, *outputs = parts
    torch.library.opcheck(operations.fused_mix, (weights, base, outputs))
    detached = [x.detach() for x in parts]
    torch.library.opcheck(operations.fused_mix_backward, (stream.grad, *detached[:2], detached[2:]))
    projection = stream.projection.requires_grad_()
    torch.library.opcheck(operations.fused_project, (projection, EPS, weights, base, outputs))
    torch.library.opcheck(operations.fused_project, (projection, EPS, None, base, []))


@pytest.mark.gpu
def test_picked_on_a_gpu_and_compiled_whole() -> None:
    stream = Stream((2, 30, 4, 264), 2, BF16, torch.device("cuda"))
    expected = _publicly(stream, alone=False)
    assert torch.equal(expected[0], mix_forward(stream.weights, stream.base, stream.outputs))
    leaves = [x.detach().requires_grad_() for x in (stream.projection, stream.weights, stream.base, *stream.outputs)]

    def both(projection: Tensor, *parts: Tensor) -> tuple[Tensor, Tensor]:
        return public.mix_branches(*parts), public.project_branches(projection, *parts, eps=EPS)

    results = torch.compile(both, fullgraph=True)(*leaves)
    torch.autograd.backward(results, (stream.grad, stream.grad_projected))
    actual = [*results, *(leaf.grad for leaf in leaves)]
    torch.testing.assert_close(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "branches", "fused"), [(FP32, 4, 1), (BF16, 4, 1), (torch.float64, 4, 0), (BF16, 7, 0)]
)
def test_not_in_fp64_nor_of_more_parts_than_registers_hold(dtype: torch.dtype, branches: int, fused: int) -> None:
    stream = Stream((2, 3, branches, 24), 0, dtype, torch.device("cuda"))
    stream.weights = stream.weights.to(torch.promote_types(dtype, FP32))
    with mock.patch("kernels.branches.triton.mix_forward", wraps=mix_forward) as kernel:
        public.mix_branches(stream.weights, stream.base)
    assert kernel.call_count == fused


def launches(outputs: int | None) -> None:
    parts = [torch.empty(shape, dtype=BF16) for shape in ((2, 8, 4, 2048), *[(2, 8, 2048)] * (outputs or 0))]
    weights, projection = torch.empty(2, 8, 4, len(parts) + 3), torch.empty(ROWS, 8192, dtype=BF16)
    if outputs is not None:
        mix_backward(mix_forward(weights, parts[0], parts[1:]), weights, parts[0], parts[1:])
    stream = None if outputs is None else weights, parts[0], parts[1:]
    projected, scale = project_forward(projection, *stream, 1e-6)
    project_backward(projected, projected, scale, projection, *stream)


@pytest.mark.parametrize(
    "outputs", [None, pytest.param(0, marks=pytest.mark.long), pytest.param(1, marks=pytest.mark.long), 2]
)
def test_compiles_for_an_h100_without_spills(outputs: int | None) -> None:
    """Down to machine code, with loads of whole vectors and no atomics."""
    compiled = compile_launches(partial(launches, outputs))
    mixing = [] if outputs is None else ["_mix_kernel", "_mix_backward_kernel"]
    assert [name for name, _ in compiled] == [*mixing, "_stream_kernel", "_scaled_kernel", "_mix_backward_kernel"]
    for name, code in compiled:
        assert "global.v4" in code, name
        assert "atom" not in code, name
    needed = resources_of_launches(partial(launches, outputs))
    assert {(name, needs.stack) for name, needs in needed if needs.stack} == set()
