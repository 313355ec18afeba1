"""A shard in host memory, seen through a window of slots on the device."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ParamSpec

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from offload.config import OffloadConfig
from offload.device.sender import Sender, Sent
from offload.device.workers import InlineWorker, background_worker
from offload.host.memory import zeros_on
from offload.host.table import HostTable
from offload.plan.sharding import Sharding
from offload.rows.records import RecordLayout, RowInit
from offload.rows.shard import Shard
from offload.transfers.copies import Copy
from offload.transfers.open import open_transfers, pins
from offload.window.directory import NEVER, Rows, Slots
from offload.window.interface import Traffic, nobody
from offload.window.open import open_directory
from offload.window.update_counts import UpdateCounts
from offload.window.writebacks import WriteBacks

P = ParamSpec("P")


@dataclass
class _Admission:
    """A step whose rows have slots, which they keep until it is released.

    Attributes:
        rows: all of its rows.
        used: their slots, in the same order.
        fetched: the slots that are filled for it.
        stored: how many of them from host memory; the others' records are drawn.
        fetch: what fills them.
        places: the same, sent to the device.
        after: the last copy of any of its rows to host memory, behind which they may change; None if it has landed.
        landed: whether the slots count as filled.
    """

    rows: Rows
    used: Slots
    fetched: Slots
    stored: int
    fetch: Copy
    places: Sent
    after: Copy | None = None
    landed: bool = False


class WindowStore:
    """A shard in host memory, and a window of slots that holds the rows of the steps at hand.

    Which slots the rows of a step get, and who leaves for them, takes the host tens of milliseconds for a step of half
    a million rows. Where the training loop decides that itself, it never waits for write-backs on behalf of a step that
    it does not need yet. Beside the loop, a thread decides, which may wait, while the loop gives the device its work.
    Either way one decision is made after another, in the order in which the loop asks for them; the loop itself
    touches nothing but the step that it holds, or waits until all is decided.

    Args:
        config: offload settings.
        sharding, rank: which rows the shard holds.
        layout, init: of the records.
        device: of the window.
        beside: decides on a thread. Copies that it asks for are ordered behind what the device's default stream was
            given by then, which is at least what it was given when the loop asked.
        group: the ranks, with communication in host memory, which agree on an engine; None for all.
        tell: is told what takes long meanwhile.

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
        beside: bool = False,
        group: dist.ProcessGroup | None = None,
        tell: Callable[[str], None] = lambda text: None,
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
            beside=num_rows,  # a byte a row for the counts
        )
        self.records = zeros_on(device, num_slots, layout.stride(device))[:, : layout.words]
        self._directory = open_directory(num_rows, num_slots)
        self._counts = UpdateCounts(num_rows, device)
        self._shard = Shard(sharding, rank, layout, init)
        try:
            self._transfers = open_transfers(config, self._host, self.records, self._shard, group=group, tell=tell)
        except BaseException:
            self._host.close()
            raise
        self._sender = Sender(device)
        self.traffic = Traffic()
        self.before_change: Callable[[Tensor], object] = nobody
        # Of the loop.
        self._prepared: dict[int, Future[None]] = {}
        self._asked: deque[Future[None]] = deque()
        # Of who decides.
        self._beside = beside
        self._decider = background_worker("engram-window", device) if beside else InlineWorker()
        self._waiting: deque[tuple[int, Rows]] = deque()
        self._admitted: dict[int, _Admission] = {}
        self._writebacks = WriteBacks(num_slots)

    def prepare(self, step: int, rows: Tensor) -> None:
        """See `RowStore.prepare`."""
        self._prepared[step] = self._ask(self._prepare, step, rows.numpy())

    def hold(self, step: int) -> Tensor:
        """See `RowStore.hold`. The caller has made sure that the rows fit into the window.

        Raises:
            RuntimeError: they do not, or a step before is not released.
        """
        self._await(self._prepared.pop(step))
        if step not in self._admitted:
            # There was no room. Now the steps before are released, or will be when it is this one's turn.
            self._await(self._ask(self._admit_waiting, step))
        if step not in self._admitted:
            raise RuntimeError(f"no slot can become free for step {step}, with no write-back under way")
        admitted = self._admitted[step]
        if not self._beside:
            self._settle(admitted)
        with self.traffic.waiting():
            admitted.fetch.order()
        if admitted.after is not None:
            admitted.after.order()
        self._ask(self._land, admitted)
        # Counted for the step that uses the rows, not for the earlier one during which they travelled.
        self.traffic.requested += len(admitted.used)
        self.traffic.fetched += admitted.stored
        self.traffic.drawn += len(admitted.fetched) - admitted.stored
        (places_O,) = admitted.places.take()
        return places_O

    def release(self, step: int, *, updated: bool) -> None:
        """See `RowStore.release`."""
        self._ask(self._release, step, updated)

    def read(self, rows: Tensor) -> Tensor:
        """See `RowStore.read`."""
        self._await_all()
        self._writebacks.land()
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
        self._await_all()
        return torch.from_numpy(self._directory.slots(rows.numpy()) < 0)

    def flush(self) -> Tensor:
        """See `RowStore.flush`."""
        self._await_all()
        while self._writebacks:
            self._order_writeback()
        self._writebacks.land()
        dirty = np.flatnonzero(self._directory.dirty)
        rows = torch.from_numpy(self._directory.rows(dirty))
        self._transfers.write_back(torch.from_numpy(dirty), rows).wait()
        self._directory.cleaned(dirty)
        return self._host.records_RW

    def update_counts(self) -> Tensor:
        """See `RowStore.update_counts`."""
        self._await_all()
        return self._counts.counts_R

    def load(self, rows: Tensor, records_UW: Tensor, counts_U: Tensor) -> None:
        """See `RowStore.load`."""
        self._await_all()
        self._host.records_RW[rows] = records_UW
        self._counts.counts_R[rows] = counts_U

    def close(self) -> None:
        """See `RowStore.close`."""
        self._decider.shutdown()
        self._transfers.close()
        self._host.close()

    def _ask(self, decide: Callable[P, None], /, *args: P.args, **keywords: P.kwargs) -> Future[None]:
        """Has something decided behind all that was asked before; raises what has gone wrong with that."""
        while self._asked and self._asked[0].done():
            self._asked.popleft().result()
        self._asked.append(asked := self._decider.submit(decide, *args, **keywords))
        return asked

    def _await(self, asked: Future[None]) -> None:
        with self.traffic.waiting():
            asked.result()

    def _await_all(self) -> None:
        """Then nobody is at work on the window."""
        while self._asked:
            self._await(self._asked.popleft())

    def _slots_in_flight(self) -> Slots:
        flights = [admitted.fetched for admitted in self._admitted.values() if not admitted.landed]
        return np.concatenate(flights) if flights else np.empty(0, np.int64)

    # What follows is done by who decides.

    def _prepare(self, step: int, rows: Rows) -> None:
        self._waiting.append((step, rows))
        self._admit_waiting()

    def _admit_waiting(self, needed: int = NEVER) -> None:
        """Admits steps in their order for as long as there is room; for those up to `needed`, waits for it."""
        while self._waiting:
            step, rows = self._waiting[0]
            # Where write-backs are ordered by streams, or a thread decides, nobody minds waiting.
            wait = step <= needed or self._beside or self._transfers.stream_ordered
            admission = self._place(step, rows, wait=wait)
            if admission is None:
                return
            self._waiting.popleft()
            self._admitted[step] = self._fetch(rows, *admission)

    def _place(self, step: int, rows: Rows, *, wait: bool) -> tuple[Rows, Slots] | None:
        """`Directory.admit`, after room was made."""
        while self._writebacks.oldest_landed():
            self._order_writeback()
        self._make_room(self._directory.keep(step, rows))
        while (admission := self._directory.admit(step, rows)) is None:
            if not (wait and self._writebacks):
                return None
            self._order_writeback()
            # More may be missing now: rows of the step itself that were on their way out.
            self._make_room(self._directory.keep(step, rows))
        return admission

    def _fetch(self, rows: Rows, fetched: Rows, slots: Slots) -> _Admission:
        # A row without a slot has all its updates counted: it had the slot until they were released.
        fetched, slots, stored = self._counts.updated_first(fetched, slots)
        fetch = self._transfers.fetch(torch.from_numpy(fetched), torch.from_numpy(slots), stored)
        used = self._directory.slots(rows)
        admitted = _Admission(rows, used, slots, stored, fetch, self._sender.send(torch.from_numpy(used)))
        if self._beside:
            self._settle(admitted)
        return admitted

    def _settle(self, admitted: _Admission) -> None:
        # A resurrected row may still be on its way to host memory: it must not change under that copy.
        while self._directory.being_written(admitted.used):
            self._order_writeback()
        # Rows of an admitted step are not evicted, so no later copy can have to be waited for.
        admitted.after = self._writebacks.last_of(admitted.used)

    def _land(self, admitted: _Admission) -> None:
        self._directory.fetched(admitted.fetched)
        admitted.landed = True

    def _release(self, step: int, updated: bool) -> None:
        last = self._admitted[max(self._admitted)]
        released = self._admitted.pop(step)
        self._directory.finish(step, released.used if updated else released.used[:0])
        if updated:
            self._counts.add(released.rows)
        if self._waiting:
            self._admit_waiting()
        elif not self._beside:
            # Room for a step like the last one is made now, so that its fetch need not wait for a write-back. A thread
            # waits for the step itself, whose rows should not be among those that leave.
            self._make_room(len(last.fetched))

    def _make_room(self, wanted: int) -> None:
        """Begins to evict until so many slots are free, or will be when write-backs have landed."""
        shortage = wanted - self._directory.num_free - self._writebacks.num_slots
        if shortage <= 0:
            return
        slots = self._directory.evict(shortage)
        if len(slots):
            rows = torch.from_numpy(self._directory.rows(slots))
            with self._waiting_of_the_loop():
                self.before_change(rows)
            self._writebacks.begin(slots, self._transfers.write_back(torch.from_numpy(slots), rows))
            self.traffic.written_back += len(slots)

    def _order_writeback(self) -> None:
        """The oldest write-back's slots and rows are coming fetches' as if it had landed."""
        with self._waiting_of_the_loop():
            slots = self._writebacks.order()
        self._directory.written(slots)

    def _waiting_of_the_loop(self) -> AbstractContextManager[None]:
        # What a thread beside the loop waits for is not the loop's.
        return nullcontext() if self._beside else self.traffic.waiting()
