"""The window, whose coming steps are decided on by the training loop or by a thread beside it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from offload import opening
from offload.config import OffloadConfig
from offload.window.store import WindowStore
from tests.grid import grid
from tests.offload.tables_job import open_tables, run_job
from tests.offload.test_tables import JOB, TABLES, TINY, save_and_resume
from tests.offload.window.stores import open_window

BY_WHOM = pytest.mark.parametrize("beside", [False, True], ids=["inline", "beside"])


@pytest.mark.parametrize(("engine", "depth"), grid(["cpu", "staged", "zero_copy", "mixed"], [2, 4, 1, 0]))
def test_a_thread_beside_the_loop_gives_the_bits_of_the_resident_shard(
    engine: str, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "_DECIDING_BESIDE", ("cpu",))
    for name in ("adam-exact", "rmsprop-exact-bf16-both"):
        resident = run_job(JOB, TABLES[name].model_copy(update={"mode": "resident"}))
        for rows in (TINY, 1000):
            config = TABLES[name].model_copy(update={"engine": engine, "depth": depth, "window_rows": rows})
            outcome = run_job(JOB, config)
            assert outcome.digest == resident.digest, (name, rows)
            assert outcome.written_back > 0 or rows > TINY, "no row went to the host: the test would prove nothing"


def test_a_run_with_a_thread_beside_it_continues_bitwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "_DECIDING_BESIDE", ("cpu",))
    config = TABLES["adam-exact"].model_copy(update={"depth": 2, "window_rows": TINY})
    straight = run_job(JOB, config)
    losses, rows = save_and_resume(JOB, config, 6)
    assert (losses, rows) == (straight.losses[6:], straight.rows)


@contextmanager
def window(rows: int, *, beside: bool) -> Iterator[WindowStore]:
    store = open_window(OffloadConfig(window_rows=rows), beside=beside)
    try:
        yield store
    finally:
        store.close()


@contextmanager
def busy_thread(store: WindowStore) -> Iterator[threading.Event]:
    """The thread beside the loop does nothing inside; whoever waits for it goes on after a while, with the event."""
    gave_up = threading.Event()
    timer = threading.Timer(10, gave_up.set)
    timer.start()
    store._ask(lambda: gave_up.wait() and None)  # type: ignore[func-returns-value]
    try:
        yield gave_up
    finally:
        timer.cancel()
        gave_up.set()


def rows(*places: int) -> Tensor:
    return torch.tensor(places, dtype=torch.int64)


def settled(store: WindowStore) -> list[int]:
    """The admitted steps, when all that was asked for is decided."""
    store.in_host_memory(rows())
    return list(store._admissions.admitted)


def test_the_loop_waits_for_the_step_that_it_holds_and_for_nothing_else() -> None:
    with window(10, beside=True) as store:
        store.prepare(0, rows(0, 1, 2))
        store.prepare(1, rows(2, 3))
        store.hold(0)
        assert settled(store) == [0, 1]
        with busy_thread(store) as gave_up:
            store.release(0, updated=True)
            store.prepare(2, rows(5, 6))
            places = store.hold(1)
            store.release(1, updated=False)
            store.prepare(3, rows(7))
            assert not gave_up.is_set(), "the loop waited for what others need"
        assert len(places) == 2
        assert settled(store) == [2, 3]


def test_traffic_is_told_while_the_thread_is_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "_DECIDING_BESIDE", ("cpu",))
    opened = open_tables(JOB, OffloadConfig())
    try:
        with busy_thread(opened._shard.store) as gave_up:  # type: ignore[arg-type]
            opened.take_traffic()
            assert not gave_up.is_set(), "the loop waited for the thread"
    finally:
        opened.close()


@BY_WHOM
def test_a_step_without_room_waits_for_a_release_and_later_ones_wait_behind_it(beside: bool) -> None:
    with window(4, beside=beside) as store:
        store.prepare(0, rows(0, 1, 2))
        store.records[store.hold(0)] = 1.0
        store.prepare(1, rows(2, 3, 4))
        store.prepare(2, rows(2))  # is there
        assert settled(store) == [0]
        store.release(0, updated=True)
        assert len(store.hold(1)) == 3
        assert 2 in settled(store)
        store.release(1, updated=False)
        store.hold(2)
        assert store.traffic.written_back == 1
        assert torch.equal(store.read(rows(0, 1, 2)), torch.ones(3, store.records.shape[1]))


@BY_WHOM
def test_rows_that_can_never_fit_are_told_when_they_are_needed(beside: bool) -> None:
    with window(4, beside=beside) as store:
        store.prepare(0, rows(0, 1, 2, 3, 4))
        with pytest.raises(RuntimeError, match="no slot can become free for step 0"):
            store.hold(0)


@BY_WHOM
def test_the_room_of_a_step_is_made_by_its_release_in_the_loop_and_by_the_next_step_on_a_thread(beside: bool) -> None:
    """The loop must not have to wait for the write-backs; a thread may, and then knows who had better stay."""
    with window(4, beside=beside) as store:
        store.prepare(0, rows(0, 1, 2))
        store.hold(0)
        store.release(0, updated=True)
        settled(store)
        assert store.traffic.written_back == (0 if beside else 2)
        store.prepare(1, rows(0, 1, 2, 3))
        store.hold(1)
        assert store.traffic.written_back == (0 if beside else 2)
        assert store.traffic.drawn == 4 or not beside


def test_a_row_is_a_hit_or_drawn_until_its_first_update_and_fetched_after_it() -> None:
    def used(step: int, *places: int, updated: bool = True) -> tuple[int, int, int]:
        before = replace(store.traffic)
        store.prepare(step, rows(*places))
        store.hold(step)
        store.release(step, updated=updated)
        settled(store)
        new = store.traffic.since(before)
        return new.hits, new.drawn, new.fetched

    with window(4, beside=True) as store:
        assert used(0, 0, 1, updated=False) == (0, 2, 0)
        assert used(1, 0, 1, 2, 3, updated=False) == (2, 2, 0)
        assert used(2, 4, 5, 6, 7) == (0, 4, 0)  # all others have left, as they were
        assert used(3, 0, 1, 4, 5) == (2, 2, 0)
        assert used(4, 6, 7, 8, 9) == (0, 2, 2)
        assert store.update_counts()[:11].tolist() == [1, 1, 0, 0, 2, 2, 2, 2, 1, 1, 0]


def test_what_goes_wrong_beside_the_loop_is_raised_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with window(4, beside=True) as store:
        store.prepare(3, rows(0))
        store.hold(3)
        store.prepare(1, rows(1))
        with pytest.raises(RuntimeError, match="step 1 was admitted after step 3"):
            store.hold(1)
    with window(4, beside=True) as store:
        store.prepare(0, rows(0))
        store.hold(0)
        store.release(5, updated=False)
        with pytest.raises(KeyError, match="5"):
            store.read(rows(0))
