import pytest
import torch

from kernels.gather.parts import sum_parts
from kernels.gather.parts_triton import sum_parts_in_order
from tests.kernels.launches import on_a_gpu
from tests.kernels.own_process import compile_launches


def exchanged(ranks, rows=70, dim=80, dtype=torch.float32):
    """What ranks send for some of the rows each: parts, their order and starts; and the rows that each rank names."""
    generator = torch.Generator().manual_seed(ranks)
    named = [(torch.rand(rows, generator=generator) < 0.6).nonzero().flatten() for _ in range(ranks)]
    named[-1] = torch.cat([named[-1], torch.arange(rows)]).unique()  # every row has a part
    indices_A = torch.cat(named)
    parts_AD = torch.randn(len(indices_A), dim, generator=generator, dtype=dtype) * 10.0 ** torch.randint(
        -6, 6, (1, dim)
    )
    parts_AD[::7] = -0.0
    starts_O = torch.bincount(indices_A, minlength=rows).cumsum(0).roll(1).int()
    starts_O[0] = 0
    return parts_AD, indices_A.argsort(stable=True).int(), starts_O, named


def in_rank_order(parts_AD, starts_O, named):
    total_OD = parts_AD.new_zeros(len(starts_O), parts_AD.shape[1])
    for rows, part in zip(named, parts_AD.split([len(rows) for rows in named]), strict=True):
        total_OD.index_add_(0, rows, part)
    return total_OD


def assert_same_bits(found, expected):
    word = torch.int64 if expected.dtype == torch.float64 else torch.int32
    assert torch.equal(found.cpu().view(word), expected.view(word))


@pytest.mark.parametrize("ranks", [*range(1, 9), 33, 40])
def test_parts_are_added_in_rank_order_to_the_bit(ranks):
    parts_AD, order_A, starts_O, named = exchanged(ranks)
    assert_same_bits(sum_parts(parts_AD, order_A, starts_O), in_rank_order(parts_AD, starts_O, named))


@pytest.mark.parametrize("ranks", [*range(1, 9), 33, 40])
def test_the_kernel_adds_in_rank_order_to_the_bit(kernel_device, ranks):
    parts_AD, order_A, starts_O, named = exchanged(ranks, rows=37)
    found = sum_parts_in_order(*(tensor.to(kernel_device) for tensor in (parts_AD, order_A, starts_O)))
    assert_same_bits(found, in_rank_order(parts_AD, starts_O, named))


@pytest.mark.parametrize("dim", [1, 5, 33, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kernel_takes_any_width_dtype_and_strides(kernel_device, dim, dtype):
    parts_AD, order_A, starts_O, named = exchanged(3, rows=20, dim=dim, dtype=dtype)
    columns_first = parts_AD.T.contiguous().to(kernel_device).T
    found = sum_parts_in_order(columns_first, order_A.to(kernel_device), starts_O.to(kernel_device))
    assert_same_bits(found, in_rank_order(parts_AD, starts_O, named))


@pytest.mark.parametrize("function", [sum_parts, sum_parts_in_order])
@pytest.mark.parametrize(("rows", "parts", "dim"), [(0, 0, 3), (3, 0, 3), (3, 5, 0), (1, 1, 1)])
def test_rows_without_parts_are_zero(kernel_device, function, rows, parts, dim):
    order_A, starts_O = torch.arange(parts, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)
    arguments = (tensor.to(kernel_device) for tensor in (torch.ones(parts, dim), order_A, starts_O))
    found = function(*arguments)
    expected = torch.zeros(rows, dim)
    expected[-1:] = parts
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("ranks", [1, 2, 8, 33])
def test_it_is_one_launch_however_many_ranks_there_are(ranks):
    parts_AD, order_A, starts_O, _ = exchanged(ranks)
    with on_a_gpu() as counted:
        sum_parts(parts_AD, order_A, starts_O)
    assert counted == {"triton::_sum_parts": 1}


def launch_all():
    for ranks in (2, 8, 64):
        for dtype in (torch.float32, torch.float64):
            sum_parts_in_order(*exchanged(ranks, dtype=dtype)[:3])


def test_it_is_compiled_once_for_any_number_of_ranks_and_uses_no_atomics():
    compiled = compile_launches(launch_all)
    assert len(compiled) == 6
    assert len({ptx for _, ptx in compiled}) == 2  # by dtype
    assert not any("atom." in ptx or "red." in ptx for _, ptx in compiled)
