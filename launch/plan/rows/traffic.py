"""What sampled owners of rows have to do in a step, and the windows that do it: a real directory for each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from launch.plan.rows.sampling import Ids, Sample, each_once
from offload.window.open import open_directory

DEPTHS = (0, 1, 2, 4)
"""Look-aheads that are compared."""
SNUG = 1.25
"""A window over the rows that it must hold at once."""


@dataclass(frozen=True)
class OwnerTraffic:
    """One owner's traffic per step: means over the steps that count; rows of the whole shard.

    Attributes:
        rank: the owner.
        asked: rows that ranks request from it.
        owned: rows of it that the step uses; the most of any step in `most`.
        fetched, written: rows into the window and out of it; None where the window is too small for a step.
        stored: of the fetched, those that an earlier step of the replay used. Others are drawn in the window as long as
            a run has not got far.
        unions: by depth, the most rows that a step and as many later ones use together.
    """

    rank: int
    asked: float
    owned: float
    most: float
    fetched: float | None
    written: float | None
    unions: dict[int, float]
    stored: float | None = None

    @property
    def hit_rate(self) -> float | None:
        """The share of the rows that the step uses that were in the window."""
        return None if self.fetched is None else 1 - self.fetched / self.owned if self.owned else 1.0


@dataclass(frozen=True)
class Replayed:
    """What was replayed.

    Attributes:
        stream: where the tokens come from.
        steps, warmup: that count, and that came before them.
        thinned: one row in this many was sampled; 1 is all.
        owners: the sampled owners' traffic.
        ranks: of the job.
        lookups: of a step, of all ranks.
    """

    stream: str
    steps: int
    warmup: int
    thinned: int
    owners: tuple[OwnerTraffic, ...]
    ranks: int
    lookups: int

    def mean(self, of: Callable[[OwnerTraffic], float | None]) -> float:
        """Over the sampled owners that have it."""
        found = [value for value in map(of, self.owners) if value is not None]
        return sum(found) / len(found) if found else 0.0

    def most(self, of: Callable[[OwnerTraffic], float | None]) -> float:
        """Of the sampled owners."""
        return max((value for value in map(of, self.owners) if value is not None), default=0.0)

    @property
    def imbalance(self) -> float:
        """The busiest sampled owner's rows over the mean."""
        mean = self.mean(lambda owner: owner.owned)
        return self.most(lambda owner: owner.owned) / mean if mean else 1.0

    @property
    def fits(self) -> bool:
        """Whether each sampled owner's window holds every step."""
        return all(owner.fetched is not None for owner in self.owners)


def owner_traffic(
    sample: Sample,
    place: int,
    asked: Sequence[int],
    used: Sequence[Ids],
    window_rows: int | None,
    warmup: int,
) -> OwnerTraffic:
    """What one owner does.

    Args:
        sample, place: whose rows, and which of its owners.
        asked: kept rows that ranks request from it, in each step.
        used: which (places in its thinned shard), each once.
        window_rows: of its window, unthinned; None: a quarter more than any step uses.
        warmup: steps that do not count.
    """
    thinned, counted = sample.thinned, range(warmup, len(used))
    most = max(map(len, used))
    wanted = int(SNUG * most) if window_rows is None else window_rows // thinned
    slots = min(max(1, wanted), max(1, sample.shard_rows(place)))
    moved = _moved(used, slots)
    mean = _mean_of(thinned)
    return OwnerTraffic(
        sample.owners[place],
        mean([asked[step] for step in counted]),
        mean([len(used[step]) for step in counted]),
        thinned * most,
        None if moved is None else mean([moved[step][0] for step in counted]),
        None if moved is None else mean([moved[step][1] for step in counted]),
        {ahead: thinned * _union(used, ahead) for ahead in DEPTHS if ahead < len(used)},
        None if moved is None else mean([moved[step][2] for step in counted]),
    )


def _mean_of(factor: int) -> Callable[[Sequence[int]], float]:
    return lambda values: factor * sum(values) / len(values)


def _union(used: Sequence[Ids], ahead: int) -> int:
    starts = range(len(used) - ahead)
    return max(len(each_once(*used[start : start + ahead + 1])) for start in starts)


def _moved(used: Sequence[Ids], slots: int) -> list[tuple[int, int, int]] | None:
    """Rows fetched and written back for each step by a real directory, and how many of the fetched were used before;
    None if a step does not fit.

    Steps are admitted one at a time: a look-ahead changes when rows travel, but not which, as those that leave are the
    least recently used either way (a test holds it to real tables that look ahead).
    """
    known = each_once(*used)  # the others are never in a slot: a directory of these alone decides the same
    directory = open_directory(max(1, len(known)), slots)
    before = np.zeros(len(known), bool)
    moved = []
    for step, rows in enumerate(np.searchsorted(known, rows) for rows in used):
        leaving = directory.evict(max(0, directory.keep(step, rows) - directory.num_free))
        directory.written(leaving)
        admission = directory.admit(step, rows)
        if admission is None:
            return None
        fetched, taken = admission
        directory.fetched(taken)
        directory.finish(step, directory.slots(rows))
        moved.append((len(fetched), len(leaving), int(before[fetched].sum())))
        before[rows] = True
    return moved
