"""A window whose coming steps are decided on by a thread of its own."""

import threading

import pytest
import torch
from torch import Tensor

from offload import tables
from offload.window.background import BackgroundStore
from offload.window.interface import Traffic
from tests.offload.tables_job import run_job
from tests.offload.test_tables import JOB, TABLES, TINY, save_and_resume

ROWS = torch.arange(3)


@pytest.mark.parametrize("depth", [0, 1, 2, 4])
@pytest.mark.parametrize("engine", ["cpu", "staged", "zero_copy"])
def test_the_bits_are_those_of_the_resident_shard(engine: str, depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_DECIDING_BESIDE", ("cpu",))
    for name in ("adam-exact", "rmsprop-exact-bf16-both"):
        resident = run_job(JOB, TABLES[name].model_copy(update={"mode": "resident"}))
        for rows in (TINY, 1000):
            config = TABLES[name].model_copy(update={"engine": engine, "depth": depth, "window_rows": rows})
            outcome = run_job(JOB, config)
            assert outcome.digest == resident.digest, (name, rows)
            assert outcome.written_back > 0 or rows > TINY, "no row went to the host: the test would prove nothing"


def test_a_run_continues_bitwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_DECIDING_BESIDE", ("cpu",))
    config = TABLES["adam-exact"].model_copy(update={"depth": 2, "window_rows": TINY})
    straight = run_job(JOB, config)
    losses, rows = save_and_resume(JOB, config, 6)
    assert (losses, rows) == (straight.losses[6:], straight.rows)


class Window:
    """Notes what it is asked, and by whom; has room for one more step, when it may go on."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, bool]] = []
        self.may_go_on = threading.Event()
        self.traffic = Traffic()
        self.records = torch.zeros(2, 2)
        self._loop = threading.get_ident()
        self._room = 2

    def _note(self, what: str) -> None:
        self.asked.append((what, threading.get_ident() == self._loop))

    def prefetch(self, step: int, rows: Tensor) -> bool:
        assert self.may_go_on.wait(10)
        self._note(f"prefetch {step}")
        if step == 9:
            raise ValueError("no such step")
        return step < self._room

    def acquire(self, step: int, rows: Tensor) -> Tensor:
        self._note(f"acquire {step}")
        return rows

    def hand_out(self, step: int) -> Tensor:
        self._note(f"hand out {step}")
        return ROWS

    def land(self, step: int) -> None:
        self._note(f"land {step}")

    def finish(self, step: int, rows: Tensor, *, updated: bool) -> None:
        self._note(f"finish {step}")
        self._room += 1
        if step == 7:
            raise ValueError("not begun")

    def read(self, rows: Tensor) -> Tensor:
        self._note("read")
        return rows

    def close(self) -> None:
        self._note("close")


def test_the_loop_goes_on_until_it_needs_an_answer() -> None:
    window = Window()
    beside = BackgroundStore(window)  # type: ignore[arg-type]
    for step in (0, 1, 2, 3):
        assert beside.prefetch(step, ROWS)
    beside.finish(8, ROWS, updated=True)
    assert window.asked == []
    window.may_go_on.set()
    assert torch.equal(beside.acquire(0, ROWS), ROWS)
    beside.read(ROWS)
    # Step 2 found no room, so step 3 was not tried.
    by_the_thread = ["prefetch 0", "prefetch 1", "prefetch 2", "finish 8", "land 0"]
    assert [what for what, by_loop in window.asked if not by_loop] == by_the_thread
    assert [what for what, by_loop in window.asked if by_loop] == ["hand out 0", "read"]
    beside.close()
    assert window.asked[-1] == ("close", True)


def test_a_step_without_room_is_tried_again_and_then_made_room_for_by_the_loop() -> None:
    window = Window()
    window.may_go_on.set()
    beside = BackgroundStore(window)  # type: ignore[arg-type]
    for step in (2, 3):
        beside.prefetch(step, ROWS)
    beside.finish(1, ROWS, updated=True)
    beside.acquire(2, ROWS)
    beside.acquire(3, ROWS)
    beside.close()
    # Of step 3 the thread says a second time that there is no room, without asking.
    by_the_thread = ["prefetch 2", "finish 1", "prefetch 2", "land 2", "prefetch 3"]
    assert [what for what, by_loop in window.asked if not by_loop] == by_the_thread
    assert [what for what, by_loop in window.asked if by_loop] == ["hand out 2", "acquire 3", "close"]


def test_what_goes_wrong_beside_the_loop_is_raised_in_it() -> None:
    window = Window()
    window.may_go_on.set()
    beside = BackgroundStore(window)  # type: ignore[arg-type]
    beside.prefetch(9, ROWS)
    with pytest.raises(ValueError, match="no such step"):
        beside.acquire(9, ROWS)
    beside.finish(7, ROWS, updated=True)
    with pytest.raises(ValueError, match="not begun"):
        beside.read(ROWS)
    beside.close()
