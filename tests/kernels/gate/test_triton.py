"""The Triton gate against the PyTorch reference in float64."""

import pytest
import torch
from torch import Tensor

import kernels.gate as public
from kernels.gate import reference_backward, reference_forward
from kernels.gate import triton as engram_gate_triton
from kernels.gate.triton import gate_backward, gate_forward
from tests.grid import grid
from tests.kernels.own_process import compile_launches

EPS = 1e-20
BF16, FP32 = torch.bfloat16, torch.float32
NAMES = ("hidden", "key", "value", "query weight", "key weight")


def _inputs(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    value_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Hidden states, keys, values, both weights and an upstream gradient."""
    batch, length, branches, width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    shapes = (shape, shape, (batch, length, width), (branches, width), (branches, width), shape)
    values = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    values[3:5] = [1 + 0.3 * weight for weight in values[3:5]]
    dtypes = (dtype, value_dtype or dtype, value_dtype or dtype, dtype, dtype, value_dtype or dtype)
    return [t.to(d).to(device) for t, d in zip(values, dtypes, strict=True)]


def _run(inputs: list[Tensor], signed_sqrt: bool) -> tuple[Tensor, ...]:
    *five, grad = inputs
    gated, saved = gate_forward(*five, EPS, signed_sqrt)
    return gated, *gate_backward(grad, *five, saved, signed_sqrt)


def _check(inputs: list[Tensor], signed_sqrt: bool = True) -> None:
    *five, grad = inputs
    wide = [t.double() for t in five]
    gated, saved = reference_forward(*wide, EPS, signed_sqrt)
    expected = (gated, *reference_backward(grad.double(), *wide, saved, signed_sqrt))
    dtypes = [inputs[2].dtype, *(t.dtype for t in five)]
    for name, actual, right, dtype in zip(("gated", *NAMES), _run(inputs, signed_sqrt), expected, dtypes, strict=True):
        assert actual.dtype == dtype
        assert actual.is_contiguous()
        # In bf16 one unit in the last place: the interpreter cuts off where a GPU rounds.
        relative = 2**-7 if dtype == BF16 else 2e-5
        largest = float(right.abs().max()) if right.numel() else 0.0
        torch.testing.assert_close(
            actual.double(), right, rtol=relative, atol=3e-6 * largest, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(
    ("shape", "dtype"),
    grid(
        [(2, 3, 4, 8), (1, 5, 3, 40), (2, 33, 1, 17), (1, 2, 8, 16), (3, 1, 1, 256), (1, 3, 2, 700), (0, 3, 4, 8),
         (2, 0, 1, 8)],
        [FP32, BF16],
    ),
)  # fmt: skip
def test_equals_the_reference(
    kernel_device: torch.device, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    _check(_inputs(shape, dtype, kernel_device))


def test_plain_score(kernel_device: torch.device) -> None:
    _check(_inputs((2, 3, 4, 24), FP32, kernel_device), signed_sqrt=False)


def test_dtypes_as_under_autocast(kernel_device: torch.device) -> None:
    _check(_inputs((2, 3, 4, 24), FP32, kernel_device, value_dtype=BF16))


def test_inputs_of_any_strides(kernel_device: torch.device) -> None:
    hidden, key, value, wq, wk, grad = _inputs((2, 3, 4, 24), FP32, kernel_device)
    one_stream = hidden[:, :, :1].expand(-1, -1, 4, -1)
    branches_first = key.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    every_other = torch.stack([value, value], -1).flatten(-2)[..., ::2]
    grad_of_sum = grad[:1, :1, :1, :1].expand_as(grad)
    weight_of_columns = wq.t().contiguous().t()
    for strided in (branches_first, every_other, weight_of_columns):
        assert not strided.is_contiguous()
    _check([one_stream, branches_first, every_other, weight_of_columns, wk[:1].expand_as(wk), grad_of_sum])
    _check([branches_first, one_stream, value[:1].expand_as(value), wq, wk, branches_first])


def test_more_tokens_than_one_partial_sum_of_the_weights_holds(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = _inputs((1, 37, 2, 16), FP32, kernel_device)
    for most_chunks, chunks in ((64, 3), (2, 2), (1, 1)):  # of 16, 32 and 64 tokens
        monkeypatch.setattr(engram_gate_triton, "_CHUNK_TOKENS", 16)
        monkeypatch.setattr(engram_gate_triton, "_CHUNKS", most_chunks)
        assert engram_gate_triton._chunk(37)[1] == chunks
        _check(inputs)


def test_zero_key_gives_half_a_gate_and_no_gradient_through_the_score(kernel_device: torch.device) -> None:
    inputs = _inputs((1, 2, 2, 16), FP32, kernel_device)
    inputs[1] = torch.zeros_like(inputs[1])
    gated, dhidden, dkey, dvalue, *dweights = _run(inputs, signed_sqrt=True)
    torch.testing.assert_close(gated, (0.5 * inputs[2]).unsqueeze(2).expand_as(gated), rtol=1e-6, atol=0)
    assert all((gradient == 0).all() for gradient in (dhidden, dkey, *dweights))
    torch.testing.assert_close(dvalue, 0.5 * inputs[5].sum(2))
    assert _run(inputs, signed_sqrt=False)[2].isfinite().all()


def test_no_gradient_below_the_clamp_and_full_slope_above(kernel_device: torch.device) -> None:
    ones = torch.ones(1, 1, 2, device=kernel_device)
    hidden = torch.ones(1, 2, 1, 2, device=kernel_device)
    # Orthogonal vectors, one moved along the other: scores of -0.7e-6 and of 2.8e-6, exactly enough in fp32.
    key = torch.tensor([[1 - 2**-20, -1.0], [1 + 2**-18, -1.0]], device=kernel_device).view(1, 2, 1, 2)
    upstream = torch.tensor([1.0, 2.0], device=kernel_device).expand(1, 2, 1, 2)
    inputs = [hidden, key, ones.expand(1, 2, 2), ones[0], ones[0], upstream]
    gated, dhidden, *_ = _run(inputs, signed_sqrt=True)
    expected = torch.tensor([-1e-3, (2**-18 / 2**0.5) ** 0.5], device=kernel_device).sigmoid()
    torch.testing.assert_close(gated[0, :, 0, 0], expected, rtol=1e-6, atol=0)
    assert (dhidden[0, 0] == 0).all()
    assert (dhidden[0, 1] != 0).all()


@pytest.mark.parametrize("signed_sqrt", [True, False])
def test_nan_is_not_hidden(kernel_device: torch.device, signed_sqrt: bool) -> None:
    inputs = _inputs((1, 2, 2, 16), FP32, kernel_device)
    inputs[0][0, 0, 0, 3] = torch.nan
    gated, dhidden, dkey, dvalue, dquery_weight, _ = _run(inputs, signed_sqrt)
    for broken in (gated[0, 0, 0], dhidden[0, 0, 0], dkey[0, 0, 0], dvalue[0, 0], dquery_weight[0]):
        assert broken.isnan().all()
    for sound in (gated[0, 0, 1], dhidden[0, 0, 1], dvalue[0, 1], dquery_weight[1]):
        assert sound.isfinite().all()


def test_offsets_beyond_32_bits(kernel_device: torch.device) -> None:
    """Strides that fit 32 bits, offsets that do not, in memory of which only the pages in use exist on a CPU."""
    far, shape = 2**30, (1, 3, 3, 16)
    memory = torch.empty(2 * far + 4096, dtype=BF16, device=kernel_device)
    inputs = _inputs(shape, BF16, kernel_device)
    strides = {0: (0, far, 16, 1), 1: (0, 16, far, 1), 2: (0, far, 1), 5: (0, far, 16, 1)}
    for slot, (place, stride) in enumerate(strides.items()):
        inputs[place] = memory.as_strided(inputs[place].shape, stride, 256 * slot).copy_(inputs[place])
    _check(inputs)
    grad_apart = memory.as_strided(shape, (0, 16, far, 1), 2048).copy_(inputs[5])
    _check([*inputs[:5], grad_apart])


def test_same_bits_again(kernel_device: torch.device) -> None:
    inputs = _inputs((2, 40 if kernel_device.type == "cuda" else 9, 2, 24), BF16, kernel_device)
    first, second = _run(inputs, signed_sqrt=True), _run(inputs, signed_sqrt=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_public_function_reaches_the_kernels(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(public, "_fused", lambda *_: True)
    *five, _ = _inputs((2, 3, 2, 24), FP32, kernel_device)
    leaves = [t.requires_grad_() for t in five]
    gated, _ = public.engram_gate(*leaves, eps=EPS, signed_sqrt=True)
    gated.sum().backward()
    ones = torch.ones((), device=kernel_device).expand_as(gated)
    expected = _run([*(t.detach() for t in leaves), ones], signed_sqrt=True)
    assert torch.equal(gated, expected[0])
    assert all(torch.equal(t.grad, right) for t, right in zip(leaves, expected[1:], strict=True))


@pytest.mark.gpu
def test_picked_on_a_gpu_and_compiled_whole() -> None:
    *five, grad = _inputs((2, 3, 4, 24), BF16, torch.device("cuda"))
    expected = _run([*five, grad], signed_sqrt=True)
    leaves = [t.requires_grad_() for t in five]
    for function in (public.engram_gate, torch.compile(public.engram_gate, fullgraph=True)):
        gated, _ = function(*leaves, eps=EPS, signed_sqrt=True)
        actual = (gated, *torch.autograd.grad(gated, leaves, grad))
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def launches() -> None:
    shapes = ((2, 8, 4, 2560), (2, 8, 4, 2560), (2, 8, 2560), (4, 2560), (4, 2560))
    inputs = [torch.empty(shape, dtype=BF16) for shape in shapes]
    gated, saved = gate_forward(*inputs, EPS, True)
    gate_backward(gated, *inputs, saved, True)


def test_compiles_for_an_h100() -> None:
    """Down to machine code, with loads of whole vectors and no atomics."""
    compiled = compile_launches(launches)
    assert [name for name, _ in compiled] == [
        "_gate_forward_kernel",
        "_gate_backward_tokens",
        "_gate_backward_elements",
    ]
    for name, code in compiled:
        assert "global.v4" in code, name
        assert "atom" not in code, name
