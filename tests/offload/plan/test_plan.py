"""What a plan takes of memory."""

import torch

from offload.plan.finders import HostFinder
from offload.plan.plan import Tokens, make_plan
from offload.plan.sharding import Sharding
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
        plan = make_plan(parts, HostFinder(Apart()), sharding, 0, None)  # type: ignore[arg-type]
        assert len(plan.rows_O) == SLOTS * 1024
        return index_bytes(plan)

    assert size(256) <= size(1) <= 16 * SLOTS * 1024
