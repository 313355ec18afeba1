"""The life of a step: any depth and any window give the bits of tables that live wholly on the device."""

import dataclasses
import functools
import mmap
import time
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import offload.tables
from kernels.gather import gather
from kernels.records.row_init import initial_rows
from offload.config import LinkConfig, OffloadConfig, TableOptimizerConfig
from offload.errors import Unavailable
from offload.host import memory
from offload.optimizers import OPTIMIZERS as REGISTRY
from offload.tables import EngramTables
from offload.window import store
from tests.distributed import run_ranks
from tests.offload.tables_job import DIM, Addresses, Job, Outcome, open_tables, run_job, run_jobs, train_step

OPTIMIZERS = {
    "adam-exact": TableOptimizerConfig(untouched_rows="exact"),
    "adam-closed": TableOptimizerConfig(untouched_rows="closed"),
    "adam-lazy": TableOptimizerConfig(untouched_rows="lazy"),
    "adagrad": TableOptimizerConfig(type="rowwise_adagrad"),
    "rmsprop-exact": TableOptimizerConfig(type="rowwise_rmsprop", untouched_rows="exact"),
    "rmsprop-lazy": TableOptimizerConfig(type="rowwise_rmsprop", untouched_rows="lazy"),
    "sgd": TableOptimizerConfig(type="sgd"),
}
assert {each.type for each in OPTIMIZERS.values()} == REGISTRY.keys()
TABLES = {name: OffloadConfig(optimizer=optimizer) for name, optimizer in OPTIMIZERS.items()} | {
    "adam-exact-bf16": OffloadConfig(optimizer=OPTIMIZERS["adam-exact"], row_dtype="bf16"),
    "adam-lazy-bf16-exchange": OffloadConfig(optimizer=OPTIMIZERS["adam-lazy"], exchange_dtype="bf16"),
    "rmsprop-exact-bf16-both": OffloadConfig(
        optimizer=OPTIMIZERS["rmsprop-exact"], row_dtype="bf16", exchange_dtype="bf16"
    ),
    "adam-exact-bf16-state": OffloadConfig(optimizer=TableOptimizerConfig(state_dtype="bf16")),
    "adam-lazy-bf16-all": OffloadConfig(
        optimizer=TableOptimizerConfig(untouched_rows="lazy", state_dtype="bf16"), row_dtype="bf16"
    ),
    "sgd-bf16": OffloadConfig(optimizer=OPTIMIZERS["sgd"], row_dtype="bf16"),
}
TRAVELLING = ("adam-exact", "adam-exact-bf16", "adam-lazy-bf16-exchange", "rmsprop-exact-bf16-both")
"""Each kind of values that ranks send each other; optimizers differ in nothing that others see."""
JOB = Job(skipped=(3, 7), evaluate=True)
TINY, AMPLE = 64, 1000


def variants(config: OffloadConfig) -> list[OffloadConfig]:
    slow = LinkConfig(bytes_per_second=2e6, latency_s=0.002)
    changes = [
        {"mode": "resident"},
        *({"depth": depth, "window_rows": window} for depth in (0, 1, 4) for window in (TINY, AMPLE)),
        {"depth": 2, "window_rows": TINY, "emulate_link": slow},
    ]
    return [config.model_copy(update=change) for change in changes]


@functools.cache
def resident(name: str) -> Outcome:
    return run_job(JOB, variants(TABLES[name])[0])


def test_every_setting_has_an_effect() -> None:
    assert len({resident(name).digest for name in TABLES}) == len(TABLES)


@pytest.mark.parametrize(
    ("name", "places"),
    [("adam-exact", range(8))]
    + [(name, (0, 1, 2, 5)) for name in TABLES if name != "adam-exact"]
    + [pytest.param(name, range(8), marks=pytest.mark.long) for name in TABLES if name != "adam-exact"],
)
def test_one_rank_has_the_same_bits_at_any_depth_and_window(name: str, places: Sequence[int]) -> None:
    """In the variants at these places."""
    every = variants(TABLES[name])
    outcomes = [resident(name), *(run_job(JOB, every[place]) for place in places[1:])]
    assert len({outcome.digest for outcome in outcomes}) == 1
    tiny, ample = outcomes[1], outcomes[2]
    assert tiny.fetched > ample.fetched, "the tiny window never ran full: the test would prove nothing"
    assert tiny.written_back > ample.written_back
    assert outcomes[0].fetched == 0


