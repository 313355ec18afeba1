"""Which rank owns which row: contiguous ranges of each module's rows.

A row's global id does not depend on the world size; only its owner does.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sharding:
    """The rows of all modules, split over the ranks.

    Args:
        num_rows: rows of each module's table.
        world_size: number of ranks. Rank r owns rows [R*r // world_size, R*(r+1) // world_size) of a module of R rows.
    """

    num_rows: tuple[int, ...]
    world_size: int

    @cached_property
    def boundaries(self) -> tuple[Tensor, ...]:
        """For each module, int64 [world_size + 1]: where each rank's range starts, and the end."""
        ranks = range(self.world_size + 1)
        return tuple(torch.tensor([rows * r // self.world_size for r in ranks]) for rows in self.num_rows)

    @cached_property
    def _module_bases(self) -> tuple[int, ...]:
        return tuple(sum(self.num_rows[:module]) for module in range(len(self.num_rows)))

    def owned(self, module: int, rank: int) -> range:
        """The rows of `module` that `rank` owns."""
        start, end = self.boundaries[module][rank : rank + 2].tolist()
        return range(start, end)

    def counts(self, module: int, rows_U: Tensor) -> Tensor:
        """How many of the ascending `rows_U` (int64) each rank owns: int64 [world_size]."""
        return torch.searchsorted(rows_U, self.boundaries[module]).diff()

    def shard_rows(self, rank: int) -> int:
        """Rows of all modules that `rank` owns: the length of its shard."""
        return sum(len(self.owned(module, rank)) for module in range(len(self.num_rows)))

    def shard_offset(self, module: int, rank: int) -> int:
        """Where a module's rows start within the rank's shard, which holds the modules one after another."""
        return sum(len(self.owned(earlier, rank)) for earlier in range(module))

    def to_shard(self, module: int, rank: int, rows: Tensor) -> Tensor:
        """The places in the rank's shard of rows of `module` that it owns (int64)."""
        return rows - self.owned(module, rank).start + self.shard_offset(module, rank)

    def global_ids(self, rank: int, places: Tensor) -> Tensor:
        """The job-wide ids (int64) of places in the rank's shard: the modules' rows numbered one after another."""
        ids = torch.empty_like(places)
        for module, base in enumerate(self._module_bases):
            offset, owned = self.shard_offset(module, rank), self.owned(module, rank)
            inside = (places >= offset) & (places < offset + len(owned))
            ids[inside] = places[inside] - offset + owned.start + base
        return ids

    def to_places(self, rank: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Of job-wide ids (int64), the places in the rank's shard of those that it owns, and which they are (bool)."""
        ends, shifts = [], []
        for module, base in enumerate(self._module_bases):
            owned = self.owned(module, rank)
            ends += [base + owned.start, base + owned.stop]
            shifts.append(self.shard_offset(module, rank) - base - owned.start)
        # An odd number of ends lies before the ids of a module's own rows, an even one before all others.
        before = torch.bucketize(ids, torch.tensor(ends), right=True)
        mine = before % 2 == 1
        places = ids + torch.tensor([*shifts, 0])[before // 2]
        return places[mine], mine
