"""Gradients on their way to the rows' owners."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from offload.plan import exchange
from offload.plan.exchange import exchange_gradients
from offload.plan.finders import HostFinder
from offload.plan.plan import ModulePlan
from tests.distributed import run_ranks
from tests.kernels.launches import on_a_gpu
from tests.offload.tables_job import Addresses

ROWS, COLUMNS = 40, 5


def asked_of_one_owner(ranks: int) -> list[Tensor]:
    """The rows that each rank asks for: one row they all do, most rows some ranks, some rows none."""
    generator = torch.Generator().manual_seed(ranks)
    asked = [(torch.rand(ROWS, generator=generator) < 0.5).nonzero().flatten() for _ in range(ranks)]
    return [torch.cat([rows, torch.tensor([rank, ROWS + 1])]).unique() for rank, rows in enumerate(asked)]


def plan_of(asked: list[Tensor], rank: int) -> ModulePlan:
    """The plan of `rank` where rank 0 owns all rows that are used."""
    mine, ranks = asked[rank], len(asked)
    wanted = asked if rank == 0 else [torch.empty(0, dtype=torch.int64)] * ranks
    owned, *of_owner = HostFinder(Addresses()).owed(torch.cat(wanted), ranks)
    return ModulePlan(
        (), [len(mine), *[0] * (ranks - 1)], [len(rows) for rows in wanted], *of_owner, slice(0, len(owned))
    )


def gradient_of(rows: Tensor, rank: int) -> Tensor:
    return torch.randn(len(rows), COLUMNS, generator=torch.Generator().manual_seed(100 + rank))


def in_rank_order(asked: list[Tensor]) -> Tensor:
    owned = torch.cat(asked).unique()
    total_OD = torch.zeros(len(owned), COLUMNS)
    for rank, rows in enumerate(asked):
        total_OD.index_add_(0, torch.searchsorted(owned, rows), gradient_of(rows, rank))
    return total_OD


def send_to_rank_0(ranks: int) -> Tensor:
    rank, asked = dist.get_rank(), asked_of_one_owner(ranks)
    return exchange_gradients(plan_of(asked, rank), gradient_of(asked[rank], rank), None)()


@pytest.mark.parametrize("ranks", [2, 3])
def test_an_owner_gets_the_ranks_sum_in_rank_order_to_the_bit(ranks: int) -> None:
    first, *others = run_ranks(send_to_rank_0, ranks, ranks)
    assert torch.equal(first, in_rank_order(asked_of_one_owner(ranks)))
    assert all(other.shape == (0, COLUMNS) for other in others)


@pytest.mark.parametrize("ranks", range(2, 9))
def test_the_sum_of_any_number_of_ranks_is_in_rank_order_to_the_bit(ranks: int) -> None:
    asked = asked_of_one_owner(ranks)
    with arrived(asked) as received:
        assert torch.equal(exchange_gradients(plan_of(asked, 0), received, None)(), in_rank_order(asked))


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_an_owner_launches_one_kernel_however_many_ranks_there_are(ranks: int) -> None:
    asked = asked_of_one_owner(ranks)
    plan = plan_of(asked, 0)
    with arrived(asked) as received, on_a_gpu() as counted:
        exchange_gradients(plan, received, None)()
    assert counted == {"triton::_sum_parts": 1}


@contextmanager
def arrived(asked: list[Tensor]) -> Iterator[Tensor]:
    received = torch.cat([gradient_of(rows, rank) for rank, rows in enumerate(asked)])
    with mock.patch.object(exchange, "_all_to_all", return_value=lambda: received):
        yield received
