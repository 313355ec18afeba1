import pytest
import torch
import triton
import triton.language as tl

from kernels.rows.stochastic_rounding import stochastic_round_bf16_ as torch_round_
from kernels.rows.stochastic_rounding_triton import as_bf16, as_fp32, round_to_nearest, stochastic_round_bf16_

EDGES = [0, -(2**31), 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F7F8000, -0x800001, 0x3F808000, 0x3F818000, 0x18000]
NOT_FINITE = [0x7F800000, -0x800000, 0x7FFFFFFF, -1, 0x7F800001, -0x7FFFFF, 0x7FC00000]


def random_bits(*shape):
    """All kinds of numbers, what is not finite included."""
    bits = torch.randint(-(2**31), 2**31, shape, generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    edges = torch.tensor(EDGES + NOT_FINITE, dtype=torch.int32)[: bits.numel()]
    bits.view(-1)[: len(edges)] = edges
    return bits


def same(values, expected):
    """The same bits, but for NaNs: their payload is left to whoever makes them."""
    values, expected = values.cpu(), expected.cpu()
    assert torch.equal(values.isnan(), expected.isnan())
    return torch.equal(*(torch.where(t.isnan(), 0, t).view(torch.int32) for t in (values, expected)))


def row_ids(count):
    ids = torch.randint(-(2**63), 2**63 - 1, (count,), generator=torch.Generator().manual_seed(1))
    ids[:2] = torch.tensor([0, 2**63 - 1])[:count]
    return ids


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (37, 130), (3, 80)])
@pytest.mark.parametrize(
    "key", [(0, 1, "weights"), (-5, 3, "state"), (2**65 - 1, 2**40, "weights")], ids=["0", "negative, state", "large"]
)
def test_the_bits_of_the_reference(kernel_device, shape, key):
    seed, step, part = key
    expected, ids = random_bits(*shape).view(torch.float32), row_ids(shape[0])
    rounded = expected.clone().to(kernel_device)
    stochastic_round_bf16_(rounded, ids.to(kernel_device), seed=seed, step=step, part=part)
    torch_round_(expected, ids, seed=seed, step=step, part=part)
    assert same(rounded, expected)


def test_strided_values_and_ids(kernel_device):
    before, ids = torch.randn(2 * 20, 50, generator=torch.Generator().manual_seed(0)), row_ids(40)
    values, expected = before.to(kernel_device, copy=True), before.clone()
    stochastic_round_bf16_(values[::2, 1:-1:3], ids.to(kernel_device)[1::2], seed=1, step=2)
    torch_round_(expected[::2, 1:-1:3], ids[1::2], seed=1, step=2)
    assert same(values, expected)
    assert not torch.equal(before, expected)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_nothing_to_round(kernel_device, shape):
    values = torch.zeros(shape, device=kernel_device)
    stochastic_round_bf16_(values, torch.arange(shape[0], device=kernel_device), seed=0, step=1)


@triton.jit
def nearest_kernel(values, out, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    tl.store(out + places, as_bf16(round_to_nearest(tl.load(values + places))))


@triton.jit
def upcast_kernel(values, out, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    tl.store(out + places, as_fp32(tl.load(values + places)))


def test_rounding_to_nearest_is_that_of_torch(kernel_device):
    values = random_bits(512).view(torch.float32).to(kernel_device)
    rounded = torch.empty(512, dtype=torch.bfloat16, device=kernel_device)
    nearest_kernel[(1,)](values, rounded, SIZE=512)
    assert same(rounded.float(), values.to(torch.bfloat16).float())


def test_every_bfloat16_comes_through_fp32(kernel_device):
    values = torch.arange(-(2**15), 2**15, device=kernel_device).to(torch.int16).view(torch.bfloat16)
    wide, narrow = torch.empty(2**16, device=kernel_device), torch.empty_like(values)
    upcast_kernel[(1,)](values, wide, SIZE=2**16)
    assert same(wide, values.float())
    nearest_kernel[(1,)](wide, narrow, SIZE=2**16)
    assert same(narrow.float(), values.float())
