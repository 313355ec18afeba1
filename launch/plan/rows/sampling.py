"""Which rows are sampled: those of some owners, and of these every k-th.

Rows are hashes, so every k-th row of a shard is a fair sample of it, whatever the text: counts of such rows times k are
unbiased, and exact for k = 1. Which owners are sampled matters more, as an owner's range may lie in the sub-tables of
one n-gram order alone: they are spread over the whole table, the first and the last among them.

Shape suffixes: N lookups, O sampled owners.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offload.plan.sharding import Sharding

MOST_OWNERS = 16
_MOST_KEPT = 1 << 20
"""About how many lookups of a step are kept."""

Ids = NDArray[np.int64]


def each_once(*parts: Ids) -> Ids:
    """All ids of the parts, each once, ascending. (`numpy.unique` of NumPy 2.3 hashes: ten times as slow.)"""
    ids = np.sort(np.concatenate(parts)) if parts else np.empty(0, np.int64)
    return ids[np.concatenate(([True], ids[1:] != ids[:-1]))] if len(ids) else ids


@dataclass(frozen=True)
class Sample:
    """Rows whose number is a multiple of `thinned`, of the given owners.

    Args:
        sharding: of all rows.
        owners: ranks, ascending.
        thinned: a power of two.
    """

    sharding: Sharding
    owners: tuple[int, ...]
    thinned: int

    @property
    def whole(self) -> bool:
        """Whether all owners are sampled."""
        return len(self.owners) == self.sharding.world_size

    def kept(self, ids_N: Ids) -> NDArray[np.intp]:
        """Places among `ids_N` of those with a multiple of `thinned`."""
        return np.flatnonzero((ids_N & (self.thinned - 1)) == 0)

    def owner_of(self, module: int, ids: Ids) -> NDArray[np.int64]:
        """For each id the place of its owner in `owners`, or -1."""
        edges = self._edges(module)
        place = np.searchsorted(edges, ids, side="right") - 1
        return np.where(place % 2 == 0, place // 2, -1)

    def shard_rows(self, place: int) -> int:
        """Kept rows of an owner's shard."""
        modules = range(len(self.sharding.num_rows))
        return sum(len(self._thin(module, place)) for module in modules)

    def places(self, module: int, place: int, ids: Ids) -> Ids:
        """The kept rows' places in the thinned shard of their owner."""
        before = sum(len(self._thin(earlier, place)) for earlier in range(module))
        return ids // self.thinned - self._thin(module, place).start + before

    def _thin(self, module: int, place: int) -> range:
        owned = self.sharding.owned(module, self.owners[place])
        return range(-(-owned.start // self.thinned), -(-owned.stop // self.thinned))

    def _edges(self, module: int) -> Ids:
        owned = (self.sharding.owned(module, owner) for owner in self.owners)
        # Neighbours touch: an empty range between two keeps owners at even places.
        return np.array([edge for rows in owned for edge in (rows.start, rows.stop)], np.int64)


def choose_sample(sharding: Sharding, lookups: int) -> Sample:
    """A sample of a step of `lookups` lookups, over all ranks, that keeps about as many as are quickly replayed."""
    world = sharding.world_size
    count = min(world, MOST_OWNERS)
    owners = tuple(sorted({round(place * (world - 1) / max(1, count - 1)) for place in range(count)}))
    kept, thinned = lookups * len(owners) / world, 1
    while kept / thinned > _MOST_KEPT:
        thinned *= 2
    return Sample(sharding, owners, thinned)