@pytest.mark.parametrize("names", [TRAVELLING, pytest.param((*TABLES,), marks=pytest.mark.long)], ids=len)
def test_two_ranks_have_the_same_bits_at_any_depth_and_window(names: Sequence[str]) -> None:
    # All of one kind, and the deepest in a tiny window: the rest differ in nothing that ranks tell each other.
    kinds = {name: variants(TABLES[name])[:: 1 if name == "adam-exact" else 5] for name in names}
    by_rank = run_ranks(run_jobs, 2, [(JOB, config) for configs in kinds.values() for config in configs])
    for outcomes in by_rank:
        digests = iter([outcome.digest for outcome in outcomes])
        found = {name: {next(digests) for _ in configs} for name, configs in kinds.items()}
        assert {name: len(seen) for name, seen in found.items()} == dict.fromkeys(names, 1)
        assert len(set.union(*found.values())) == len(names), "two kinds of tables are alike: a setting has no effect"
    assert by_rank[0][0].norms == by_rank[1][0].norms
    assert not set(by_rank[0][0].rows) & set(by_rank[1][0].rows), "a row has two owners"


def first_rows(config: OffloadConfig) -> dict[int, list[float]]:
    """The rows of module 0 that this rank's first step looks up, by row id."""
    # No look-ahead: ranks that close while they plan would wait for each other.
    tables = open_tables(dataclasses.replace(JOB, steps=1), config)
    try:
        ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        step = tables.begin(0)
        assert all(map(torch.equal, step.batches[0], JOB.batches(0, *ranks)[0]))
        seen = {}
        for place, (tokens, positions) in enumerate(step.batches):
            leaf, index = step.rows.of(place)[0]
            values = gather(leaf.detach(), index)
            seen.update(zip(Addresses().rows(0, tokens, positions).flatten().tolist(), values.tolist(), strict=True))
        return seen
    finally:
        tables.close()


def test_values_that_travel_in_bf16_are_rounded_alike_at_any_number_of_ranks() -> None:
    config = OffloadConfig(exchange_dtype="bf16")
    alone = first_rows(config)
    drawn = initial_rows(torch.tensor(list(alone)), DIM, seed=JOB.seed, std=0.02)
    assert torch.equal(torch.tensor(list(alone.values())), drawn.to(torch.bfloat16).float())
    together = run_ranks(first_rows, 2, config)
    assert together[0] | together[1] == alone


def close_late_on_rank_0() -> None:
    """Closes between two steps. Rank 1 is by then making the plan of a coming step; rank 0's thread is still busy."""
    tables = open_tables(JOB, OffloadConfig(depth=2, window_rows=64))
    if dist.get_rank() == 0:
        tables._planner._thread.submit(time.sleep, 0.5)
    tables._planner.request(0)
    if dist.get_rank() == 1:
        while tables._planner._thread._work_queue.qsize():
            time.sleep(0.01)
    tables.close()


def test_ranks_that_close_with_a_plan_under_way_wait_for_each_other_and_end() -> None:
    run_ranks(close_late_on_rank_0, 2, timeout_s=60)


def test_four_ranks_with_uneven_shards_agree_with_one_up_to_rounding() -> None:
    config = OffloadConfig(depth=2, window_rows=64, optimizer=OPTIMIZERS["adam-exact"])
    job = dataclasses.replace(JOB, evaluate=False, micro_batch=1)
    alone = run_job(job, config)
    together = run_ranks(run_job, 4, job, config)
    merged = {row: record for outcome in together for row, record in outcome.rows.items()}
    assert set(merged) == set(alone.rows)
    as_floats = [
        torch.tensor([rows[row] for row in sorted(rows)], dtype=torch.int32).view(torch.float32)[:, :DIM]
        for rows in (merged, alone.rows)
    ]
    torch.testing.assert_close(*as_floats, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        torch.tensor([outcome.losses for outcome in together]).sum(0), torch.tensor(alone.losses), rtol=1e-5, atol=0
    )
    assert together[0].norms == pytest.approx(alone.norms, rel=1e-4)


