"""Rows that are read while steps go on are those of the moment of the freeze, bit for bit."""

import itertools
import threading
import time
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from offload import opening
from offload.config import OffloadConfig
from offload.plan.sharding import Sharding
from offload.rows import snapshot
from offload.rows.records import RecordLayout, RowInit
from offload.rows.shard import Shard
from offload.tables import EngramTables
from tests.offload.delays import random_delays
from tests.offload.tables_job import Job, open_tables, train_step
from tests.offload.test_tables import TABLES, TINY

FROZEN = 4
"""Steps that are done when the rows are frozen."""
JOB = Job(steps=16, skipped=(2, FROZEN, 9), evaluate=True)
STORES = {
    "resident": {"mode": "resident"},
    "tiny-0": {"window_rows": TINY, "depth": 0},
    "tiny-2": {"window_rows": TINY, "depth": 2},
    "tiny-2-staged": {"window_rows": TINY, "depth": 2, "engine": "staged"},
    "all-2": {"depth": 2},
}
Pieces = list[tuple[list[int], list[list[int]]]]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "_PART_ROWS", 16)


def bits(pieces: Iterable[tuple[Tensor, Tensor]]) -> Pieces:
    return [(ids.tolist(), records.view(torch.int32).tolist()) for ids, records in pieces]


def train(tables: EngramTables, steps: range) -> None:
    for step in steps:
        train_step(tables, JOB, step)


def saved_at_once(config: OffloadConfig, steps: int, *, since: int = 0) -> Pieces:
    """What a run that stands still gives after some steps."""
    tables = open_tables(JOB, config)
    train(tables, range(steps))
    found = bits(tables.updated_rows(300, since=since))
    tables.close()
    return found


@pytest.mark.parametrize("beside", [False, True], ids=["inline", "beside"])
@pytest.mark.parametrize("store", STORES)
def test_rows_that_change_while_they_are_read_are_those_of_the_freeze(
    store: str, beside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few pieces are read after each step; copies of records are slow, and torn in two."""
    if beside:
        monkeypatch.setattr(opening, "_DECIDING_BESIDE", ("cpu",))
    for seed, name in enumerate(("adam-exact", "rmsprop-exact-bf16-both")):
        config = TABLES[name].model_copy(update=STORES[store])
        with random_delays(seed):
            tables = open_tables(JOB, config)
            train(tables, range(FROZEN))
            frozen = tables.freeze(undo_bytes=1 << 20)
            reading, found, held = frozen.pieces(300), [], 0
            for step in range(FROZEN, JOB.steps):
                train_step(tables, JOB, step)
                held = max(held, frozen._held_bytes)
                found += bits(itertools.islice(reading, 2))
            assert held > 0 or store == "all-2", "nothing changed before it was read: the test would prove nothing"
            found += bits(reading)
            assert frozen._held_bytes == 0
            frozen.close()
            tables.close()
        assert found == saved_at_once(config, FROZEN)


@pytest.mark.parametrize("store", STORES)
def test_rows_updated_since_are_those_with_a_later_version(store: str) -> None:
    config = TABLES["adam-exact"].model_copy(update=STORES[store])
    earlier = FROZEN - 1  # updates of as many steps, of which one was skipped
    expected = saved_at_once(config, FROZEN + 4, since=earlier)
    every = saved_at_once(config, FROZEN + 4)
    versions = {row: record[-1] for ids, records in every for row, record in zip(ids, records, strict=True)}
    assert sorted(row for ids, _ in expected for row in ids) == [row for row in sorted(versions) if versions[row] > 3]
    assert 0 < sum(len(ids) for ids, _ in expected) < len(versions)
    tables = open_tables(JOB, config)
    train(tables, range(FROZEN + 4))
    frozen = tables.freeze(since=earlier, undo_bytes=1 << 20)
    train(tables, range(FROZEN + 4, JOB.steps))
    assert bits(frozen.pieces(300)) == expected
    tables.close()


@pytest.mark.parametrize("store", [name for name in STORES if name != "all-2"])
@pytest.mark.parametrize("records", [0, 3, 20])
def test_steps_wait_when_the_log_is_full_and_go_on_when_rows_are_read(store: str, records: int) -> None:
    config = TABLES["adam-exact"].model_copy(update=STORES[store])
    tables = open_tables(JOB, config)
    train(tables, range(FROZEN))
    limit = records * tables.record_bytes
    frozen, held, found = tables.freeze(undo_bytes=limit), [], []

    def read() -> None:
        for piece in frozen.pieces(100):
            held.append(frozen._held_bytes)
            found.extend(bits([piece]))
            time.sleep(0.002)

    trainer = threading.Thread(target=train, args=(tables, range(FROZEN, JOB.steps)))
    trainer.start()
    trainer.join(0.2)
    assert trainer.is_alive(), "no step waited: the test would prove nothing"
    read()
    trainer.join()
    tables.close()
    assert max(held) <= limit
    merged = [row for ids, _ in found for row in ids]
    assert merged == [row for ids, _ in saved_at_once(config, FROZEN) for row in ids]


def test_nobody_waits_for_rows_of_a_snapshot_that_was_closed() -> None:
    config = TABLES["adam-exact"].model_copy(update=STORES["tiny-2"])
    tables = open_tables(JOB, config)
    train(tables, range(FROZEN))
    frozen = tables.freeze(undo_bytes=0)
    trainer = threading.Thread(target=train, args=(tables, range(FROZEN, JOB.steps)))
    trainer.start()
    trainer.join(0.2)
    assert trainer.is_alive()
    frozen.close()
    trainer.join()
    # The next one begins with what is there now.
    again = bits(tables.freeze(undo_bytes=0).pieces(300))
    tables.close()
    assert again == saved_at_once(config, JOB.steps)


def test_what_was_preserved_first_counts() -> None:
    """A row may leave the window again while its first copy to host memory is under way: it is torn then."""
    layout = RecordLayout(2, 0)
    records = torch.arange(12.0).view(4, 3).clone()
    layout.version(records)[:] = 1
    before = records.clone()
    frozen = snapshot.Snapshot(records, Shard(Sharding((4,), 1), 0, layout, RowInit(0, 0.1)), last=1, undo_bytes=1000)
    frozen.preserve(torch.tensor([2, 1]))
    records[1:3, 0] = 77.0
    frozen.preserve(torch.tensor([1, 3]))
    records[1:] = 88.0
    layout.version(records)[1:] = 2
    frozen.preserve(torch.tensor([1, 2, 3]))
    assert frozen._held_bytes == 4 * layout.bytes, "what is of a later step needs no copy"
    ((ids, found),) = frozen.pieces(1000)
    assert ids.tolist() == [0, 1, 2, 3]
    records[:] = 99.0
    assert torch.equal(found.view(torch.int32), before.view(torch.int32)), "what was read is a copy"
