"""A rank's rows: their ids, and the values of those that were never updated, which no memory holds."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offload.plan.sharding import Sharding
from offload.rows.records import RecordLayout, RowInit, torch_dtype


@dataclass(frozen=True)
class Shard:
    """The rows of a rank, identified by their places in the shard (int64).

    Args:
        sharding, rank: which rows these are.
        layout, init: of their records.
    """

    sharding: Sharding
    rank: int
    layout: RecordLayout
    init: RowInit

    def row_ids(self, rows: Tensor) -> Tensor:
        """The rows' job-wide ids (int64)."""
        return self.sharding.global_ids(self.rank, rows)

    def id_ranges(self) -> Tensor:
        """Each module's first row in the shard, and what to add to rows for their job-wide ids: int64 [modules, 2]."""
        modules = range(len(self.sharding.num_rows))
        firsts = torch.tensor([self.sharding.shard_offset(module, self.rank) for module in modules])
        bases = torch.tensor([sum(self.sharding.num_rows[:module]) for module in modules])
        starts = torch.tensor([self.sharding.owned(module, self.rank).start for module in modules])
        return torch.stack([firsts, bases + starts - firsts], dim=1)

    def initial(self, device: torch.device) -> dict[str, Any]:
        """What `kernels.records.draw_records` needs to know about the rows, besides which they are."""
        return {
            "id_ranges_M2": self.id_ranges().to(device),
            "dim": self.layout.dim,
            "row_dtype": torch_dtype(self.layout.row_dtype),
            "seed": self.init.seed,
            "std": self.init.std,
        }

    def fill(self, records_UW: Tensor, rows: Tensor) -> None:
        """Writes the initial weights of those of the rows whose version is 0."""
        self.init.fill(self.layout, records_UW, self.row_ids(rows))