def test_exact_adam_equals_dense_adam_over_a_whole_table() -> None:
    job = dataclasses.replace(JOB, evaluate=False)
    outcome = run_job(job, OffloadConfig(depth=1, window_rows=TINY, optimizer=OPTIMIZERS["adam-exact"]))
    addresses = Addresses()
    bases = (0, addresses.num_rows(0))
    tables = [
        initial_rows(torch.arange(addresses.num_rows(m)) + bases[m], DIM, seed=job.seed, std=0.02).requires_grad_()
        for m in range(2)
    ]
    optimizer = torch.optim.Adam(tables, betas=(0.9, 0.95), fused=True)
    losses = []
    for step in range(job.steps):
        total = 0.0
        for tokens, positions in job.batches(step, 0, 1):
            rows = [addresses.rows(m, tokens, positions).flatten() for m in range(2)]
            loss = sum(((tables[m][rows[m]] + 0.1 * (m + 1)) ** 2).sum() for m in range(2))
            (loss / 10).backward()
            total += float(loss.detach())
        losses.append(total)
        if step not in job.skipped:
            for table in tables:
                table.grad *= 0.5
            optimizer.param_groups[0]["lr"] = 5 * job.learning_rates[step % 3]
            optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(outcome.losses), rtol=1e-5, atol=0)


def test_a_skipped_step_leaves_no_trace() -> None:
    config = OffloadConfig(depth=2, window_rows=TINY, optimizer=OPTIMIZERS["adam-exact"])
    job = Job(steps=6)
    skipping = dataclasses.replace(job, skipped=(5,))
    assert run_job(skipping, config).rows == run_job(job, config, stop=5).rows


def test_a_module_that_got_no_gradient_is_updated_with_zeros() -> None:
    tables = open_tables(Job(), OffloadConfig())
    try:
        step = tables.begin(0)
        gather(*step.rows.of(0)[0]).sum().backward()
        assert float(step.reduce()) > 0
        step.apply(lr=0.1)
    finally:
        tables.close()


def test_a_step_that_was_neither_applied_nor_skipped_blocks_the_next_and_none_is_left_out() -> None:
    tables = open_tables(Job(), OffloadConfig())
    try:
        step = tables.begin(0)
        with pytest.raises(RuntimeError, match="before step 0 was applied"):
            tables.begin(1)
        with pytest.raises(RuntimeError, match="not reduced"):
            step.apply(lr=0.1)
        step.skip()
        with pytest.raises(RuntimeError, match="step 0 was applied or skipped"):
            step.skip()
        with pytest.raises(RuntimeError, match="step 2 does not follow step 0"):
            tables.begin(2)
        tables.begin(1).skip()
    finally:
        tables.close()


def check_small_window(job: Job, config: OffloadConfig) -> str:
    tables = open_tables(job, config)
    try:
        tables.check_window(0)
    except ValueError as error:
        return str(error)
    finally:
        tables.close()
    return "accepted"


def test_a_window_too_small_for_one_step_is_refused_by_all_ranks_with_the_sizes() -> None:
    assert check_small_window(Job(), OffloadConfig(window_rows=TINY)) == "accepted"
    messages = run_ranks(check_small_window, 2, Job(), OffloadConfig(window_rows=3))
    assert messages[0] == messages[1]
    assert "step 1 alone needs" in messages[0]
    assert "the window has 3 slots; set offload.window_rows=" in messages[0]


def save_and_resume(job: Job, config: OffloadConfig, stop: int) -> tuple[list[float], dict]:
    tables = open_tables(job, config)
    for step in range(stop):
        train_step(tables, job, step)
    rows, state = list(tables.updated_rows()), tables.optimizer_state()
    tables.close()
    resumed = open_tables(job, config)
    resumed.load_optimizer_state(state)
    for ids, records in rows:
        resumed.load_rows(ids, records)
    losses = [train_step(resumed, job, step)[0] for step in range(stop, job.steps)]
    final = {}
    for ids, records in resumed.updated_rows():
        final.update(zip(ids.tolist(), records.view(torch.int32).tolist(), strict=True))
    resumed.close()
    return losses, final


@pytest.mark.parametrize("name", TABLES)
def test_resuming_from_saved_rows_continues_bitwise(name: str) -> None:
    config = TABLES[name].model_copy(update={"depth": 2, "window_rows": TINY})
    straight = resident(name)
    losses, rows = save_and_resume(JOB, config, 6)
    assert losses == straight.losses[6:]
    assert rows == straight.rows


