import pytest
import torch

from kernels.records.row_init import initial_rows as torch_rows
from kernels.records.row_init_triton import initial_rows


@pytest.mark.parametrize(("count", "dim"), [(1, 1), (5, 7), (37, 130), (3, 80)])
@pytest.mark.parametrize(("seed", "std"), [(0, 1.0), (-5, 0.02), (2**65 - 1, 1e-42), (7, 0.0)])
def test_the_bits_of_the_reference(kernel_device, count, dim, seed, std):
    ids = torch.randint(-(2**63), 2**63 - 1, (count,), generator=torch.Generator().manual_seed(1))
    ids[:2] = torch.tensor([0, 2**63 - 1])[:count]
    values = initial_rows(ids.to(kernel_device), dim, seed=seed, std=std).cpu()
    assert torch.equal(values.view(torch.int32), torch_rows(ids, dim, seed=seed, std=std).view(torch.int32))


def test_strided_ids(kernel_device):
    ids = torch.arange(40, device=kernel_device)[1::3]
    assert torch.equal(initial_rows(ids, 5, seed=0, std=1.0).cpu(), torch_rows(ids.cpu(), 5, seed=0, std=1.0))


@pytest.mark.parametrize(("count", "dim"), [(0, 4), (3, 0)])
def test_nothing_to_draw(kernel_device, count, dim):
    assert initial_rows(torch.arange(count, device=kernel_device), dim, seed=0, std=1.0).shape == (count, dim)
