"""A shard in host memory, seen through a window of slots on the device."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from offload.config import OffloadConfig
from offload.device.sent import Sender, Sent
from offload.host.memory import zeros_on
from offload.host.table import HostTable
from offload.plan.sharding import Sharding
from offload.rows.records import RecordLayout, RowInit
from offload.rows.shard import Shard
from offload.transfers.copies import Copy
from offload.transfers.open import open_transfers, pins
from offload.window.directory_numba import open_directory
from offload.window.interface import Traffic


@dataclass
class _Admission:
    """A step whose rows have slots, which they keep until it is finished.

    Attributes:
        fetched: the slots that are filled for it.
        fetch: the copies into them.
        used: the slots of all its rows, in the rows' order.
        places: the same, sent to the device.
        after: the last copy of any of its rows to host memory, behind which they may change; None if it has landed.
        settled: whether `after` is known, and no other such copy can begin before the step is finished.
        landed: whether the slots count as filled.
    """

    fetched: np.ndarray
    fetch: Copy
    used: np.ndarray
    places: Sent
    after: Copy | None = None
    settled: bool = False
    landed: bool = False


class WindowStore:
    """A shard in host memory, and a window of slots that holds the rows of the steps at hand.

    Args:
        config: offload settings.
        sharding, rank: which rows the shard holds.
        layout, init: of the records.
        device: of the window.
        may_wait: a thread beside the training loop calls `prefetch`, which may wait for write-backs then; room for a
            step is made by its own prefetch, otherwise as soon as the step before is finished.

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
        self._directory = open_directory(num_rows, num_slots)
        self._shard = Shard(sharding, rank, layout, init)
        try:
            self._transfers = open_transfers(config, self._host, self.records, self._shard)
        except BaseException:
            self._host.close()
            raise
        self._sender = Sender(device)
        self._admitted: dict[int, _Admission] = {}
        self._writebacks: deque[tuple[np.ndarray, Copy]] = deque()
        # Copies to host memory that fetches were told to come after, by number; and each slot's last one.
        self._landing: dict[int, Copy] = {}
        self._last_landing = np.zeros(num_slots, np.int64)
        self._num_ordered = 0
        self._may_wait, self._wanted_free = may_wait, 0
        self.traffic = Traffic()

    def take_traffic(self) -> Traffic:
        """See `RowStore.take_traffic`."""
        return self.traffic.take()

    def prefetch(self, step: int, rows: Tensor) -> bool:
        """See `RowStore.prefetch`."""
        if step in self._admitted:
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
        fetch = self._transfers.fetch(torch.from_numpy(fetched), torch.from_numpy(slots))
        used = self._directory.slots(rows.numpy())
        admitted = _Admission(slots, fetch, used, self._sender.send(torch.from_numpy(used)))
        if self._may_wait:
            self._settle(admitted)
        self._admitted[step] = admitted
        return True

    def acquire(self, step: int, rows: Tensor) -> Tensor:
        """See `RowStore.acquire`. The caller has made sure that the rows fit into the window."""
        while not self.prefetch(step, rows):
            if not self._writebacks:
                raise RuntimeError(f"no slot can become free for step {step}, with no write-back under way")
            self._order_writeback()
        places_O = self.hand_out(step)
        self.land(step)
        return places_O

    def hand_out(self, step: int) -> Tensor:
        """The part of `acquire` that remains for a step whose rows were prefetched: no work for each row."""
        admitted = self._admitted[step]
        if not admitted.settled:
            self._settle(admitted)
        with self.traffic.waiting():
            admitted.fetch.order()
        if admitted.after is not None:
            admitted.after.order()
        # Counted for the step that uses the rows, not for the earlier one during which they travelled.
        self.traffic.requested += len(admitted.used)
        self.traffic.fetched += len(admitted.fetched)
        (places_O,) = admitted.places.take()
        return places_O

    def land(self, step: int) -> None:
        """Takes note that the rows of a step that was handed out are in their slots."""
        admitted = self._admitted[step]
        self._directory.fetched(admitted.fetched)
        admitted.landed = True

    def finish(self, step: int, rows: Tensor, *, updated: bool) -> None:
        """See `RowStore.finish`."""
        used = self._admitted.pop(step).used
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
        flights = [admitted.fetched for admitted in self._admitted.values() if not admitted.landed]
        return np.concatenate(flights) if flights else np.empty(0, np.int64)

    def _settle(self, admitted: _Admission) -> None:
        # A resurrected row may still be on its way to host memory: it must not change under that copy.
        while self._directory.being_written(admitted.used):
            self._order_writeback()
        if self._landing:
            # Rows of an admitted step are not evicted, so no later copy can have to be waited for.
            admitted.after = self._landing.get(int(self._last_landing[admitted.used].max(initial=0)))
        admitted.settled = True

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """What a thread beside the loop waits for is not the loop's."""
        if self._may_wait:
            yield
        else:
            with self.traffic.waiting():
                yield

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
        """Orders later fetches behind the oldest write-back: its slots and rows are theirs as if it had landed."""
        slots, copy = self._writebacks.popleft()
        with self._waiting():
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
