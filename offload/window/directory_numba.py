"""The directory's work for each row, compiled: the same answers as `Directory`'s, without the GIL.

The GIL matters: a thread decides on coming steps while the training loop gives the GPU its work, thousands of calls per
step, and the loop waits for as long as the thread holds the GIL.
"""

import numpy as np

from kernels.numba_intrinsics import compiled
from offload.window.directory import NEVER, Directory, Rows, Slots, SlotState

_FREE, _FETCHING, _RESIDENT, _WRITEBACK = (int(state) for state in SlotState)


class CompiledDirectory(Directory):
    """See `Directory`."""

    def slots(self, rows: Rows) -> Slots:
        """See `Directory.slots`."""
        slots = np.empty(len(rows), np.int64)
        _look_up(self._slot_of, rows, slots)
        return slots

    def keep(self, step: int, rows: Rows) -> int:
        """See `Directory.keep`."""
        return int(_keep(self._slot_of, self._last_use, rows, step))

    def being_written(self, slots: Slots) -> bool:
        """See `Directory.being_written`."""
        return bool(_raised(self._writes, slots))

    def fetched(self, slots: Slots) -> None:
        """See `Directory.fetched`."""
        if _others(self.state, slots, _FETCHING):
            super().fetched(slots)  # says what is wrong
        _set(self.state, slots, _RESIDENT)

    def finish(self, step: int, updated: Slots) -> None:
        """See `Directory.finish`."""
        wrong = bool(_others(self.state, updated, _RESIDENT)) or self.being_written(updated)
        super().finish(step, updated if wrong else updated[:0])  # says what is wrong
        _set(self.dirty, updated, True)

    def written(self, slots: Slots) -> None:
        """See `Directory.written`."""
        self._num_free = _written(slots, *self._arrays(), self._num_free)

    def _place(self, rows: Rows, used: Slots, step: int) -> tuple[Rows, Slots]:
        missing = int((used == NEVER).sum())
        fetched, taken = np.empty(missing, np.int64), np.empty(missing, np.int64)
        first = self._num_free - missing
        _place(rows, used, step, self._free[first : self._num_free], *self._arrays(), self._last_use, fetched, taken)
        self._num_free = first
        return fetched, taken

    def _idle(self, step: int, used: Slots) -> Slots:
        idle = np.empty(len(used), np.int64)
        return idle[: _idle(step, used, self._last_use, self.state, idle)]

    def _let_go(self, chosen: Slots) -> Slots:
        dirty = np.empty(len(chosen), np.int64)
        count, self._num_free = _let_go(chosen, *self._arrays(), self.dirty, self._num_free, dirty)
        return dirty[:count]

    def _arrays(self) -> tuple[np.ndarray, ...]:
        return self._slot_of, self._row_of, self.state, self._writes, self._free


@compiled
def _look_up(slot_of, rows, slots):  # type: ignore[no-untyped-def]
    for index in range(len(rows)):
        slots[index] = slot_of[rows[index]]


@compiled
def _keep(slot_of, last_use, rows, step):  # type: ignore[no-untyped-def]
    missing = 0
    for index in range(len(rows)):
        slot = slot_of[rows[index]]
        if slot == NEVER:
            missing += 1
        elif last_use[slot] < step:
            last_use[slot] = step
    return missing


@compiled
def _raised(flags, slots):  # type: ignore[no-untyped-def]
    count = 0
    for index in range(len(slots)):
        count += flags[slots[index]] != 0
    return count


@compiled
def _others(state, slots, wanted):  # type: ignore[no-untyped-def]
    count = 0
    for index in range(len(slots)):
        count += state[slots[index]] != wanted
    return count


@compiled
def _set(values, slots, value):  # type: ignore[no-untyped-def]
    for index in range(len(slots)):
        values[slots[index]] = value


@compiled
def _place(rows, used, step, free, slot_of, row_of, state, writes, all_free, last_use, fetched, taken):  # type: ignore[no-untyped-def]
    count = 0
    for index in range(len(rows)):
        slot = used[index]
        if slot == NEVER:
            slot = free[count]
            fetched[count] = rows[index]
            taken[count] = slot
            count += 1
            slot_of[rows[index]] = slot
            row_of[slot] = rows[index]
            state[slot] = _FETCHING
            used[index] = slot
        elif state[slot] == _WRITEBACK:
            state[slot] = _RESIDENT
        if last_use[slot] < step:
            last_use[slot] = step


@compiled
def _idle(step, used, last_use, state, idle):  # type: ignore[no-untyped-def]
    count = 0
    for index in range(len(used)):
        slot = used[index]
        if last_use[slot] == step and state[slot] == _RESIDENT:
            idle[count] = slot
            count += 1
    return count


@compiled
def _let_go(chosen, slot_of, row_of, state, writes, free, is_dirty, num_free, dirty):  # type: ignore[no-untyped-def]
    count = 0
    for index in range(len(chosen)):
        slot = chosen[index]
        if is_dirty[slot]:
            is_dirty[slot] = False
            writes[slot] += 1
            dirty[count] = slot
            count += 1
        if writes[slot] > 0:
            state[slot] = _WRITEBACK
        else:
            num_free = _release(slot, slot_of, row_of, state, free, num_free)
    return count, num_free


@compiled
def _written(slots, slot_of, row_of, state, writes, free, num_free):  # type: ignore[no-untyped-def]
    for index in range(len(slots)):
        slot = slots[index]
        writes[slot] -= 1
        if state[slot] == _WRITEBACK and writes[slot] == 0:
            num_free = _release(slot, slot_of, row_of, state, free, num_free)
    return num_free


@compiled
def _release(slot, slot_of, row_of, state, free, num_free):  # type: ignore[no-untyped-def]
    slot_of[row_of[slot]] = NEVER
    row_of[slot] = NEVER
    state[slot] = _FREE
    free[num_free] = slot
    return num_free + 1
