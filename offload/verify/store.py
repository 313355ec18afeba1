"""A store of records whose every answer is compared with the shadow (verify mode)."""

import torch
from torch import Tensor

from offload.verify.shadow import Shadow
from offload.window.interface import RowStore, Traffic

SAMPLE_ROWS = 4096
"""Rows read again after each step, beside those of the step and those that left the window: all rows take turns."""


class VerifiedStore:
    """A store whose every answer is compared with the shadow. Rows are places in the shard, as in `RowStore`.

    Args:
        store: the store to watch.
        shadow: what it must hold.
    """

    def __init__(self, store: RowStore, shadow: Shadow) -> None:
        self._store, self._shadow = store, shadow
        self._in_host = torch.zeros(0, dtype=torch.bool)
        self._next_sampled = 0
        self._step = "before the first step"
        self.traffic = store.traffic
        self.records = store.records

    def take_traffic(self) -> Traffic:
        """See `RowStore.take_traffic`."""
        return self._store.take_traffic()

    def prefetch(self, step: int, rows: Tensor) -> bool:
        """See `RowStore.prefetch`."""
        return self._store.prefetch(step, rows)

    def acquire(self, step: int, rows: Tensor) -> Tensor:
        """See `RowStore.acquire`."""
        places = self._store.acquire(step, rows)
        self._step = f"step {step + 1}"
        self._require(rows, self.records.index_select(0, places), "as fetched for the step")
        return places

    def finish(self, step: int, rows: Tensor, *, updated: bool) -> None:
        """See `RowStore.finish`."""
        self._store.finish(step, rows, updated=updated)
        self._require(rows, self._store.read(rows), "in the window after the step")
        for others in (self._rows_that_left(), self._sample()):
            self._require(others, self._store.read(others), "read again after the step")

    def read(self, rows: Tensor) -> Tensor:
        """See `RowStore.read`."""
        records = self._store.read(rows)
        self._require(rows, records, "as looked up after the step")
        return records

    def in_host_memory(self, rows: Tensor) -> Tensor:
        """See `RowStore.in_host_memory`."""
        return self._store.in_host_memory(rows)

    def flush(self) -> Tensor:
        """See `RowStore.flush`."""
        records_RW = self._store.flush()
        # Those that must have been updated, and those that say so: nothing may be written to any other row.
        stored = self._shadow.layout.version(records_RW).nonzero().flatten().cpu()
        for rows in (self._shadow.updated(0, self._shadow.num_updated), stored):
            for some in rows.split(SAMPLE_ROWS):
                self._require(some, records_RW[some.to(records_RW.device)], "in host memory, as saved")
        return records_RW

    def load(self, rows: Tensor, records_UW: Tensor) -> None:
        """See `RowStore.load`."""
        self._store.load(rows, records_UW)
        self._shadow.put(rows, records_UW)

    def close(self) -> None:
        """See `RowStore.close`."""
        self._store.close()

    def _rows_that_left(self) -> Tensor:
        """The updated rows whose authority is host memory since this step: their write-back has just landed."""
        updated = self._shadow.updated(0, self._shadow.num_updated)
        in_host = self._store.in_host_memory(updated)
        before = torch.zeros_like(in_host)
        before[: len(self._in_host)] = self._in_host
        self._in_host = in_host
        return updated[in_host & ~before]

    def _sample(self) -> Tensor:
        start = self._next_sampled
        self._next_sampled = start + SAMPLE_ROWS if start + SAMPLE_ROWS < self._shadow.num_updated else 0
        return self._shadow.updated(start, start + SAMPLE_ROWS)

    def _require(self, rows: Tensor, records_UW: Tensor, what: str) -> None:
        self._shadow.require(rows, records_UW, self._shadow.records(rows), f"{self._step}, {what}")
