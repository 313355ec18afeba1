"""A window whose coming steps are decided on by a thread of its own."""

import threading

import pytest
import torch
from torch import Tensor

from offload import tables
from offload.background_store import BackgroundStore
from offload.store import Traffic
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


class Store:
    """Notes what it is asked, and by whom; has room for one more step, when it may go on."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, bool]] = []
        self.may_go_on = threading.Event()
        self.traffic = Traffic()
        self.records = torch.zeros(2, 2)
        self._loop = threading.get_ident()

    def _note(self, what: str) -> None:
        self.asked.append((what, threading.get_ident() == self._loop))

    def prefetch(self, step: int, rows: Tensor) -> bool:
        assert self.may_go_on.wait(10)
        self._note(f"prefetch {step}")
        self.traffic.waited_s += 100.0
        if step == 9:
            raise ValueError("no such step")
        return step < 2

    def acquire(self, step: int, rows: Tensor) -> Tensor:
        self._note(f"acquire {step}")
        return rows

    def close(self) -> None:
        self._note("close")


def test_the_loop_goes_on_until_it_needs_an_answer() -> None:
    store = Store()
    beside = BackgroundStore(store)  # type: ignore[arg-type]
    for step in (1, 2, 3):
        assert beside.prefetch(step, ROWS)
    assert store.asked == []
    store.may_go_on.set()
    assert torch.equal(beside.acquire(0, ROWS), ROWS)
    # Step 2 found no room, so step 3 was not tried; it is when it is asked for again.
    assert store.asked == [("prefetch 1", False), ("prefetch 2", False), ("acquire 0", True)]
    assert beside.traffic.waited_s < 50, "what the thread waited for is not the loop's"
    beside.prefetch(3, ROWS)
    beside.acquire(1, ROWS)
    assert store.asked[3:] == [("prefetch 3", False), ("acquire 1", True)]
    beside.prefetch(9, ROWS)
    with pytest.raises(ValueError, match="no such step"):
        beside.acquire(2, ROWS)
    beside.close()
    assert store.asked[-1] == ("close", True)
