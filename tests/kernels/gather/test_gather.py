import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from kernels.gather import gather, row_index, values_numba
from kernels.gather.segment_sum import segment_sum
from kernels.gather.values import RowValues
from tests.kernels.slow_sums import chunked_sum


def bits(tensor):
    return tensor.contiguous().view(torch.int32)


def planned_sum(index, grads, num_rows):
    """The lookups' gradients added in float32 in the planned order, row by row."""
    sums = np.zeros((num_rows, grads.shape[1]), np.float32)
    parts = {}
    for row, grad in zip(index.tolist(), grads.float().numpy(), strict=True):
        parts.setdefault(row, []).append(grad)
    for row, grads_of_row in parts.items():
        sums[row] = chunked_sum(grads_of_row)
    return torch.from_numpy(sums)


def gradient(rows, index, grads, **options):
    leaf = rows.clone().requires_grad_()
    gather(leaf, index, **options).backward(grads)
    return leaf.grad


@given(st.data(), st.integers(0, 9), st.integers(0, 40), st.integers(1, 19))
def test_values_and_gradients_are_those_of_a_loop(data, num_rows, num_lookups, dim):
    lookups = data.draw(st.lists(st.integers(0, num_rows - 1), max_size=num_lookups)) if num_rows else []
    index_N = torch.tensor(lookups, dtype=torch.int64)
    generator = torch.Generator().manual_seed(len(lookups))
    rows, grads = (torch.randn(n, dim, generator=generator) for n in (num_rows, len(lookups)))
    index = row_index(index_N, num_rows)
    assert torch.equal(gather(rows, index), rows[index_N])
    assert torch.equal(bits(gradient(rows, index, grads)), bits(planned_sum(index_N, grads, num_rows)))


@pytest.mark.parametrize(
    "counts", [[31, 32, 33], [0, 64, 1, 65, 0], [95, 96, 97], [4095, 1, 4096], [4097, 0, 33, 8300]]
)
def test_gradients_of_rows_of_several_chunks(counts):
    index_N = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    index_N = index_N[torch.randperm(len(index_N), generator=torch.Generator().manual_seed(0))]
    rows, grads = torch.randn(len(counts), 3), torch.randn(len(index_N), 3)
    result = gradient(rows, row_index(index_N, len(counts)), grads)
    assert torch.equal(bits(result), bits(planned_sum(index_N, grads, len(counts))))


def test_the_bits_of_a_row_do_not_depend_on_the_others():
    index_N = torch.tensor([0, 1, 2] * 500)
    rows, grads = torch.randn(3, 5), torch.randn(1500, 5)
    together = gradient(rows, row_index(index_N, 3), grads)
    alone = gradient(rows[:1], row_index(torch.zeros(500, dtype=torch.int32), 1), grads[::3])
    assert torch.equal(bits(together[:1]), bits(alone))


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
    expected = planned_sum(index_N, grads, 700)
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
    expected = planned_sum(index_N, grads, num_rows)
    assert torch.equal(bits(result), bits(expected))
    assert torch.equal(gradient(rows.bfloat16(), index, grads), expected.bfloat16()), (
        "rows themselves in half precision"
    )


def test_compiled_sums_have_the_bits_of_the_reference_at_any_number_of_threads():
    """Rows whose lookups are in several threads' parts, in chunks that begin in an earlier one."""
    generator = torch.Generator().manual_seed(1)
    index_N = (torch.rand(30_000, generator=generator) ** 4 * 9000).long()
    index_N[::3] = 5
    grads = torch.randn(30_000, 11, generator=generator)
    index = row_index(index_N, 9000)
    expected = segment_sum(grads, index.order_N, index.offsets_V)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            sums = gradient(torch.zeros(9000, 11), index, grads)
            assert torch.equal(bits(sums[index.rows_V.long()]), bits(expected))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("streamed", [0, 1 << 60], ids=["past the caches", "through the caches"])
