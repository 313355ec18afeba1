import pytest
import torch

from kernels.gather import gather, row_index
from kernels.gather.add_rows import add_rows
from kernels.gather.add_rows_triton import add_rows_on_gpu
from kernels.gather.triton import gather_rows
from tests.kernels.own_process import compile_launches


def case(rows=40, added=17, dim=6, dtype=torch.float32):
    """A table, the rows to add to, and what: also numbers below the smallest normal one."""
    generator = torch.Generator().manual_seed(rows + added + dim)
    scale = torch.tensor([1.0, 1e-41, 1e-38, 1e20])[torch.arange(dim) % 4].to(dtype)
    table_UD, added_VD = (torch.randn(count, dim, generator=generator, dtype=dtype) * scale for count in (rows, added))
    rows_V = torch.randperm(rows, generator=generator)[:added].sort().values.int()
    return table_UD, rows_V, added_VD


def added_one_by_one(table_UD, rows_V, added_VD):
    expected_UD = table_UD.clone()
    for row, values_D in zip(rows_V.tolist(), added_VD, strict=True):
        expected_UD[row] = expected_UD[row] + values_D
    return expected_UD


def assert_same_bits(found, expected):
    word = torch.int64 if expected.dtype == torch.float64 else torch.int32
    assert torch.equal(found.cpu().contiguous().view(word), expected.view(word))


@pytest.mark.parametrize("add", [add_rows, add_rows_on_gpu])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "added", "dim"), [(40, 17, 6), (5, 5, 80), (9, 0, 3), (3, 2, 0), (70, 61, 600)])
def test_each_row_is_added_to_the_one_it_names_to_the_bit(kernel_device, add, rows, added, dim, dtype):
    table_UD, rows_V, added_VD = case(rows, added, dim, dtype)
    expected_UD = added_one_by_one(table_UD, rows_V, added_VD)
    found_UD, *given = (tensor.to(kernel_device) for tensor in (table_UD, rows_V, added_VD))
    add(found_UD, *given)
    assert_same_bits(found_UD, expected_UD)


def test_what_is_added_may_have_any_strides(kernel_device):
    table_UD, rows_V, added_VD = (tensor.to(kernel_device) for tensor in case())
    expected_UD = added_one_by_one(*(tensor.cpu() for tensor in (table_UD, rows_V, added_VD)))
    add_rows_on_gpu(table_UD, rows_V, added_VD.T.contiguous().T)
    assert_same_bits(table_UD, expected_UD)


def test_rows_that_are_all_read_are_found_without_their_list(kernel_device):
    """A micro-batch's own rows: the list says where they stood among the step's, and is not to be followed."""
    index_N = torch.tensor([70, 3, 3, 99, 70, 8])
    index = row_index(index_N, 100)
    table_UD = torch.randn(100, 5)
    rows_VD = table_UD[index.rows_V.long()]
    assert torch.equal(gather(rows_VD, index.compact), table_UD[index_N])
    out_ND = torch.full((6, 5), -1.0, device=kernel_device)
    gather_rows(rows_VD.to(kernel_device), *index.compact.to(kernel_device)[:2], out_ND)
    assert torch.equal(out_ND.cpu(), table_UD[index_N])


def launch_all():
    for added in (1, 16, 17):
        add_rows_on_gpu(*case(added=added))


def test_it_is_compiled_once_for_any_number_of_rows_and_uses_no_atomics():
    compiled = compile_launches(launch_all)
    assert len(compiled) == 3
    assert len({ptx for _, ptx in compiled}) == 1
    assert not any("atom." in ptx or "red.global" in ptx for _, ptx in compiled)
