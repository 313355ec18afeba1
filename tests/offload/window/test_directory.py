"""The row states under random ids, tiny windows and random completion orders of transfers."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from offload.window.directory import Directory, SlotState
from offload.window.directory_numba import CompiledDirectory

NUM_ROWS = 12


def rows_of(*rows: int) -> np.ndarray:
    return np.array(rows, np.int64)


class Life(RuleBasedStateMachine):
    """Drives a directory as the window does, beside a plain model: a value for each host row and each slot."""

    kind = Directory

    @initialize(num_slots=st.integers(1, 9))
    def start(self, num_slots: int) -> None:
        self.directory = self.kind(NUM_ROWS, num_slots)
        self.num_slots = num_slots
        self.host = [0] * NUM_ROWS
        self.slots = [None] * num_slots
        self.truth = [0] * NUM_ROWS
        self.fetches: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.writes: list[tuple[np.ndarray, list[tuple[int, int]]]] = []
        self.steps: list[tuple[int, np.ndarray]] = []
        self.next_step = 0

    @rule(rows=st.sets(st.integers(0, NUM_ROWS - 1)))
    def admit(self, rows: set[int]) -> None:
        wanted = rows_of(*sorted(rows))
        free = self.directory.num_free
        admission = self.directory.admit(self.next_step, wanted)
        if admission is None:
            assert (self.directory.slots(wanted) < 0).sum() > free
            return
        fetched, slots = admission
        in_flight = {row for landing, _ in self.fetches.values() for row in landing.tolist()}
        writing = {row for _, copies in self.writes for row, _ in copies}
        assert not in_flight & set(fetched.tolist()), "a fetch of a row in flight"
        # A resurrected row has a slot: only rows whose write-back has landed may be fetched.
        assert not writing & set(fetched.tolist()), "a fetch of a row in write-back"
        assert all(self.slots[slot] is None for slot in slots.tolist()), "a slot was reused while it held a row"
        for slot in slots.tolist():
            self.slots[slot] = "arriving"
        self.fetches[self.next_step] = fetched, slots
        self.steps.append((self.next_step, wanted))
        self.next_step += 1

    @precondition(lambda self: self.fetches)
    @rule(data=st.data())
    def land_fetch(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(sorted(self.fetches)))
        rows, slots = self.fetches.pop(step)
        for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
            self.slots[slot] = self.host[row]
        self.directory.fetched(slots)

    @precondition(lambda self: self.writes)
    @rule(data=st.data())
    def land_write(self, data: st.DataObject) -> None:
        slots, copies = self.writes.pop(data.draw(st.integers(0, len(self.writes) - 1)))
        for row, value in copies:
            self.host[row] = value
        self.directory.written(slots)
        self.forget_free_slots()

    @precondition(lambda self: self.steps and not self.pending())
    @rule(updated=st.booleans())
    def finish(self, updated: bool) -> None:
        step, rows = self.steps[0]
        slots = self.directory.slots(rows)
        for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
            assert self.slots[slot] == self.truth[row], "a step saw a stale row"
        if updated and self.directory.being_written(slots):
            with pytest.raises(RuntimeError, match="still being copied"):
                self.directory.finish(step, slots)
            return
        self.steps.pop(0)
        self.directory.finish(step, slots if updated else slots[:0])
        if updated:
            for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
                self.truth[row] += 1
                self.slots[slot] = self.truth[row]

    @rule(count=st.integers(0, 5))
    def evict(self, count: int) -> None:
        needed = {row for _, rows in self.steps for row in rows.tolist()}
        slots = self.directory.evict(count)
        rows = self.directory.rows(slots).tolist()
        assert not needed & set(rows), "a row that a coming step needs was evicted"
        values = [(row, self.slots[slot]) for row, slot in zip(rows, slots.tolist(), strict=True)]
        if len(slots):
            self.writes.append((slots, values))
        self.forget_free_slots()

    def pending(self) -> bool:
        return self.steps[0][0] in self.fetches

    def forget_free_slots(self) -> None:
        for slot in np.flatnonzero(self.directory.state == SlotState.FREE):
            self.slots[slot] = None

    @invariant()
    def one_authority(self) -> None:
        if not hasattr(self, "directory"):
            return
        slots = self.directory.slots(np.arange(NUM_ROWS))
        held = slots[slots >= 0]
        assert len(set(held.tolist())) == len(held), "two rows share a slot"
        assert (self.directory.rows(held) == np.flatnonzero(slots >= 0)).all()
        assert self.directory.num_free == self.num_slots - len(held)
        for row, slot in enumerate(slots.tolist()):
            if slot < 0:
                assert self.host[row] == self.truth[row], "host memory is the authority but is behind"
            elif self.directory.state[slot] in (SlotState.RESIDENT, SlotState.WRITEBACK):
                assert self.slots[slot] == self.truth[row], "the slot is the authority but is behind"

    @invariant()
    def admitted_rows_are_held(self) -> None:
        for _, rows in getattr(self, "steps", []):
            slots = self.directory.slots(rows)
            assert (slots >= 0).all()
            assert (self.directory.state[slots] != SlotState.WRITEBACK).all()


class CompiledLife(Life):
    kind = CompiledDirectory


for life in (Life, CompiledLife):
    life.TestCase.settings = settings(max_examples=80, stateful_step_count=40)
TestLife = Life.TestCase
TestCompiledLife = CompiledLife.TestCase


@pytest.fixture(params=[Directory, CompiledDirectory])
def make(request: pytest.FixtureRequest) -> type[Directory]:
    return request.param


def admitted(directory: Directory, step: int, *rows: int) -> np.ndarray:
    admission = directory.admit(step, rows_of(*rows))
    assert admission is not None
    fetched, slots = admission
    directory.fetched(slots)
    return fetched


def test_the_longest_unused_rows_leave_first_and_hot_rows_stay(make: type[Directory]) -> None:
    directory = make(100, 4)
    admitted(directory, 0, 1, 2)
    directory.finish(0, directory.slots(rows_of()))
    admitted(directory, 1, 1, 3)
    directory.finish(1, directory.slots(rows_of()))
    admitted(directory, 2, 4)
    directory.finish(2, directory.slots(rows_of()))
    directory.evict(2)
    assert (directory.slots(rows_of(1, 2, 3, 4)) >= 0).tolist() in (
        [False, False, True, True],
        [True, False, False, True],
    )
    assert admitted(directory, 3, 4).size == 0


def test_rows_of_a_step_that_found_no_room_are_not_evicted(make: type[Directory]) -> None:
    directory = make(100, 2)
    admitted(directory, 0, 1, 2)
    directory.finish(0, directory.slots(rows_of()))
    assert directory.admit(1, rows_of(2, 3, 4)) is None
    directory.evict(2)
    assert (directory.slots(rows_of(1, 2)) >= 0).tolist() == [False, True]


def test_a_row_evicted_again_before_its_first_copy_was_collected_keeps_its_slot(make: type[Directory]) -> None:
    directory = make(10, 1)
    admitted(directory, 0, 5)
    directory.finish(0, directory.slots(rows_of(5)))
    first = directory.evict(1)
    assert directory.admit(1, rows_of(5)) is not None
    assert directory.being_written(directory.slots(rows_of(5)))
    with pytest.raises(RuntimeError, match="still being copied"):
        directory.finish(1, directory.slots(rows_of(5)))
    directory.written(first)
    directory.finish(1, directory.slots(rows_of(5)))
    assert directory.evict(1).tolist() == first.tolist()


def test_a_resurrected_row_that_no_update_touched_leaves_only_when_its_copy_has_landed(make: type[Directory]) -> None:
    directory = make(10, 2)
    admitted(directory, 0, 5)
    directory.finish(0, directory.slots(rows_of(5)))
    copied = directory.evict(1)
    assert directory.admit(1, rows_of(5)) is not None
    directory.finish(1, rows_of())
    assert directory.evict(1).size == 0, "copied twice"
    assert directory.slots(rows_of(5))[0] >= 0, "host memory became the authority before the copy had landed"
    directory.written(copied)
    assert directory.slots(rows_of(5))[0] < 0


def test_steps_must_come_in_order(make: type[Directory]) -> None:
    directory = make(10, 4)
    admitted(directory, 3, 1)
    with pytest.raises(RuntimeError, match="admitted after step 3"):
        directory.admit(3, rows_of(2))
    with pytest.raises(RuntimeError, match="finished after"):
        directory.finish(4, rows_of())
    directory.finish(3, rows_of())
    with pytest.raises(RuntimeError, match="finished after 3"):
        directory.finish(3, rows_of())


def test_an_empty_shard_and_an_empty_step_work(make: type[Directory]) -> None:
    directory = make(0, 0)
    assert directory.admit(0, rows_of()) is not None
    directory.finish(0, rows_of())
    assert directory.evict(3).size == 0


def test_a_window_that_never_evicts_does_not_grow(make: type[Directory]) -> None:
    directory = make(100, 50)
    for step in range(500):
        admitted(directory, step, *range(step % 3, 40))
        directory.finish(step, directory.slots(rows_of()))
        assert sum(len(slots) for _, slots in directory._uses) <= 3 * 50
    assert directory.evict(40).size == 0
    assert directory.num_free == 50
