import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.gather import gather, row_index


def bits(tensor):
    return tensor.contiguous().view(torch.int32)


def sequential_sum(index, grads, num_rows):
    """Adds the lookups' gradients one by one, in lookup order, in float32."""
    sums = np.zeros((num_rows, grads.shape[1]), np.float32)
    for row, grad in zip(index.tolist(), grads.float().numpy(), strict=True):
        sums[row] += grad
    return torch.from_numpy(sums)


def gradient(rows, index, grads, **options):
    leaf = rows.clone().requires_grad_()
    gather(leaf, index, **options).backward(grads)
    return leaf.grad


@settings(deadline=None)
@given(st.data(), st.integers(0, 9), st.integers(0, 40), st.integers(1, 19))
def test_values_and_gradients_are_those_of_a_loop(data, num_rows, num_lookups, dim):
    lookups = data.draw(st.lists(st.integers(0, num_rows - 1), max_size=num_lookups)) if num_rows else []
    index_N = torch.tensor(lookups, dtype=torch.int64)
    generator = torch.Generator().manual_seed(len(lookups))
    rows, grads = (torch.randn(n, dim, generator=generator) for n in (num_rows, len(lookups)))
    index = row_index(index_N, num_rows)
    assert torch.equal(gather(rows, index), rows[index_N])
    assert torch.equal(bits(gradient(rows, index, grads)), bits(sequential_sum(index_N, grads, num_rows)))


def test_gradient_has_the_same_bits_at_any_number_of_threads():
    generator = torch.Generator().manual_seed(0)
    index_N = (torch.rand(20000, generator=generator) ** 4 * 700).long()  # a few rows with most of the lookups
    rows, grads = torch.randn(700, 24, generator=generator), torch.randn(20000, 24, generator=generator)
    index = row_index(index_N, 700)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(gradient(rows, index, grads))
    finally:
        torch.set_num_threads(threads)
    expected = sequential_sum(index_N, grads, 700)
    assert all(torch.equal(bits(result), bits(expected)) for result in results)


@pytest.mark.parametrize("num_rows", [3, 3000])  # cast before and after selecting
def test_half_precision_results_sum_their_gradients_in_float32(num_rows):
    generator = torch.Generator().manual_seed(0)
    index_N = torch.randint(0, 3, (1000,), generator=generator)
    rows = torch.randn(num_rows, 8, generator=generator)
    index = row_index(index_N, num_rows)
    out = gather(rows, index, out_dtype=torch.bfloat16)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, rows[index_N].bfloat16())
    grads = torch.randn(1000, 8, generator=generator).bfloat16()
    result = gradient(rows, index, grads, out_dtype=torch.bfloat16)
    assert result.dtype == torch.float32
    assert torch.equal(bits(result), bits(sequential_sum(index_N, grads, num_rows)))


def test_micro_batches_accumulate_in_one_leaf():
    leaf = torch.randn(5, 4, requires_grad=True)
    for lookups in ([0, 2, 2], [2, 4]):
        gather(leaf, row_index(torch.tensor(lookups), 5)).sum().backward()
    assert leaf.grad[:, 0].tolist() == [1, 0, 3, 0, 1]


def test_gradients_of_an_expanded_tensor():
    leaf = torch.randn(3, 4, requires_grad=True)
    gather(leaf, row_index(torch.tensor([1, 1, 0]), 3)).sum().backward()  # sum's gradient has stride 0
    assert leaf.grad.tolist() == [[1] * 4, [2] * 4, [0] * 4]


def test_gradcheck():
    rows = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    index = row_index(torch.tensor([3, 0, 3, 1]), 4)
    assert torch.autograd.gradcheck(lambda r: gather(r, index).square(), (rows,))


def test_index_parts():
    index = row_index(torch.tensor([[2, 0], [2, 3]]), 5)
    assert index.index_N.tolist() == [2, 0, 2, 3]
    assert index.order_N.tolist() == [1, 0, 2, 3]
    assert index.offsets_U.tolist() == [0, 1, 1, 3, 4]
    assert {part.dtype for part in index} == {torch.int32}


@pytest.mark.parametrize("lookups", [[0, 3], [-1, 0]])
def test_rows_outside_the_table_are_refused(lookups):
    with pytest.raises(ValueError, match="the table has rows 0 to 2"):
        row_index(torch.tensor(lookups), 3)


def test_index_of_another_table_is_refused():
    with pytest.raises(ValueError, match="built for 3 rows, but 4 are given"):
        gather(torch.zeros(4, 2), row_index(torch.tensor([0]), 3))
