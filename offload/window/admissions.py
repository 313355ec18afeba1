"""Which slots the rows of coming steps get, and which rows leave the window for them."""

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from offload.device.sender import Sender, Sent
from offload.transfers.copies import Copy
from offload.transfers.engine import Transfers
from offload.window.directory import NEVER, Directory, Rows, Slots
from offload.window.interface import Traffic, nobody
from offload.window.update_counts import UpdateCounts
from offload.window.writebacks import WriteBacks


@dataclass
class Admission:
    """A step whose rows have slots, which they keep until it is released.

    Attributes:
        rows: all of its rows.
        used: their slots, in the same order.
        fetched: the slots that are filled for it.
        stored: how many of them from host memory; the others' records are drawn.
        fetch: what fills them.
        slots: `used`, sent to the device.
        after: the last copy of any of its rows to host memory, after which they may change; None if it has landed.
        landed: whether the slots count as filled.
    """

    rows: Rows
    used: Slots
    fetched: Slots
    stored: int
    fetch: Copy
    slots: Sent
    after: Copy | None = None
    landed: bool = False


class Admissions:
    """The steps that are prepared, admitted, and not released yet.

    Deciding takes the host tens of milliseconds for a step of half a million rows. Where the training loop does it
    itself, it never waits for write-backs on behalf of a step that it does not need yet; a thread beside the loop may
    wait. Either way one decision is made after another, in the order in which the loop asks for them.

    Args:
        directory: which row is in which slot.
        counts: of the rows' updates.
        transfers: between host memory and the slots.
        device: of the window.
        traffic: is told what leaves the window, and how long the loop waits here.
        beside: whether a thread beside the loop decides.
    """

    def __init__(
        self,
        directory: Directory,
        counts: UpdateCounts,
        transfers: Transfers,
        device: torch.device,
        traffic: Traffic,
        *,
        beside: bool,
    ) -> None:
        self._directory, self._counts, self._transfers = directory, counts, transfers
        self._sender, self._traffic, self._beside = Sender(device), traffic, beside
        self._waiting: deque[tuple[int, Rows]] = deque()
        self.admitted: dict[int, Admission] = {}
        self.writebacks = WriteBacks(len(directory.state))
        self.before_change: Callable[[Tensor], object] = nobody
        """See `RowStore.before_change`."""

    def prepare(self, step: int, rows: Rows) -> None:
        """Admits the step as soon as there is room, and steps before it are admitted."""
        self._waiting.append((step, rows))
        self.admit_waiting()

    def admit_waiting(self, needed: int = NEVER) -> None:
        """Admits steps in their order for as long as there is room; for those up to `needed`, waits for it."""
        while self._waiting:
            step, rows = self._waiting[0]
            # Where write-backs are ordered by streams, or a thread decides, nobody minds waiting.
            wait = step <= needed or self._beside or self._transfers.stream_ordered
            admission = self._place(step, rows, wait=wait)
            if admission is None:
                return
            self._waiting.popleft()
            self.admitted[step] = self._fetch(rows, *admission)

    def slots_in_flight(self) -> Slots:
        """Those whose fetch may not have landed."""
        flights = [admitted.fetched for admitted in self.admitted.values() if not admitted.landed]
        return np.concatenate(flights) if flights else np.empty(0, np.int64)

    def write_all_back(self) -> None:
        """Waits until host memory has every row's record."""
        while self.writebacks:
            self._order_writeback()
        self.writebacks.land()
        dirty = np.flatnonzero(self._directory.dirty)
        rows = torch.from_numpy(self._directory.rows(dirty))
        self._transfers.write_back(torch.from_numpy(dirty), rows).wait()
        self._directory.cleaned(dirty)

    def _place(self, step: int, rows: Rows, *, wait: bool) -> tuple[Rows, Slots] | None:
        """`Directory.admit`, once there is room."""
        while self.writebacks.oldest_landed():
            self._order_writeback()
        while not self._has_room(step, rows):
            if not (wait and self.writebacks):
                return None
            self._order_writeback()
        return self._directory.admit(step, rows)

    def _has_room(self, step: int, rows: Rows) -> bool:
        """Whether as many slots are free as the step's rows miss, after room was made."""
        missing = self._directory.keep(step, rows)
        self._make_room(missing)
        return missing <= self._directory.num_free

    def _fetch(self, rows: Rows, fetched: Rows, slots: Slots) -> Admission:
        # A row without a slot has all its updates counted: it had the slot until they were released.
        fetched, slots, stored = self._counts.updated_first(fetched, slots)
        fetch = self._transfers.fetch(torch.from_numpy(fetched), torch.from_numpy(slots), stored)
        used = self._directory.slots(rows)
        admitted = Admission(rows, used, slots, stored, fetch, self._sender.send(torch.from_numpy(used)))
        if self._beside:
            self.settle(admitted)
        return admitted

    def settle(self, admitted: Admission) -> None:
        """Ensures that the step's rows may change, after `admitted.after`."""
        # A resurrected row may still be on its way to host memory: it must not change under that copy.
        while self._directory.being_written(admitted.used):
            self._order_writeback()
        # Rows of an admitted step are not evicted, so there can be no later copy to wait for.
        admitted.after = self.writebacks.last_of(admitted.used)

    def land(self, admitted: Admission) -> None:
        """The step's fetch has landed, or comes before whatever is done from now on."""
        self._directory.fetched(admitted.fetched)
        admitted.landed = True

    def release(self, step: int, updated: bool) -> None:
        """The step's rows may leave; those that were `updated` differ from host memory's."""
        last = self.admitted[max(self.admitted)]
        released = self.admitted.pop(step)
        self._directory.finish(step, released.used if updated else released.used[:0])
        if updated:
            self._counts.add(released.rows)
        if self._waiting:
            self.admit_waiting()
        elif not self._beside:
            # Room for a step like the last one is made now, so that its fetch need not wait for a write-back. A thread
            # waits for the step itself, whose rows should not be among those that leave.
            self._make_room(len(last.fetched))

    def _make_room(self, wanted: int) -> None:
        """Evicts until `wanted` slots are free, or will be when write-backs have landed."""
        shortage = wanted - self._directory.num_free - self.writebacks.num_slots
        if shortage <= 0:
            return
        slots = self._directory.evict(shortage)
        if len(slots):
            rows = torch.from_numpy(self._directory.rows(slots))
            with self._waiting_of_the_loop():
                self.before_change(rows)
            self.writebacks.begin(slots, self._transfers.write_back(torch.from_numpy(slots), rows))
            self._traffic.written_back += len(slots)

    def _order_writeback(self) -> None:
        """Gives the oldest write-back's slots and rows to coming fetches as if it had landed."""
        with self._waiting_of_the_loop():
            slots = self.writebacks.order()
        self._directory.written(slots)

    def _waiting_of_the_loop(self) -> AbstractContextManager[None]:
        # What a thread beside the loop waits for is not the loop's.
        return nullcontext() if self._beside else self._traffic.waiting()
