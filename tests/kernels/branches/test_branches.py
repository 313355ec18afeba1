"""A stream in parts against the stream written out: values, gradients, precision."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.branches import mix_branches, project_branches

BATCH, LENGTH, BRANCHES, WIDTH, OUTPUTS, EPS = 2, 3, 4, 5, 2, 1e-3


def _stream(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Weights, base and outputs; the weights stay wide."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(BATCH, LENGTH, *shape, generator=generator, dtype=torch.float64)

    weights = draw(BRANCHES, BRANCHES + OUTPUTS).to(torch.promote_types(dtype, torch.float32))
    parts = [draw(BRANCHES, WIDTH), *(draw(WIDTH) for _ in range(OUTPUTS))]
    base, *outputs = (part.to(dtype).requires_grad_() for part in parts)
    return weights.requires_grad_(), base, outputs


def _projection(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(7, BRANCHES * WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def _written_out(weights: Tensor, base: Tensor, outputs: list[Tensor]) -> Tensor:
    stream = torch.einsum("btji,btid->btjd", weights[..., :BRANCHES], base)
    for number, output in enumerate(outputs):
        stream = stream + weights[..., BRANCHES + number].unsqueeze(-1) * output.unsqueeze(2)
    return stream


def test_mixtures() -> None:
    weights, base, outputs = _stream()
    torch.testing.assert_close(mix_branches(weights, base, *outputs), _written_out(weights, base, outputs))
    assert torch.autograd.gradcheck(mix_branches, (weights, base, *outputs))


def test_one_reading_of_the_base_alone() -> None:
    weights, base, _ = _stream()
    reading = mix_branches(weights[:, :, :1, :BRANCHES], base)
    torch.testing.assert_close(reading.squeeze(2), torch.einsum("bti,btid->btd", weights[:, :, 0, :BRANCHES], base))


def test_projections() -> None:
    weights, base, outputs = _stream()
    projection = _projection()
    stream = _written_out(weights, base, outputs).flatten(2)
    expected = F.rms_norm(stream, stream.shape[-1:], eps=EPS) @ projection.mT
    torch.testing.assert_close(project_branches(projection, weights, base, *outputs, eps=EPS), expected)

    def function(projection: Tensor, weights: Tensor, *parts: Tensor) -> Tensor:
        return project_branches(projection, weights, *parts, eps=EPS)

    assert torch.autograd.gradcheck(function, (projection, weights, base, *outputs))


def test_projections_of_the_base_alone() -> None:
    projection, (_, base, _) = _projection(), _stream()
    expected = F.rms_norm(base.flatten(2), (BRANCHES * WIDTH,), eps=EPS) @ projection.mT
    torch.testing.assert_close(project_branches(projection, None, base, eps=EPS), expected)
    assert torch.autograd.gradcheck(lambda p, x: project_branches(p, None, x, eps=EPS), (projection, base))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bf16_is_rounded_once(device: str) -> None:
    """Sums of bf16 values in fp32: what fp64 gives for the same values, to the last rounding."""
    wide_weights, wide_base, wide_outputs = _stream()
    weights, base, outputs = _stream(torch.bfloat16)
    with torch.no_grad():
        for wide, narrow in zip((wide_base, *wide_outputs), (base, *outputs), strict=True):
            wide.copy_(narrow)
        wide_weights.copy_(weights)
    expected = mix_branches(wide_weights, wide_base, *wide_outputs)
    weights, base, *outputs = (x.detach().to(device).requires_grad_() for x in (weights, base, *outputs))
    mixed = mix_branches(weights, base, *outputs)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.cpu().double(), expected, rtol=2**-8, atol=1e-5)
    projection = _projection(torch.bfloat16).detach().to(device).requires_grad_()
    expected = project_branches(projection.detach().cpu().double(), None, wide_base, eps=EPS)
    projected = project_branches(projection, None, base, eps=EPS)
    assert projected.dtype == torch.float32
    torch.testing.assert_close(projected.cpu().double(), expected, rtol=1e-5, atol=1e-5)
    project_branches(projection, weights, base, *outputs, eps=EPS).sum().backward()
    assert [x.grad.dtype for x in (projection, weights, base) if x.grad is not None] == [
        torch.bfloat16,
        torch.float32,
        torch.bfloat16,
    ]


def test_weights_of_other_parts_are_refused() -> None:
    weights, base, outputs = _stream()
    with pytest.raises(ValueError, match="6 weights for 5 parts of the stream"):
        mix_branches(weights, base, outputs[0])