@pytest.mark.parametrize("dim", [5, 16, 80])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_rows_are_looked_up_where_they_are_stored(bf16, dim, streamed, monkeypatch):
    """Some stored, some apart; the leaf itself has no values, and receives the gradient of the unique rows."""
    monkeypatch.setattr(values_numba, "_STREAMED", streamed)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # lookups are shared out
    generator = torch.Generator().manual_seed(dim)
    table = torch.randn(60, dim + 3, generator=generator)
    if bf16:
        table.view(torch.bfloat16).normal_(generator=generator)
    weights = table.view(torch.bfloat16)[:, :dim].float() if bf16 else table[:, :dim]
    places, apart = torch.randperm(60, generator=generator)[:40], torch.randn(40, dim, generator=generator)
    rows = weights[places].clone()
    rows[::7], places[::7] = apart[::7], -1 - torch.arange(40)[::7]
    index_N = torch.randint(0, 40, (70_000,), generator=generator)
    index = row_index(index_N, 40)
    stored = index._replace(stored=RowValues(table, places, apart, bf16))
    leaf = torch.full((), torch.nan).expand(40, dim).requires_grad_()
    out = gather(leaf, stored)
    assert torch.equal(bits(out), bits(rows[index_N]))
    assert torch.equal(bits(stored.stored.tensor()), bits(rows))
    grads = torch.randn(out.shape, generator=generator)
    out.backward(grads)
    assert torch.equal(bits(leaf.grad), bits(gradient(rows, index, grads)))
    assert torch.equal(gather(leaf.detach(), stored, out_dtype=torch.bfloat16), rows[index_N].bfloat16())


def test_what_is_not_a_number_stays_none_when_it_is_rounded():
    table = torch.tensor([[torch.nan, torch.inf, -torch.inf, 3.4e38]])
    values = RowValues(table, torch.zeros(1, dtype=torch.int64), table)
    found = values.look_up(torch.zeros(1, dtype=torch.int32), torch.bfloat16)
    assert torch.equal(found.isnan(), table.isnan())
    assert torch.equal(found[~found.isnan()], table.bfloat16()[~table.isnan()])


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
    assert index.rows_V.tolist() == [0, 2, 3]
    assert index.segment_N.tolist() == [1, 0, 1, 2]
    assert index.order_N.tolist() == [1, 0, 2, 3]
    assert index.offsets_V.tolist() == [0, 1, 3]
    assert index.num_rows == 5
    assert {part.dtype for part in index.tensors} == {torch.int32}


def test_an_index_is_as_large_as_its_lookups_whatever_the_table():
    few, many = (row_index(torch.tensor([1, 7, 1]), num_rows) for num_rows in (8, 10**9))
    assert [part.nbytes for part in few.tensors] == [part.nbytes for part in many.tensors] == [8, 12, 12, 8]


@pytest.mark.parametrize("lookups", [[0, 3], [-1, 0]])
def test_rows_outside_the_table_are_refused(lookups):
    with pytest.raises(ValueError, match="the table has rows 0 to 2"):
        row_index(torch.tensor(lookups), 3)


def test_index_of_another_table_is_refused():
    with pytest.raises(ValueError, match="built for 3 rows, but 4 are given"):
        gather(torch.zeros(4, 2), row_index(torch.tensor([0]), 3))


def test_operators_keep_their_promises():
    index = row_index(torch.tensor([1, 1, 0, 3]), 4)
    rows = torch.randn(4, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.engram.gather.default, (rows, *index.tensors, torch.bfloat16))
    stored = RowValues(torch.randn(6, 5), torch.tensor([5, -2, 0, 3]), torch.randn(4, 3))
    arguments = rows, *index.tensors, torch.bfloat16, *stored
    torch.library.opcheck(torch.ops.engram.gather_stored.default, arguments)
    grads = torch.randn(4, 3, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.engram.gather_backward.default, (grads, *index.tensors, 4, torch.float32))


@pytest.mark.parametrize("stored", [False, True])
def test_compiled_whole_and_without_a_copy_of_the_table(stored):
    graphs = []

    def capture(graph, _inputs):
        graphs.append(graph)
        return make_boxed_func(graph)

    @torch.compile(backend=aot_autograd(fw_compiler=capture, bw_compiler=capture), fullgraph=True)
    def loss(rows, index):
        return gather(rows, index, out_dtype=torch.bfloat16).view(-1, 16).float().square().sum()

    index = row_index(torch.randint(0, 50, (100,)), 50)
    rows = torch.randn(50, 8, requires_grad=True)
    values = RowValues(rows.detach(), index.rows_V.long(), torch.empty(0, 8))
    loss(rows, index._replace(stored=values) if stored else index).backward()
    made = [
        node.target for graph in graphs for node in graph.graph.nodes
        if node.op == "call_function" and isinstance(node.meta["val"], torch.Tensor)
        and node.meta["val"].shape == rows.shape
    ]  # fmt: skip
    assert made == [torch.ops.engram.gather_backward.default]
    again = rows.detach().clone().requires_grad_()
    gather(again, index, out_dtype=torch.bfloat16).float().square().sum().backward()
    assert torch.equal(rows.grad, again.grad)
