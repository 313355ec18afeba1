"""Copies of records between host memory and a window in host memory, on one background worker a direction."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from offload.config import LinkConfig
from offload.copies import WorkerCopy
from offload.workers import background_worker

_STAGING_BYTES = 1 << 20
"""Of each direction's buffer: a chunk of records that stays in a core's cache between its two copies."""


class CpuTransfers:
    """The engine of ranks without a GPU: both the table and the window are in host memory.

    The two workers run at the same time, on one core each. Copies of one direction land in the order in which they
    were asked for, through a buffer that is allocated once.

    Args:
        host_RW: the shard's records.
        window_CW: the window's records; C slots.
        complete: called on the worker with (records_UW, rows) of a fetch, to fill in what host memory does not hold.
        link: emulates the time that this bus would take; null copies at full speed.
    """

    name = "cpu"
    stream_ordered = False

    def __init__(
        self,
        host_RW: Tensor,
        window_CW: Tensor,
        complete: Callable[[Tensor, Tensor], None],
        link: LinkConfig | None = None,
    ) -> None:
        self._host_RW, self._window_CW = host_RW, window_CW
        self._complete = complete
        self._link = link
        self._chunk_rows = max(1, _STAGING_BYTES // (host_RW.shape[1] * host_RW.element_size()))
        self._incoming, self._outgoing = host_RW.new_empty(2, self._chunk_rows, host_RW.shape[1])
        self._fetcher = background_worker("engram-fetch")
        self._writer = background_worker("engram-writeback")

    def fetch(self, rows: Tensor, slots: Tensor) -> WorkerCopy:
        """See `Transfers.fetch`."""
        return WorkerCopy(self._fetcher.submit(self._fetch, rows, slots))

    def write_back(self, slots: Tensor, rows: Tensor) -> WorkerCopy:
        """See `Transfers.write_back`."""
        return WorkerCopy(self._writer.submit(self._write_back, slots, rows))

    def close(self) -> None:
        """See `Transfers.close`."""
        self._fetcher.shutdown()
        self._writer.shutdown()

    def _fetch(self, rows: Tensor, slots: Tensor) -> None:
        started = time.perf_counter()
        for part, places in zip(rows.split(self._chunk_rows), slots.split(self._chunk_rows), strict=True):
            records = torch.index_select(self._host_RW, 0, part, out=self._incoming[: len(part)])
            self._complete(records, part)
            self._window_CW.index_copy_(0, places, records)
        self._occupy_link(started, len(rows))

    def _write_back(self, slots: Tensor, rows: Tensor) -> None:
        started = time.perf_counter()
        for places, part in zip(slots.split(self._chunk_rows), rows.split(self._chunk_rows), strict=True):
            records = torch.index_select(self._window_CW, 0, places, out=self._outgoing[: len(part)])
            self._host_RW.index_copy_(0, part, records)
        self._occupy_link(started, len(rows))

    def _occupy_link(self, started: float, num_rows: int) -> None:
        if self._link is None:
            return
        nbytes = num_rows * self._host_RW.shape[1] * self._host_RW.element_size()
        lasts = self._link.latency_s + nbytes / self._link.bytes_per_second
        time.sleep(max(0.0, started + lasts - time.perf_counter()))
