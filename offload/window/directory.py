"""Which row is in which slot, and what may happen to it: pure logic, without any weights.

    HOST -> FETCHING -> RESIDENT -> WRITEBACK -> HOST        WRITEBACK -> RESIDENT (resurrected, no copy)

A row without a slot is in state HOST, and host memory is its authority; a row with a slot has the slot as its only
authority. A fetch is issued only from HOST, and a write-back only for a row that no admitted step needs; so fetches
and write-backs never touch the same row, and both may be under way at any time, at any depth of look-ahead.
"""

from collections import deque
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]
Slots = NDArray[np.int64]

NEVER = -1


class SlotState(IntEnum):
    """What a slot holds."""

    FREE = 0
    FETCHING = 1
    RESIDENT = 2
    WRITEBACK = 3


class Directory:
    """The states of a shard's rows and of a window's slots.

    Steps are admitted in ascending order and finished in the same order. Every method costs a constant amount of
    work for each row it names (amortised for `evict`), whatever the size of the window.

    Args:
        num_rows: rows of the shard.
        num_slots: slots of the window.
    """

    def __init__(self, num_rows: int, num_slots: int) -> None:
        self.state = np.full(num_slots, SlotState.FREE, np.uint8)
        self.dirty = np.zeros(num_slots, bool)
        self._slot_of = np.full(num_rows, NEVER, np.int32)
        self._row_of = np.full(num_slots, NEVER, np.int64)
        # The latest step that needs the row, admitted yet or not: it is not evicted before that one is finished.
        self._last_use = np.full(num_slots, NEVER, np.int64)
        self._writes = np.zeros(num_slots, np.uint8)  # copies to host memory that are under way
        self._free = np.arange(num_slots - 1, -1, -1)
        self._num_free = num_slots
        # What each admitted step used, the earliest first: the order of eviction, so that nothing is searched for.
        self._uses: deque[tuple[int, Slots]] = deque()
        self._num_uses = 0
        self._admitted = self._finished = NEVER

    @property
    def num_free(self) -> int:
        """Slots that a fetch may take now."""
        return self._num_free

    def slots(self, rows: Rows) -> Slots:
        """The slot of each row, or -1 where host memory is the authority."""
        return self._slot_of[rows].astype(np.int64)

    def rows(self, slots: Slots) -> Rows:
        """The row in each slot."""
        return self._row_of[slots]

    def keep(self, step: int, rows: Rows) -> int:
        """Holds those of the rows that have a slot until `step` is finished, admitted yet or not.

        Returns:
            how many of the rows have none.
        """
        held = self._slot_of[rows]
        held = held[held != NEVER]
        self._last_use[held] = np.maximum(self._last_use[held], step)
        return len(rows) - len(held)

    def admit(self, step: int, rows: Rows) -> tuple[Rows, Slots] | None:
        """Gives every row of the step a slot, held until the step is finished.

        Returns the rows to fetch (they were in HOST) and the slots to fetch them into, now in FETCHING; or None, with
        the rows held but nothing else changed, if too few slots are free. Rows under write-back are resurrected.

        Raises:
            RuntimeError: if steps are not admitted one after another.
        """
        if step <= self._admitted:
            raise RuntimeError(f"step {step} was admitted after step {self._admitted}")
        used = self.slots(rows)
        if np.count_nonzero(used == NEVER) > self._num_free:
            self.keep(step, rows)
            return None
        self._admitted = step
        fetched, taken = self._place(rows, used, step)
        self._record_use(step, used)
        return fetched, taken

    def fetched(self, slots: Slots) -> None:
        """The copies into these slots have landed: FETCHING -> RESIDENT."""
        self._require(slots, SlotState.FETCHING)
        self.state[slots] = SlotState.RESIDENT

    def finish(self, step: int, updated: Slots) -> None:
        """The step no longer needs its rows; the rows in `updated` differ from host memory now."""
        self._require(updated, SlotState.RESIDENT)
        if self.being_written(updated):
            raise RuntimeError(f"step {step} updated rows that were still being copied to host memory")
        if not self._finished < step <= self._admitted:
            raise RuntimeError(f"step {step} finished after {self._finished}, with {self._admitted} admitted")
        self._finished = step
        self.dirty[updated] = True

    def evict(self, count: int) -> Slots:
        """Takes up to `count` rows that no step needs out of the window, least recently used first.

        Clean rows go back to HOST at once, or when an earlier copy of them has landed. Dirty rows enter WRITEBACK:
        their slots are returned, to be copied to host memory and then passed to `written`.
        """
        victims: list[Slots] = []
        # A finished step's rows that nobody has used since are the least recently used of all. Those used again are
        # also in the entry of that later step, so each entry is gone through once, and no row is searched for.
        while count > 0 and self._uses and self._uses[0][0] <= self._finished:
            step, used = self._uses.popleft()
            self._num_uses -= len(used)
            idle = self._idle(step, used)
            victims.append(idle[:count])
            count -= len(victims[-1])
            # Rows not taken are still the least recently used: they stay in front, for the next call.
            if len(idle) > len(victims[-1]):
                self._uses.appendleft((step, idle[len(victims[-1]) :]))
                self._num_uses += len(idle) - len(victims[-1])
        return self._let_go(np.concatenate(victims) if victims else np.empty(0, np.int64))

    def written(self, slots: Slots) -> None:
        """The copies of these slots to host memory have landed: WRITEBACK -> HOST, unless resurrected meanwhile."""
        self._writes[slots] -= 1
        self._release(slots[(self.state[slots] == SlotState.WRITEBACK) & (self._writes[slots] == 0)])

    def being_written(self, slots: Slots) -> bool:
        """Whether a copy of any of these slots to host memory is still under way: then none may be updated yet."""
        return bool(self._writes[slots].any())

    def cleaned(self, slots: Slots) -> None:
        """Host memory equals these resident slots again, which stay where they are (a checkpoint's flush)."""
        self._require(slots, SlotState.RESIDENT)
        self.dirty[slots] = False

    def _place(self, rows: Rows, used: Slots, step: int) -> tuple[Rows, Slots]:
        """Gives slots to those of the rows that have none, and writes them into `used`; returns rows and slots."""
        absent = used == NEVER
        fetched = rows[absent]
        taken = self._free[self._num_free - len(fetched) : self._num_free].copy()
        self._num_free -= len(fetched)
        self._slot_of[fetched] = taken
        self._row_of[taken] = fetched
        self.state[taken] = SlotState.FETCHING
        used[absent] = taken
        self._last_use[used] = np.maximum(self._last_use[used], step)
        self.state[used[self.state[used] == SlotState.WRITEBACK]] = SlotState.RESIDENT
        return fetched, taken

    def _idle(self, step: int, used: Slots) -> Slots:
        """Those of a finished step's slots that no later one needs."""
        return used[(self._last_use[used] == step) & (self.state[used] == SlotState.RESIDENT)]

    def _let_go(self, chosen: Slots) -> Slots:
        """Takes idle rows out of the window; returns the slots of those that are to be copied first."""
        dirty = chosen[self.dirty[chosen]]
        self.dirty[dirty] = False
        self._writes[dirty] += 1
        # A row that was resurrected and then left as it was is clean, but its earlier copy may still be under way.
        leaving = chosen[self._writes[chosen] > 0]
        self.state[leaving] = SlotState.WRITEBACK
        self._release(chosen[self.state[chosen] == SlotState.RESIDENT])
        return dirty

    def _record_use(self, step: int, used: Slots) -> None:
        self._uses.append((step, used))
        self._num_uses += len(used)
        # Rows used again leave their older entries behind: without this, a window that never evicts fills with them.
        if self._num_uses > 2 * len(self.state) + len(used):
            last_uses = [(step, slots[self._last_use[slots] == step]) for step, slots in self._uses]
            self._uses = deque((step, slots) for step, slots in last_uses if len(slots))
            self._num_uses = sum(len(slots) for _, slots in self._uses)

    def _release(self, slots: Slots) -> None:
        self._slot_of[self._row_of[slots]] = NEVER
        self._row_of[slots] = NEVER
        self.state[slots] = SlotState.FREE
        self._free[self._num_free : self._num_free + len(slots)] = slots
        self._num_free += len(slots)

    def _require(self, slots: Slots, state: SlotState) -> None:
        wrong = slots[self.state[slots] != state]
        if len(wrong):
            found = SlotState(self.state[wrong[0]]).name
            raise RuntimeError(f"row {self._row_of[wrong[0]]} is in {found}, not in {state.name}")
