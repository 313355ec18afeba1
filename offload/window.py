"""A shard in host memory, seen through a window of slots on the device."""

from collections import deque
from concurrent.futures import Future

import numpy as np
import torch
from torch import Tensor

from offload.config import OffloadConfig
from offload.directory import Directory
from offload.host_table import HostTable
from offload.records import RecordLayout, RowInit
from offload.sharding import Sharding
from offload.store import Traffic
from offload.transfers import CpuTransfers


class WindowStore:
    """A shard in host memory, and a window of slots that holds the rows of the steps at hand.

    Args:
        config: offload settings.
        sharding, rank: which rows the shard holds.
        layout, init: of the records.
        device: of the window.

    Raises:
        ValueError: if host memory does not suffice.
    """

    def __init__(
        self,
        config: OffloadConfig,
        sharding: Sharding,
        rank: int,
        layout: RecordLayout,
        init: RowInit,
        device: torch.device,
    ) -> None:
        num_rows = sharding.shard_rows(rank)
        num_slots = min(config.window_rows, num_rows)
        self._host = HostTable(
            num_rows, layout.words, file_folder=config.host_file, touch_pages=config.host_touch, device=device
        )
        self.records = torch.zeros(num_slots, layout.words, device=device)
        self._directory = Directory(num_rows, num_slots)
        self._layout, self._init, self._sharding, self._rank = layout, init, sharding, rank
        self._transfers = CpuTransfers(self._host.records_RW, self.records, self._fill, config.emulate_link)
        self._fetches: dict[int, tuple[np.ndarray, Future[None]]] = {}
        self._writebacks: deque[tuple[np.ndarray, Future[None]]] = deque()
        self._wanted_free = 0
        self.traffic = Traffic()

    def prefetch(self, step: int, rows: Tensor) -> bool:
        """See `RowStore.prefetch`."""
        if step in self._fetches:
            return True
        self._collect_writebacks(wait=False)
        self._directory.keep(step, rows.numpy())
        self._wanted_free = self._directory.missing(rows.numpy())
        self._make_room()
        admission = self._directory.admit(step, rows.numpy())
        if admission is None:
            return False
        fetched, slots = admission
        future = self._transfers.fetch(torch.from_numpy(fetched), torch.from_numpy(slots))
        self._fetches[step] = slots, future
        return True

    def acquire(self, step: int, rows: Tensor) -> Tensor:
        """See `RowStore.acquire`. The caller has made sure that the rows fit into the window."""
        while not self.prefetch(step, rows):
            if not self._writebacks:
                raise RuntimeError(f"no slot can become free for step {step}, with no write-back under way")
            self._collect_writebacks(wait=True)
        slots, future = self._fetches.pop(step)
        with self.traffic.waiting():
            future.result()
        self._directory.fetched(slots)
        # Counted for the step that uses the rows, not for the earlier one during which they travelled.
        self.traffic.requested += len(rows)
        self.traffic.fetched += len(slots)
        used = self._directory.slots(rows.numpy())
        # A resurrected row may still be on its way to host memory: it must not change under that copy.
        while self._directory.being_written(used):
            self._collect_writebacks(wait=True)
        return torch.from_numpy(used).to(self.records.device)

    def finish(self, step: int, rows: Tensor, *, updated: bool) -> None:
        """See `RowStore.finish`."""
        used = self._directory.slots(rows.numpy())
        self._directory.finish(step, used if updated else used[:0])
        # Room for a step like the last one is made now, so that its fetch need not wait for a write-back.
        self._make_room()

    def read(self, rows: Tensor) -> Tensor:
        """See `RowStore.read`."""
        records = self._host.records_RW.index_select(0, rows)
        slots = self._directory.slots(rows.numpy())
        held = np.flatnonzero(slots >= 0)
        # Rows on their way in are equal in both places, but may not have landed in the slot yet.
        held = held[~np.isin(slots[held], self._slots_in_flight())]
        if len(held):
            places = torch.from_numpy(slots[held]).to(self.records.device)
            records[torch.from_numpy(held)] = self.records.index_select(0, places).cpu()
        self._fill(records, rows)
        return records.to(self.records.device)

    def in_host_memory(self, rows: Tensor) -> Tensor:
        """See `RowStore.in_host_memory`."""
        return torch.from_numpy(self._directory.slots(rows.numpy()) < 0)

    def flush(self) -> Tensor:
        """See `RowStore.flush`."""
        while self._writebacks:
            self._collect_writebacks(wait=True)
        dirty = np.flatnonzero(self._directory.dirty)
        rows = torch.from_numpy(self._directory.rows(dirty))
        self._transfers.write_back(torch.from_numpy(dirty), rows).result()
        self._directory.cleaned(dirty)
        return self._host.records_RW

    def load(self, rows: Tensor, records_UW: Tensor) -> None:
        """See `RowStore.load`."""
        self._host.records_RW[rows] = records_UW

    def close(self) -> None:
        """See `RowStore.close`."""
        self._transfers.close()
        self._host.close()

    def _fill(self, records_UW: Tensor, rows: Tensor) -> None:
        self._init.fill(self._layout, records_UW, self._sharding.global_ids(self._rank, rows))

    def _slots_in_flight(self) -> np.ndarray:
        flights = [slots for slots, _ in self._fetches.values()]
        return np.concatenate(flights) if flights else np.empty(0, np.int64)

    def _make_room(self) -> None:
        coming = sum(len(slots) for slots, _ in self._writebacks)
        shortage = self._wanted_free - self._directory.num_free - coming
        if shortage <= 0:
            return
        slots = self._directory.evict(shortage)
        if len(slots):
            rows = torch.from_numpy(self._directory.rows(slots))
            self._writebacks.append((slots, self._transfers.write_back(torch.from_numpy(slots), rows)))
            self.traffic.written_back += len(slots)

    def _collect_writebacks(self, wait: bool) -> None:
        while self._writebacks and (wait or self._writebacks[0][1].done()):
            slots, future = self._writebacks.popleft()
            with self.traffic.waiting():
                future.result()
            self._directory.written(slots)
            wait = False
