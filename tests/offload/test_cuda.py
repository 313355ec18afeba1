"""The window on a real GPU: every engine has the bits of the resident shard, and the loop never waits."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from kernels.gather import gather
from offload.config import OffloadConfig
from offload.tables import EngramTables
from offload.window.store import WindowStore
from tests.offload.tables_job import Job, open_tables, run_job
from tests.offload.test_tables import JOB, TABLES, TINY, save_and_resume

pytestmark = pytest.mark.gpu

ENGINES = ("zero_copy", "staged", "mixed", "auto")
GPU_JOB = dataclasses.replace(JOB, device="cuda:0")
LONG_JOB = Job(steps=30, device="cuda:0")


def window(engine: str, depth: int, rows: int = TINY, tables: str = "adam-exact") -> OffloadConfig:
    return TABLES[tables].model_copy(update={"engine": engine, "depth": depth, "window_rows": rows})


@pytest.mark.parametrize("tables", ["adam-exact", "adam-lazy-bf16-exchange", "rmsprop-exact-bf16-both"])
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_depth_and_window_has_the_bits_of_the_resident_shard(engine: str, tables: str) -> None:
    resident = run_job(GPU_JOB, TABLES[tables].model_copy(update={"mode": "resident"}))
    for depth in (0, 1, 2, 4):
        for rows in (TINY, 1000):
            outcome = run_job(GPU_JOB, window(engine, depth, rows, tables))
            assert outcome.digest == resident.digest, (depth, rows)
            assert outcome.written_back > 0 or rows > TINY, "no row went to the host: the test would prove nothing"


@pytest.mark.parametrize("engine", ["zero_copy", "staged", "mixed"])
def test_every_answer_of_the_window_is_that_of_the_shadow(engine: str) -> None:
    config = window(engine, 2)
    assert run_job(GPU_JOB, config.model_copy(update={"verify": True})).digest == run_job(GPU_JOB, config).digest


@pytest.mark.parametrize("depth", [0, 2])
def test_a_device_that_plans_gives_the_bits_of_a_cpu_that_does(depth: int) -> None:
    config = window("zero_copy", depth)
    planned = config.model_copy(update={"planner": "device"})
    assert run_job(GPU_JOB, planned).digest == run_job(GPU_JOB, config).digest
    assert run_job(GPU_JOB, planned.model_copy(update={"verify": True})).digest == run_job(GPU_JOB, config).digest


@pytest.mark.parametrize("engine", ["zero_copy", "staged", "mixed"])
def test_resuming_from_saved_rows_continues_bitwise(engine: str) -> None:
    straight = run_job(GPU_JOB, window(engine, 2))
    losses, rows = save_and_resume(GPU_JOB, window(engine, 2), 6)
    assert losses == straight.losses[6:]
    assert rows == straight.rows


def test_auto_takes_one_of_the_gpus_engines() -> None:
    tables = open_tables(GPU_JOB, window("auto", 1))
    store = tables._shard.store
    assert isinstance(store, WindowStore)
    assert store._transfers.name in ("zero_copy", "staged")
    tables.close()


@contextmanager
def syncs_are_errors() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def step(tables: EngramTables, job: Job, number: int) -> None:
    """A training step that looks at nothing."""
    begun = tables.begin(number)
    for place in range(len(begun.batches)):
        parts = [(gather(leaf, index) ** 2).sum() for leaf, index in begun.rows.of(place)]
        torch.stack(parts).sum().backward()
    begun.reduce()
    begun.apply(lr=0.01)


@pytest.mark.parametrize("tables", ["adam-exact", "rmsprop-exact-bf16-both"])
@pytest.mark.parametrize("engine", ["zero_copy", "staged", "resident"])
def test_the_loop_waits_for_nothing_and_takes_no_new_memory(engine: str, tables: str) -> None:
    config = TABLES[tables].model_copy(update={"mode": "resident"})
    opened = open_tables(LONG_JOB, config if engine == "resident" else window(engine, 2, TINY, tables))
    try:
        for number in range(10):  # kernels are compiled, and torch's own memory grows to its size
            step(opened, LONG_JOB, number)
        torch.cuda.synchronize()
        before = torch.cuda.memory_reserved(), _pinned_blocks()
        with syncs_are_errors():
            for number in range(10, 30):
                step(opened, LONG_JOB, number)
        reserved, blocks = before
        assert torch.cuda.memory_reserved() == reserved
        # One a size of which more were in use at a time than ever before; a step takes dozens.
        assert _pinned_blocks() <= blocks + 2
    finally:
        opened.close()


def _pinned_blocks() -> int:
    """Blocks of pinned memory that torch ever asked the driver for."""
    return torch.cuda.host_memory_stats()["num_host_alloc"]


def test_a_write_back_waits_for_a_late_update_and_a_fetch_for_the_write_back() -> None:
    """A device that is busy for long between the steps: what the host gave it meanwhile must keep its order."""
    resident = run_job(LONG_JOB, TABLES["adam-exact"].model_copy(update={"mode": "resident"}))
    tables = open_tables(LONG_JOB, window("zero_copy", 2))
    try:
        for number in range(LONG_JOB.steps):
            begun = tables.begin(number)
            for place in range(len(begun.batches)):
                loss = sum(
                    ((gather(leaf, index) + 0.1 * (module + 1)) ** 2).sum()
                    for module, (leaf, index) in enumerate(begun.rows.of(place))
                )
                (loss / 10).backward()
            begun.reduce()
            torch.cuda._sleep(3_000_000)
            begun.apply(lr=LONG_JOB.learning_rates[number % 3], gradient_scale=0.5)
        found = {}
        for ids, records in tables.updated_rows():
            found.update(zip(ids.tolist(), records.view(torch.int32).tolist(), strict=True))
    finally:
        tables.close()
    assert found == resident.rows
