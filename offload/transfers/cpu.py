"""Copies of records between host memory, or a file, and a window in host memory, by a worker per direction."""

import time

from torch import Tensor

from kernels.records import draw_records, fetch_records, write_records
from offload.config import LinkConfig
from offload.device.workers import background_worker
from offload.host.file_records import FileRecords
from offload.rows.shard import Shard
from offload.spans import span
from offload.transfers.copies import WorkerCopy


class CpuTransfers:
    """The engine of ranks without a GPU: both the table and the window are in host memory.

    The two workers run at the same time, on one core each. Copies of one direction land in the order in which they were
    requested.

    Args:
        host_RW: the shard's records.
        window_CW: the window's records; C slots.
        shard: the rows.
        link: emulates the time that this bus would take; None copies at full speed.
    """

    name = "cpu"
    stream_ordered = False

    def __init__(
        self,
        host_RW: Tensor | FileRecords,
        window_CW: Tensor,
        shard: Shard,
        link: LinkConfig | None = None,
    ) -> None:
        self._host_RW, self._window_CW = host_RW, window_CW
        self._initial, self._link = shard.initial(window_CW.device), link
        self._fetcher = background_worker("engram-fetch", window_CW.device)
        self._writer = background_worker("engram-writeback", window_CW.device)

    def fetch(self, rows: Tensor, slots: Tensor, stored: int) -> WorkerCopy:
        """See `Transfers.fetch`."""
        return WorkerCopy(self._fetcher.submit(self._fetch, rows, slots, stored))

    def write_back(self, slots: Tensor, rows: Tensor) -> WorkerCopy:
        """See `Transfers.write_back`."""
        return WorkerCopy(self._writer.submit(self._write_back, slots, rows))

    def close(self) -> None:
        """See `Transfers.close`."""
        self._fetcher.shutdown()
        self._writer.shutdown()
        # The table's memory goes with its last holder.
        del self._host_RW, self._window_CW

    def _fetch(self, rows: Tensor, slots: Tensor, stored: int) -> None:
        started = time.perf_counter()
        with span("fetch"):
            self._copy_in(rows[:stored], slots[:stored])
            draw_records(self._window_CW, slots[stored:], rows[stored:], **self._initial)
            self._occupy_link(started, stored)

    def _write_back(self, slots: Tensor, rows: Tensor) -> None:
        started = time.perf_counter()
        with span("write back"):
            self._copy_out(slots, rows)
            self._occupy_link(started, len(rows))

    def _copy_in(self, rows: Tensor, slots: Tensor) -> None:
        if isinstance(self._host_RW, FileRecords):
            self._host_RW.fetch(rows, self._window_CW, slots)
        else:
            fetch_records(self._host_RW, rows, self._window_CW, slots)

    def _copy_out(self, slots: Tensor, rows: Tensor) -> None:
        if isinstance(self._host_RW, FileRecords):
            self._host_RW.write(self._window_CW, slots, rows)
        else:
            write_records(self._window_CW, slots, self._host_RW, rows)

    def _occupy_link(self, started: float, num_rows: int) -> None:
        if self._link is None:
            return
        nbytes = num_rows * self._window_CW.shape[1] * self._window_CW.element_size()
        lasts = self._link.latency_s + nbytes / self._link.bytes_per_second
        time.sleep(max(0.0, started + lasts - time.perf_counter()))
