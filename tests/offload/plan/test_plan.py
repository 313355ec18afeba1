"""What a plan takes of memory, and plans of real ranks that use, and own, different numbers of rows."""

from typing import Any

import torch
import torch.distributed as dist

from offload.plan.plan import Tokens, make_plan
from offload.plan.sharding import Sharding
from tests.distributed import run_ranks
from tests.offload.hazard_job import Addresses
from tests.offload.plan.plan_size import index_bytes
from tests.offload.tables_job import SLOTS


class Apart:
    """One module, in which every token reads rows of its own."""

    def all_rows(self, tokens_BT: torch.Tensor, positions_BT: torch.Tensor) -> torch.Tensor:
        return tokens_BT[None, ..., None] * SLOTS + torch.arange(SLOTS)


def test_a_plan_grows_with_its_lookups_and_not_with_micro_batches_times_rows() -> None:
    sharding, tokens = Sharding((SLOTS * 1024,), 1), torch.arange(1024)

    def size(batches: int) -> int:
        parts = [Tokens(part[None], torch.zeros_like(part)[None]) for part in tokens.chunk(batches)]
        plan = make_plan(parts, Apart(), sharding, 0, None)  # type: ignore[arg-type]
        assert len(plan.rows_O) == SLOTS * 1024
        return index_bytes(plan)

    assert size(256) <= size(1) <= 16 * SLOTS * 1024


ASKED = [[0, 1, 2, 3], [2, 3, 90, 90]]
"""Token ids of each rank: rank 0 owns most of what they read of the first module."""


def planned() -> tuple[list[int], int]:
    """Places of the rows that this rank owns, and the largest number of any rank."""
    addresses: Any = Addresses()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    tokens_BT = torch.tensor([ASKED[rank]])
    batch = Tokens(tokens_BT, torch.arange(4)[None])
    plan = make_plan([batch], addresses, Sharding(addresses.sizes, world_size), rank, None)
    return plan.rows_O.tolist(), plan.most_rows


def test_all_ranks_know_the_most_rows_that_any_of_them_owns() -> None:
    addresses, sharding = Addresses(), Sharding(Addresses().sizes, 2)
    owned = []
    for rank in range(2):
        rows = [set(addresses.rows(m, torch.tensor(ASKED)).flatten().tolist()) for m in range(2)]
        mine = [sorted(row for row in rows[m] if row in sharding.owned(m, rank)) for m in range(2)]
        owned.append([place for m in range(2) for place in sharding.to_shard(m, rank, torch.tensor(mine[m])).tolist()])
    assert len(owned[0]) != len(owned[1])
    assert run_ranks(planned, 2) == [(places, max(map(len, owned))) for places in owned]
