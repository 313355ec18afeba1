"""The Triton forms of hyper-connections' small matrices against the reference in float64."""

import os
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import kernels.branches.maps as public
from kernels.branches.compose_triton import compose_backward, compose_forward
from kernels.branches.mappings_triton import mappings_backward, mappings_forward
from tests.grid import grid
from tests.kernels.own_process import compile_launches, resources_of_launches

BF16, FP32 = torch.bfloat16, torch.float32


def _draw(*shape: int, device: torch.device, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


def _close(actual: list[Tensor], expected: list[Tensor], dtypes: list[torch.dtype]) -> None:
    assert [x.dtype for x in actual] == dtypes
    for one, other in zip(actual, expected, strict=True):
        assert one.is_contiguous()
        relative = 2**-8 if one.dtype == BF16 else 1e-5
        torch.testing.assert_close(one.cpu().double(), other.detach(), rtol=relative, atol=3e-5)


def _mapping_inputs(
    tokens: tuple[int, int], branches: int, dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """Projections, alpha and b; gradients of the three results, each a part of a wider tensor."""
    rows = branches * (branches + 2)
    inputs = [_draw(*tokens, rows, device=device), _draw(3, device=device, dtype=dtype)]
    inputs.append(_draw(rows, device=device, dtype=dtype))
    wide = _draw(*tokens, branches, branches + 2, device=device)
    return inputs, [wide[..., 0], wide[..., 1], wide[..., 2:]]


@pytest.mark.parametrize(("tokens", "branches", "dtype"), grid([(1, 1), (3, 43), (0, 3)], [3, 4, 1, 2], [FP32, BF16]))
def test_mappings_equal_the_reference(
    kernel_device: torch.device, tokens: tuple[int, int], branches: int, dtype: torch.dtype
) -> None:
    inputs, grads = _mapping_inputs(tokens, branches, dtype, kernel_device)
    leaves = [x.cpu().double().requires_grad_() for x in inputs]
    expected = public.stream_mappings(*leaves)
    right = torch.autograd.grad(expected, leaves, [x.cpu().double() for x in grads])
    pre, post, res = mappings_forward(*inputs, branches)
    actual = mappings_backward(*grads, pre, post, *inputs)
    _close([pre, post, res, *actual], [*expected, *right], [FP32] * 4 + [dtype] * 2)


def _compose_inputs(
    sizes: tuple[int, int, int], weights: bool, written: bool, device: torch.device
) -> list[Tensor | None]:
    tokens, rows, branches = sizes
    mapping = _draw(2, tokens, branches, rows, device=device).mT
    return [
        mapping,
        _draw(2, tokens, branches, branches + 1, device=device) if weights else None,
        _draw(2, tokens, rows + 1, device=device)[..., 1:] if written else None,
    ]


@pytest.mark.parametrize(
    ("sizes", "parts"),
    grid([(1, 1, 4), (45, 4, 4), (3, 3, 3), (5, 2, 2), (0, 4, 4)], [(True, False), (True, True), (False, True)]),
)
def test_compositions_equal_the_reference(
    kernel_device: torch.device, sizes: tuple[int, int, int], parts: tuple[bool, bool]
) -> None:
    inputs = _compose_inputs(sizes, *parts, kernel_device)  # weights, written
    leaves = [None if x is None else x.cpu().double().requires_grad_() for x in inputs]
    expected = public.compose(*leaves)  # type: ignore[arg-type]
    grad = _draw(*expected.mT.shape, device=kernel_device).mT
    given = [x for x in leaves if x is not None]
    right = torch.autograd.grad(expected, given, grad.cpu().double())
    composed, grads = compose_forward(*inputs), compose_backward(grad, *inputs)  # type: ignore[arg-type]
    _close([composed, *grads], [expected, *right], [FP32] * (1 + len(grads)))


def test_same_bits_again(kernel_device: torch.device) -> None:
    tokens = (5, 1000) if kernel_device.type == "cuda" else (3, 43)
    inputs, grads = _mapping_inputs(tokens, 4, BF16, kernel_device)
    pre, post, _ = mappings_forward(*inputs, 4)
    first, second = (mappings_backward(*grads, pre, post, *inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _chain(projected: Tensor, alpha: Tensor, bias: Tensor) -> Tensor:
    pre, post, res = public.stream_mappings(projected, alpha, bias)
    weights = public.compose(res, public.compose(res, None, post), post)
    return public.compose(pre.unsqueeze(2), weights)


def _outcome(inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    result = _chain(*leaves)
    return [result.detach(), *torch.autograd.grad(result, leaves, torch.ones_like(result))]


def test_public_functions_reach_the_kernels(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, _ = _mapping_inputs((2, 5), 4, FP32, kernel_device)
    monkeypatch.setattr(public, "_fused", lambda *_: False)
    expected = _outcome(inputs)
    monkeypatch.setattr(public, "_fused", lambda *_: True)
    torch.testing.assert_close(_outcome(inputs), expected)


def test_operations_keep_what_they_promise_to_torch() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled here: no interpreter for CPU tensors")
    inputs, grads = _mapping_inputs((2, 5), 2, BF16, torch.device("cpu"))
    torch.library.opcheck(public._fused_mappings, (*(x.requires_grad_() for x in inputs), 2))
    detached = [x.detach() for x in inputs]
    pre, post, _ = mappings_forward(*detached, 2)
    torch.library.opcheck(public._fused_mappings_backward, (*grads, pre, post, *detached))
    for given in ((True, True), (True, False), (False, True)):
        composed = [x if x is None else x.requires_grad_() for x in _compose_inputs((3, 2, 2), *given, pre.device)]
        torch.library.opcheck(public._fused_compose, tuple(composed))


@pytest.mark.gpu
def test_picked_on_a_gpu_and_compiled_whole() -> None:
    inputs, _ = _mapping_inputs((2, 43), 4, BF16, torch.device("cuda"))
    expected = _outcome(inputs)
    leaves = [x.detach().requires_grad_() for x in inputs]
    result = torch.compile(_chain, fullgraph=True)(*leaves)
    actual = [result.detach(), *torch.autograd.grad(result, leaves, torch.ones_like(result))]
    torch.testing.assert_close(actual, expected)


def test_biases_of_no_number_of_branches_are_refused() -> None:
    with pytest.raises(ValueError, match=r"23 projections and 23 biases must be M \* \(M \+ 2\) each"):
        public.stream_mappings(torch.zeros(1, 1, 23), torch.zeros(3), torch.zeros(23))


def launch_mappings() -> None:
    projected, bias = torch.empty(2, 64, 24), torch.empty(24, dtype=BF16)
    pre, post, res = mappings_forward(projected, bias[:3], bias, 4)
    mappings_backward(pre, post, res, pre, post, projected, bias[:3], bias)


def launch_compositions(columns: int | None, rows: int, written: bool) -> None:
    mapping, post = torch.empty(2, 64, 4, 4)[:, :, :rows], torch.empty(2, 64, 4) if written else None
    weights = None if columns is None else torch.empty(2, 64, 4, columns)
    compose_backward(compose_forward(mapping, weights, post), mapping, weights, post)


COMPOSED = ["_compose_kernel", "_compose_backward_kernel"]


@pytest.mark.parametrize(
    ("launches", "names"),
    [(launch_mappings, ["_mappings_kernel", "_mappings_backward_kernel", "_sums_kernel"])]
    + [(partial(launch_compositions, *form), COMPOSED) for form in ((None, 4, True), (5, 4, True))]
    + [
        pytest.param(partial(launch_compositions, *form), COMPOSED, marks=pytest.mark.long)
        for form in ((4, 4, True), (4, 1, False), (5, 1, False))
    ],
)
def test_compiles_for_an_h100_without_spills(launches: Callable[[], None], names: list[str]) -> None:
    compiled = compile_launches(launches)
    assert [name for name, _ in compiled] == names
    assert not any("atom" in code for _, code in compiled)
    assert {(name, needs.stack) for name, needs in resources_of_launches(launches) if needs.stack} == set()