def counted(tables: EngramTables, piece_bytes: int = 1000) -> dict[int, int]:
    """The counts of updates by row id; the rows are those that would be saved, piece by piece."""
    pieces = list(tables.with_counts(tables.updated_rows(piece_bytes)))
    assert all(counts.dtype == torch.uint8 for _, _, counts in pieces)
    return {row: count for ids, _, counts in pieces for row, count in zip(ids.tolist(), counts.tolist(), strict=True)}


def expected_counts(job: Job, steps: range) -> Counter[int]:
    bases, found = (0, Addresses().num_rows(0)), Counter[int]()
    for step in set(steps) - set(job.skipped):
        rows = [Addresses().all_rows(*batch) for batch in job.batches(step, 0, 1)]
        found.update(
            {int(row) + bases[module] for micro in rows for module in (0, 1) for row in micro[module].unique()}
        )
    return found


@pytest.mark.parametrize("mode", ["window", "resident"])
def test_rows_count_the_steps_that_updated_them_and_loaded_rows_count_on(mode: str) -> None:
    config = OffloadConfig(mode=mode, depth=2, window_rows=TINY)
    tables, resumed, old, zeroed = (open_tables(JOB, config) for _ in range(4))
    for step in range(9):
        train_step(tables, JOB, step)
    counts = counted(tables)
    assert counts == expected_counts(JOB, range(9))
    assert 1 < max(counts.values()) < 9
    for ids, records, known in tables.with_counts(tables.updated_rows()):
        resumed.load_rows(ids, records, known)
        old.load_rows(ids, records)
        zeroed.load_rows(ids, records, torch.zeros_like(known))
    assert counted(resumed) == counts
    assert counted(old) == counted(zeroed) == dict.fromkeys(counts, 1)
    resumed.load_optimizer_state(tables.optimizer_state())
    train_step(resumed, JOB, 9)
    assert counted(resumed) == expected_counts(JOB, range(10))
    for each in (tables, resumed, old, zeroed):
        each.close()


def test_a_row_counts_one_update_a_step_whichever_ranks_ask_for_it() -> None:
    job = dataclasses.replace(JOB, micro_batch=1)
    by_rank = run_ranks(counts_of, 2, job, OffloadConfig(depth=2, window_rows=TINY))
    assert by_rank[0] | by_rank[1] == expected_counts(job, range(job.steps))
    assert not by_rank[0].keys() & by_rank[1].keys()


def counts_of(job: Job, config: OffloadConfig) -> dict[int, int]:
    tables = open_tables(job, config)
    try:
        for step in range(job.steps):
            train_step(tables, job, step)
        return counted(tables)
    finally:
        tables.close()


@pytest.mark.parametrize("engine", ["cpu", "zero_copy", "staged", "mixed"])
def test_rows_that_were_never_updated_do_not_travel(engine: str) -> None:
    """In a window that holds everything no row has to come back."""
    outcome = run_job(Job(skipped=(0,)), OffloadConfig(engine=engine, depth=1, window_rows=AMPLE))
    assert outcome.fetched == outcome.written_back == 0
    assert outcome.drawn >= len(outcome.rows) > 0


@pytest.mark.parametrize("change", [{"mode": "resident"}, {"window_rows": TINY}, {"verify": True}], ids=str)
@pytest.mark.parametrize("row_dtype", ["fp32", "bf16"])
def test_rows_that_were_loaded_and_forgotten_leave_no_trace(change: dict, row_dtype: str) -> None:
    config = OffloadConfig(optimizer=OPTIMIZERS["adam-exact"], row_dtype=row_dtype).model_copy(update=change)
    straight = run_job(Job(steps=4), config.model_copy(update={"verify": False}))
    trained = open_tables(JOB, config)
    for step in range(5):
        train_step(trained, JOB, step)
    tables, fresh = open_tables(Job(steps=4), config), trained.optimizer_state() | {"learning_rates": []}
    tables.load_optimizer_state(trained.optimizer_state())
    loaded = [tables.load_rows(ids, records) for ids, records in trained.updated_rows()]
    assert sum(loaded) > 60
    assert len(counted(tables)) == sum(loaded)
    tables.forget_rows()
    assert counted(tables) == {}
    tables.load_optimizer_state(fresh)
    assert [*tables.updated_rows()] == []
    assert [train_step(tables, Job(steps=4), step)[0] for step in range(4)] == straight.losses
    trained.close()
    tables.close()


