"""Norms of rows, block by block, have the bits of one operation over all of them."""

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from kernels.gather.squared_norms import squared_norms


@pytest.fixture(params=[1, 2])
def threads(request: Any) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dim", [1, 7, 8, 31, 80, 1280])
@pytest.mark.parametrize("rows", [0, 1, 3001])
def test_norms_have_the_bits_of_one_operation(threads: int, dim: int, rows: int) -> None:
    """No block is one that torch would share among its threads, which then wait without giving up their cores."""
    generator = torch.Generator().manual_seed(dim)
    rows_UD = torch.randn(rows, dim, generator=generator) * torch.logspace(-30, 15, rows)[:, None]
    sizes, dot = [], torch.linalg.vecdot

    def watched(block_BD: Tensor, *others: Tensor, out: Tensor) -> Tensor:
        sizes.append(block_BD.numel())
        return dot(block_BD, *others, out=out)

    with mock.patch.object(torch.linalg, "vecdot", watched):
        norms_U = squared_norms(rows_UD)
    assert torch.equal(norms_U, dot(rows_UD, rows_UD))
    assert max(sizes, default=0) < 32_768
