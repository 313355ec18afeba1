"""What every place for the records of a rank's shard can do: the window over host memory, and the resident shard.

Both give the same bits. Rows are named by their places in the shard.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor


@dataclass
class Traffic:
    """What happened since the last `take`.

    Attributes:
        requested: rows that steps needed of this rank.
        fetched: those of them that had to be fetched from host memory.
        written_back: rows copied to host memory.
        waited_s: time that the training loop waited for plans and rows.
        planned_s: time that the planner's thread worked.
    """

    requested: int = 0
    fetched: int = 0
    written_back: int = 0
    waited_s: float = 0.0
    planned_s: float = 0.0

    def take(self) -> "Traffic":
        """The counts so far; starts again from zero."""
        taken = replace(self)
        self.requested = self.fetched = self.written_back = 0
        self.waited_s = 0.0
        return taken

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time spent inside as waiting."""
        started = time.perf_counter()
        yield
        self.waited_s += time.perf_counter() - started


class RowStore(Protocol):
    """The records of a shard. Rows are places in the shard (int64, ascending, unique)."""

    records: Tensor
    """fp32 [C, W], on the device: the window's slots, or the whole shard."""

    @property
    def traffic(self) -> Traffic:
        """What happened; counted by the store, if need be while it is read."""

    def take_traffic(self) -> Traffic:
        """All that happened since the last call."""

    def prefetch(self, step: int, rows: Tensor) -> bool:
        """Starts to bring the step's rows within reach; False if there is no room yet. Steps come in order."""

    def acquire(self, step: int, rows: Tensor) -> Tensor:
        """Waits until the step's rows are within reach; returns where they stand in `records` (int64, its device).

        They stay there, and nobody else touches them, until the step is finished.
        """

    def finish(self, step: int, rows: Tensor, *, updated: bool) -> None:
        """Lets go of the step's rows; `updated` tells whether their records were changed where they stand."""

    def read(self, rows: Tensor) -> Tensor:
        """A copy of the rows' records [U, W] as of now, without bringing them anywhere."""

    def in_host_memory(self, rows: Tensor) -> Tensor:
        """Which of the rows have host memory as their authority: bool [U]."""

    def flush(self) -> Tensor:
        """The whole shard's records [R, W], every update included; valid until the next `prefetch` or `finish`."""

    def load(self, rows: Tensor, records_UW: Tensor) -> None:
        """Overwrites records before the first step."""

    def close(self) -> None:
        """Ends background work."""