def test_pieces_are_of_one_module_full_and_within_the_limit() -> None:
    tables = open_tables(JOB, OffloadConfig(window_rows=AMPLE))
    for step in range(8):
        train_step(tables, JOB, step)
    (whole,), limit = [*zip(*tables.updated_rows(), strict=True)][:1], 10 * (tables.record_bytes + 8)
    pieces = [ids for ids, records in tables.updated_rows(piece_bytes=limit)]
    assert torch.equal(torch.cat(pieces), torch.cat(whole))
    borders = [module for ids in pieces for module in {int(ids[0]) >= 97, int(ids[-1]) >= 97}]
    assert len(borders) == len(pieces) > 6
    assert sorted(map(len, pieces))[2:] == [10] * (len(pieces) - 2), "all but each module's last are full"
    assert [len(rows) for rows in tables.owned_rows()] == [97, 61]
    tables.close()


def test_another_optimizers_state_is_refused() -> None:
    adam, adagrad = (open_tables(Job(), OffloadConfig(optimizer=OPTIMIZERS[n])) for n in ("adam-lazy", "adagrad"))
    with pytest.raises(ValueError, match=r"offload\.optimizer\.type: .* trained with adam, the config says rowwise"):
        adagrad.load_optimizer_state(adam.optimizer_state())
    adam.close()
    adagrad.close()


