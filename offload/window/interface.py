"""What every store of a rank's shard can do: the window over host memory, and the resident shard.

Both give the same bits. Rows are identified by their places in the shard.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Protocol

from torch import Tensor

from offload.config import OffloadConfig
from offload.host.file_records import FileRecords


@dataclass
class Traffic:
    """What has happened so far. Counts only grow, each changed by one thread, so that anybody may read them.

    Attributes:
        requested: rows that steps needed from this rank.
        fetched: those of them that had to be fetched from host memory.
        drawn: those of them that were drawn in the window, since they had never been updated.
        written_back: rows whose copy to host memory has begun.
        waited_s: time that the training loop waited for plans and rows.
        planned_s: time that the planner's thread worked.
    """

    requested: int = 0
    fetched: int = 0
    drawn: int = 0
    written_back: int = 0
    waited_s: float = 0.0
    planned_s: float = 0.0

    @property
    def hits(self) -> int:
        """Rows that steps needed from this rank and found in the window."""
        return self.requested - self.fetched - self.drawn

    def since(self, earlier: "Traffic") -> "Traffic":
        """What has happened since then."""
        return Traffic(*(now - then for now, then in zip(astuple(self), astuple(earlier), strict=True)))

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time spent inside as waiting."""
        started = time.perf_counter()
        yield
        self.waited_s += time.perf_counter() - started


def nobody(rows: Tensor) -> None:
    """For `RowStore.before_change`: nobody wants to know."""


class RowStore(Protocol):
    """The records of a shard. Rows are places in the shard (int64, ascending, unique)."""

    records: Tensor
    """fp32 [C, W], on the device: the window's slots, or the whole shard."""

    traffic: Traffic
    """What has happened since the store was opened. The time that the loop waits for plans is counted here too."""

    before_change: Callable[[Tensor], object]
    """Called with rows before their records change in the memory that `flush` returned; it may wait."""

    @property
    def engine(self) -> str | None:
        """Name of the transfer engine; None where no row travels."""

    def prepare(self, step: int, rows: Tensor) -> None:
        """Asks that a step's rows be brought within reach: at once, or as soon as there is room.

        Each step is prepared once, in ascending order; `rows` stay as they are. Nobody waits.
        """

    def hold(self, step: int) -> Tensor:
        """Waits until a prepared step's rows are within reach; returns where they are in `records` (int64, its device).

        They stay there, and nobody else touches them, until the step is released. Steps are held one at a time.
        """

    def release(self, step: int, *, updated: bool) -> None:
        """Releases the held step's rows; `updated` tells whether their records were changed in place, which counts as
        an update of each.
        """

    def read(self, rows: Tensor) -> Tensor:
        """A copy of the rows' records [U, W] as of now, without bringing them anywhere."""

    def in_host_memory(self, rows: Tensor) -> Tensor:
        """Which of the rows have host memory as their authority: bool [U]."""

    def flush(self) -> Tensor | FileRecords:
        """The whole shard's records [R, W], every update included; steps change them later: see `before_change`."""

    def update_counts(self) -> Tensor:
        """How often each row of the shard was updated, 255 for more: uint8 [R], valid as `flush`'s result is.

        0 is a row that was never updated, whose record is not stored.
        """

    def load(self, rows: Tensor, records_UW: Tensor, counts_U: Tensor) -> None:
        """Overwrites records and counts of updates (uint8, 0 for those of version 0 alone) before the first step."""

    def reopen(self, config: OffloadConfig) -> None:
        """Takes the window's size and the engine of `config`, if there is a window, and forgets what was prepared."""

    def close(self) -> None:
        """Ends background work."""
