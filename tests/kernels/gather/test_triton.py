from functools import partial
from itertools import product

import pytest
import torch

from kernels.gather import gather, row_index
from kernels.gather.segment_sum import segment_sum
from kernels.gather.triton import gather_rows, sum_gradients
from tests.grid import grid
from tests.kernels.own_process import compile_launches

FP32, BF16 = torch.float32, torch.bfloat16


def make_index(counts, seed=0):
    """Row u is read `counts[u]` times, in any order."""
    index_N = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    generator = torch.Generator().manual_seed(seed)
    return row_index(index_N[torch.randperm(len(index_N), generator=generator)], len(counts))


def heavy_tailed(num_rows=150, num_lookups=1000):
    """A tenth of the lookups read one row; many rows are read once, some never."""
    generator = torch.Generator().manual_seed(1)
    index_N = (torch.rand(num_lookups, generator=generator) ** 3 * num_rows).int()
    index_N[::10] = 7
    return row_index(index_N, num_rows)


def randn(*shape, dtype=FP32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def sums_of(device, grads, index, dtype):
    _, *segments = index.to(device).tensors
    return sum_gradients(grads, *segments, dtype)


def assert_sums(device, grads, index, dtype=FP32):
    sums = sums_of(device, grads, index, dtype)
    assert sums.dtype == dtype
    expected = segment_sum(grads.cpu().to(dtype), index.order_N, index.offsets_V)
    word = torch.int64 if dtype == torch.float64 else torch.int32
    assert torch.equal(sums.cpu().view(word), expected.view(word))


@pytest.mark.parametrize(("dim", "dtypes"), grid([1, 5, 16, 33, 80, 600, 64], [*product([FP32, BF16], repeat=2)]))
def test_rows(kernel_device, dim, dtypes):
    rows_dtype, out_dtype = dtypes
    rows = randn(50, dim, dtype=rows_dtype).to(kernel_device)
    index_N = torch.cat([torch.randint(0, 50, (131,)), torch.tensor([49, 0])])  # a few rows are not read
    out = torch.empty(133, dim, dtype=out_dtype, device=kernel_device)
    gather_rows(rows, *row_index(index_N, 50).to(kernel_device)[:2], out)
    assert torch.equal(out.cpu(), rows.cpu()[index_N].to(out_dtype))


def test_rows_of_any_strides(kernel_device):
    wide = randn(20, 48).to(kernel_device)
    index = row_index(torch.tensor([3, 0, 9, 9, 1]), 20).to(kernel_device)
    for rows in (wide[:, 3:20], wide[::2, ::3], wide.T, wide[:1].expand(20, -1), wide[:, :1].expand(-1, 7)):
        out = torch.empty(rows.shape[1], 5, device=kernel_device).T
        gather_rows(rows, index.rows_V, index.segment_N, out)
        assert torch.equal(out, rows[index.index_N.long()])


@pytest.mark.parametrize(("num_rows", "num_lookups", "dim"), [(0, 0, 3), (3, 0, 3), (3, 5, 0), (1, 1, 1)])
def test_empty_and_smallest(kernel_device, num_rows, num_lookups, dim):
    index = row_index(torch.zeros(num_lookups, dtype=torch.int64), num_rows).to(kernel_device)
    out = torch.empty(num_lookups, dim, device=kernel_device)
    rows, grads = randn(num_rows, dim).to(kernel_device), randn(num_lookups, dim).to(kernel_device)
    gather_rows(rows, index.rows_V, index.segment_N, out)
    assert torch.equal(out, rows[index.index_N.long()])
    sums = sums_of(kernel_device, grads, index, FP32)
    expected = torch.zeros(len(index.rows_V), dim, device=kernel_device)
    assert torch.equal(sums, expected.index_add_(0, index.segment_N, grads))


@pytest.mark.parametrize(("dim", "dtype"), [(1, FP32), (20, BF16), (80, BF16)])
def test_sums_have_the_bits_of_the_reference(kernel_device, dim, dtype):
    index = heavy_tailed()
    assert_sums(kernel_device, randn(1000, dim, dtype=dtype).to(kernel_device), index)


@pytest.mark.parametrize(
    "counts",
    [
        [1] * 100,
        [0, 0, 5, 0, 0],
        [31, 32, 33, 1, 0, 64, 65, 30, 2, 31, 1, 63],
        [33] * 9,
        [1, 4096, 4097, 31],
        pytest.param([7, 4128, 0, 4129], marks=pytest.mark.long),
        [8300],
    ],
    ids=lambda counts: f"{len(counts)}-rows-{max(counts)}",
)
def test_chunks_and_groups_at_their_borders(kernel_device, counts):
    index = make_index(counts)
    assert_sums(kernel_device, randn(sum(counts), 3).to(kernel_device), index)


def test_sums_in_float64(kernel_device):
    index = heavy_tailed()
    assert_sums(kernel_device, randn(1000, 4).to(kernel_device, torch.float64), index, torch.float64)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_sums_are_close_to_those_in_float64(kernel_device, dtype):
    index, grads = heavy_tailed(), randn(1000, 6, dtype=dtype)
    sums = sums_of(kernel_device, grads.to(kernel_device), index, FP32).cpu()
    exact, sizes = (torch.zeros(len(sums), 6, dtype=torch.float64) for _ in range(2))
    exact.index_add_(0, index.segment_N, grads.double())
    sizes.index_add_(0, index.segment_N, grads.double().abs())
    additions = 32 + 128  # that a value takes part in, at most
    assert ((sums.double() - exact).abs() <= additions * 2**-24 * sizes).all()


def test_gradients_of_any_strides(kernel_device):
    index = make_index([3, 0, 40, 1, 20])
    wide = randn(64, 64).to(kernel_device)
    for grads in (wide.T[:, :9], wide[:, 1:50:7], wide[:1].expand(64, -1), wide[:1, :1].expand(64, 5)):
        assert_sums(kernel_device, grads, index)


def test_sums_of_what_is_not_a_number(kernel_device):
    index = make_index([40, 3, 2])
    grads = torch.zeros(45, 2)
    grads[index.index_N == 1] = -0.0
    grads[(index.index_N == 0).nonzero()[35, 0], 0] = torch.nan
    grads[(index.index_N == 2).nonzero()[1, 0], 1] = torch.inf
    sums = sums_of(kernel_device, grads.to(kernel_device), index, FP32).cpu()
    assert sums.isnan().tolist() == [[True, False], [False, False], [False, False]]
    assert sums[1:].tolist() == [[0.0, 0.0], [0.0, torch.inf]]
    assert not sums[1].signbit().any()


def test_elements_beyond_31_bits(kernel_device):
    """Two rows 2^31 elements apart, in memory that is only reserved."""
    far = torch.empty(2**31 + 64, dtype=BF16, device=kernel_device).as_strided((2, 5), (2**31, 1))
    far.copy_(randn(2, 5))
    index = row_index(torch.tensor([1, 0, 1]), 2)
    out = torch.empty(3, 5, dtype=BF16, device=kernel_device)
    gather_rows(far, *index.to(kernel_device)[:2], out)
    assert torch.equal(out, far[[1, 0, 1]])
    assert_sums(kernel_device, far, row_index(torch.tensor([0, 0]), 1))
    assert_sums(kernel_device, far.T.T, row_index(torch.tensor([1, 0]), 2))
    gather_rows(randn(2, 5).to(kernel_device), *row_index(torch.tensor([1, 0]), 2).to(kernel_device)[:2], far)
    assert torch.equal(far.cpu(), randn(2, 5)[[1, 0]].bfloat16())
    by_columns = far.as_strided((5, 2), (1, 2**31))
    assert_sums(kernel_device, by_columns, row_index(torch.tensor([0, 2, 0, 0, 1]), 3))


@pytest.mark.gpu
@pytest.mark.parametrize("out_dtype", [FP32, BF16])
def test_public_function_on_a_gpu_has_the_bits_of_the_cpu(out_dtype):
    index, rows, grads = heavy_tailed(), randn(150, 80), randn(1000, 80)
    results = []
    for device in ("cpu", "cuda"):
        leaf = rows.to(device).requires_grad_()
        out = gather(leaf, index.to(device), out_dtype=out_dtype)
        out.backward(grads.to(device, out_dtype))
        results.append((out.detach().cpu(), leaf.grad.cpu()))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def realigned(shift, part):
    """The same numbers in memory of another alignment."""
    return torch.cat([part[:shift], part])[shift:]


def launches():
    for num_rows, num_lookups, shift in ((160, 40000, 0), (321, 35001, 1)):
        index = heavy_tailed(num_rows, num_lookups)
        index = index.map(partial(realigned, shift))
        gather_rows(randn(num_rows, 80), index.rows_V, index.segment_N, torch.empty(num_lookups, 80, dtype=BF16))
        sums_of("cpu", torch.empty(num_lookups, 80, dtype=BF16), index, FP32)


def test_compiles_once_without_atomics_and_with_wide_accesses():
    compiled = compile_launches(launches)
    kernels = ["_gather_kernel", "_sum_chunks", "_sum_groups", "_sum_groups"]
    assert [name for name, _ in compiled] == kernels * 2
    assert compiled[4:] == compiled[:4]  # for other sizes the same code
    wide_loads = {"_gather_kernel": "ld.global.v4.b32", "_sum_chunks": "ld.global.v2.b32"}  # four floats, four bf16
    for name, code in compiled[:4]:
        assert not any(word in code for word in ("atom", "red.global", ".local")), name
        assert "st.global.v4.b32" in code, name
        assert wide_loads.get(name, "") in code, name