def test_the_look_ahead_may_change_between_steps_and_no_bit_does() -> None:
    config = TABLES["adam-exact"].model_copy(update={"window_rows": 1000, "depth": 0})
    reference = open_tables(JOB, config)
    expected = [train_step(reference, JOB, step) for step in range(9)]
    reference.close()
    tables = open_tables(JOB, config)
    try:
        results, ahead = [], []
        for step in range(9):
            tables.look_ahead((0, 3, 0)[step // 3])
            for planned in range(step, min(step + 5, JOB.steps)):  # so that plans never decide how far it looks
                tables._planner.request(planned)
                tables._planner.plan(planned)
            results.append(train_step(tables, JOB, step))
            ahead.append(len(tables._shard.store._admissions.admitted))
        assert results == expected
        assert ahead == [0, 0, 0, 3, 3, 3, 2, 1, 0]
        with pytest.raises(ValueError, match="not -1"):
            tables.look_ahead(-1)
    finally:
        tables.close()


def run_reopened(job: Job, config: OffloadConfig, changes: dict[int, dict]) -> tuple[list, list[int], list]:
    """Trains all steps, with other settings before some; results, slots of the window at each step, and rows."""
    tables = open_tables(job, config)
    try:
        results, slots = [], []
        for step in range(job.steps):
            if step in changes:
                tables.reopen(config := config.model_copy(update=changes[step]))
            results.append(train_step(tables, job, step))
            slots.append(len(tables._shard.store.records))
        rows = [(ids.tolist(), records.view(torch.int32).tolist()) for ids, records in tables.updated_rows()]
        return results, slots, rows
    finally:
        tables.close()


def run_reopened_and_not(job: Job, config: OffloadConfig, changes: dict[int, dict]) -> list[tuple]:
    return [run_reopened(job, config, settings) for settings in (changes, {})]


def test_window_engine_and_threads_may_change_between_steps_and_no_bit_does() -> None:
    config = TABLES["adam-exact"].model_copy(update={"window_rows": TINY, "depth": 2})
    changes = {
        3: {"window_rows": 80, "planner_threads": 2},
        5: {"engine": "cpu", "depth": 4},
        8: {"window_rows": 70, "depth": 0},
        9: {"depth": 3},
    }
    expected = run_reopened(JOB, config, {})
    reopened = run_reopened(JOB, config, changes)
    assert (reopened[0], reopened[2]) == (expected[0], expected[2])
    assert reopened[1] == [TINY] * 3 + [80] * 5 + [70] * 4
    for found, unchanged in run_ranks(run_reopened_and_not, 2, JOB, config, changes):
        assert found[1][0] == TINY
        assert found[::2] == unchanged[::2]


def run_reopened_behind_a_slow_planner(config: OffloadConfig, changes: dict[int, dict]) -> list[tuple]:
    """Of two ranks, of which the second plans late."""
    plan = offload.tables.make_plan

    def late(*args: Any) -> Any:
        time.sleep(0.03 * dist.get_rank())
        return plan(*args)

    with mock.patch.object(offload.tables, "make_plan", late):
        return run_reopened_and_not(JOB, config, changes)


def test_a_window_is_opened_when_no_rank_plans_any_more() -> None:
    """Both are collective, on one group, and in two threads."""
    config = TABLES["adam-exact"].model_copy(update={"window_rows": TINY, "depth": 2, "engine": "mixed"})
    changes = {step: {"window_rows": TINY + step} for step in (2, 3, 5, 8)}
    for found, unchanged in run_ranks(run_reopened_behind_a_slow_planner, 2, config, changes, timeout_s=60):
        assert found[::2] == unchanged[::2]


def reopen_where_one_rank_has_no_room() -> tuple[list, int]:
    zeros_on = store.zeros_on

    def little_room(device: torch.device, num_rows: int, words: int) -> torch.Tensor:
        if dist.get_rank() == 1 and num_rows > TINY:
            raise Unavailable("no room here")
        return zeros_on(device, num_rows, words)

    config = TABLES["adam-exact"].model_copy(update={"window_rows": TINY, "depth": 2})
    tables = open_tables(JOB, config)
    try:
        results = [train_step(tables, JOB, step) for step in range(3)]
        told = (r"another rank has no room for a window of \d+ slots", "no room here")[dist.get_rank()]
        with mock.patch.object(store, "zeros_on", little_room), pytest.raises(Unavailable, match=told):
            tables.reopen(config.model_copy(update={"window_rows": AMPLE}))
        return results + [train_step(tables, JOB, step) for step in range(3, 6)], len(tables._shard.store.records)
    finally:
        tables.close()


def test_where_one_rank_has_no_room_for_a_window_all_keep_theirs() -> None:
    expected = run_ranks(run_jobs, 2, [(dataclasses.replace(JOB, steps=6), TABLES["adam-exact"])])
    for (results, slots), (outcome,) in zip(run_ranks(reopen_where_one_rank_has_no_room, 2), expected, strict=True):
        assert slots == TINY
        assert results == list(zip(outcome.losses, outcome.norms, strict=True))


def test_what_cannot_change_between_steps_is_refused_and_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    windows: list[weakref.ref] = []
    map_anonymous = memory.map_anonymous

    def one_at_a_time(nbytes: int) -> mmap.mmap:
        assert all(window() is None for window in windows), "two windows at a time"
        mapped = map_anonymous(nbytes)
        windows.append(weakref.ref(mapped))
        return mapped

    link = LinkConfig(bytes_per_second=1e9)
    config = TABLES["adam-exact"].model_copy(update={"window_rows": TINY, "depth": 2, "emulate_link": link})
    reference = open_tables(JOB, config)
    monkeypatch.setattr(memory, "map_anonymous", one_at_a_time)
    tables = open_tables(JOB, config)
    try:
        assert [train_step(tables, JOB, step) for step in range(3)] == [
            train_step(reference, JOB, step) for step in range(3)
        ]
        with pytest.raises(ValueError, match="only depth, engine, planner_threads, programs, window_rows of offload"):
            tables.reopen(config.model_copy(update={"row_dtype": "bf16"}))
        with pytest.raises(ValueError, match="emulate_link has no meaning"):
            tables.reopen(config.model_copy(update={"engine": "staged", "window_rows": 99}))
        assert len(tables._shard.store.records) == TINY
        assert len(windows) == 3
        assert train_step(tables, JOB, 3) == train_step(reference, JOB, 3)
    finally:
        tables.close()
        reference.close()


def test_rows_that_count_as_updated_are_fetched() -> None:
    tables = open_tables(JOB, OffloadConfig(window_rows=TINY, depth=0))
    try:
        tables.count_all_as_updated()
        train_step(tables, JOB, 0)
        traffic = tables.take_traffic()
        assert traffic.drawn == 0
        assert traffic.fetched == traffic.requested > 0
        assert tables.traffic.fetched == traffic.fetched, "what was taken is forgotten"
    finally:
        tables.close()
