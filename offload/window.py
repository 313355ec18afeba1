"""A shard in host memory, seen through a window of slots on the device."""

from collections import deque

import numpy as np
import torch
from torch import Tensor

from offload.config import OffloadConfig
from offload.copies import Copy
from offload.directory import Directory
from offload.host_memory import zeros_on
from offload.host_table import HostTable
from offload.records import RecordLayout, RowInit
from offload.shard import Shard
from offload.sharding import Sharding
from offload.store import Places, Traffic
from offload.transfers import open_transfers, pins


class WindowStore:
    """A shard in host memory, and a window of slots that holds the rows of the steps at hand.

    Args:
        config: offload settings.
        sharding, rank: which rows the shard holds.
        layout, init: of the records.
        device: of the window.
        may_wait: `prefetch` may wait for write-backs, as the training loop must not; room for a step is then made by
            its own prefetch, otherwise as soon as the step before is finished.

    Raises:
        ValueError: if host memory does not suffice, or the device has no such engine.
    """

    def __init__(
        self,
        config: OffloadConfig,
        sharding: Sharding,
        rank: int,
        layout: RecordLayout,
        init: RowInit,
        device: torch.device,
        *,
        may_wait: bool = False,
    ) -> None:
        num_rows = sharding.shard_rows(rank)
        num_slots = min(config.window_rows, num_rows)
        self._host = HostTable(
            num_rows,
            layout.words,
            stride=layout.stride(device),
            file_folder=config.host_file,
            touch_pages=pins(config, device) if config.host_touch is None else config.host_touch,
            device=device,
        )
        self.records = zeros_on(device, num_slots, layout.stride(device))[:, : layout.words]
        self._directory = Directory(num_rows, num_slots)
        self._shard = Shard(sharding, rank, layout, init)
        try:
            self._transfers = open_transfers(config, self._host, self.records, self._shard)
        except BaseException:
            self._host.close()
            raise
        self._places = Places(device)
        self._fetches: dict[int, tuple[np.ndarray, Copy]] = {}
        self._writebacks: deque[tuple[np.ndarray, Copy]] = deque()
        # Copies to host memory that fetches were told to come after, by number; and each slot's last one.
        self._landing: dict[int, Copy] = {}
        self._last_landing = np.zeros(num_slots, np.int64)
        self._num_ordered = 0
        self._may_wait, self._wanted_free = may_wait, 0
        self._used: dict[int, np.ndarray] = {}  # slots of the admitted steps' rows, which stay there
        self.traffic = Traffic()

    @property
    def engine(self) -> str:
        """The engine that carries the records."""
        return self._transfers.name

    def prefetch(self, step: int, rows: Tensor) -> bool:
        """See `RowStore.prefetch`."""
        if step in self._fetches:
            return True
        self._collect_writebacks()
        self._make_room(self._directory.keep(step, rows.numpy()))
        while (admission := self._directory.admit(step, rows.numpy())) is None:
            if not self._writebacks or not (self._transfers.stream_ordered or self._may_wait):
                return False
            self._order_writeback()
            # More may be missing now: rows of the step itself that were on their way out.
            self._make_room(self._directory.keep(step, rows.numpy()))
        fetched, slots = admission
        self._used[step] = self._directory.slots(rows.numpy())
        self._fetches[step] = slots, self._transfers.fetch(torch.from_numpy(fetched), torch.from_numpy(slots))
        return True

    def acquire(self, step: int, rows: Tensor) -> Tensor:
        """See `RowStore.acquire`. The caller has made sure that the rows fit into the window."""
        while not self.prefetch(step, rows):
            if not self._writebacks:
                raise RuntimeError(f"no slot can become free for step {step}, with no write-back under way")
            self._order_writeback()
        slots, fetch = self._fetches.pop(step)
        with self.traffic.waiting():
            fetch.order()
        self._directory.fetched(slots)
        # Counted for the step that uses the rows, not for the earlier one during which they travelled.
        self.traffic.requested += len(rows)
        self.traffic.fetched += len(slots)
        used = self._used[step]
        # A resurrected row may still be on its way to host memory: it must not change under that copy.
        while self._directory.being_written(used):
            self._order_writeback()
        if self._landing and (last := int(self._last_landing[used].max(initial=0))) in self._landing:
            self._landing[last].order()
        return self._places.put(used)

    def finish(self, step: int, rows: Tensor, *, updated: bool) -> None:
        """See `RowStore.finish`."""
        used = self._used.pop(step)
        self._directory.finish(step, used if updated else used[:0])
        if not self._may_wait:
            # Room for a step like the last one is made now, so that its fetch need not wait for a write-back.
            self._make_room(self._wanted_free)

    def read(self, rows: Tensor) -> Tensor:
        """See `RowStore.read`."""
        self._land_writebacks()
        records = self._host.records_RW.index_select(0, rows)
        self._shard.fill(records, rows)
        records = records.to(self.records.device)
        slots = self._directory.slots(rows.numpy())
        held = np.flatnonzero(slots >= 0)
        # Rows on their way in are equal in both places, but may not have landed in the slot yet.
        held = held[~np.isin(slots[held], self._slots_in_flight())]
        if len(held):
            places, slots_held = (torch.from_numpy(part).to(self.records.device) for part in (held, slots[held]))
            records.index_copy_(0, places, self.records.index_select(0, slots_held))
        return records

    def in_host_memory(self, rows: Tensor) -> Tensor:
        """See `RowStore.in_host_memory`."""
        return torch.from_numpy(self._directory.slots(rows.numpy()) < 0)

    def flush(self) -> Tensor:
        """See `RowStore.flush`."""
        while self._writebacks:
            self._order_writeback()
        self._land_writebacks()
        dirty = np.flatnonzero(self._directory.dirty)
        rows = torch.from_numpy(self._directory.rows(dirty))
        self._transfers.write_back(torch.from_numpy(dirty), rows).wait()
        self._directory.cleaned(dirty)
        return self._host.records_RW

    def load(self, rows: Tensor, records_UW: Tensor) -> None:
        """See `RowStore.load`."""
        self._host.records_RW[rows] = records_UW

    def close(self) -> None:
        """See `RowStore.close`."""
        self._transfers.close()
        self._host.close()

    def _slots_in_flight(self) -> np.ndarray:
        flights = [slots for slots, _ in self._fetches.values()]
        return np.concatenate(flights) if flights else np.empty(0, np.int64)

    def _make_room(self, wanted: int) -> None:
        self._wanted_free = wanted
        coming = sum(len(slots) for slots, _ in self._writebacks)
        shortage = wanted - self._directory.num_free - coming
        if shortage <= 0:
            return
        slots = self._directory.evict(shortage)
        if len(slots):
            rows = torch.from_numpy(self._directory.rows(slots))
            self._writebacks.append((slots, self._transfers.write_back(torch.from_numpy(slots), rows)))
            self.traffic.written_back += len(slots)

    def _collect_writebacks(self) -> None:
        """Takes note of what has landed; never waits."""
        while self._landing and self._landing[first := next(iter(self._landing))].done():
            del self._landing[first]
        while self._writebacks and self._writebacks[0][1].done():
            self._order_writeback()

    def _order_writeback(self) -> None:
        """Has fetches come after the oldest write-back, so that they may use its slots and rows as if it had landed."""
        slots, copy = self._writebacks.popleft()
        with self.traffic.waiting():
            copy.order_fetches()
        self._directory.written(slots)
        if self._transfers.stream_ordered:
            self._num_ordered += 1
            self._landing[self._num_ordered] = copy
            self._last_landing[slots] = self._num_ordered

    def _land_writebacks(self) -> None:
        """The host is about to read memory itself."""
        for copy in self._landing.values():
            copy.wait()
        self._landing.clear()
