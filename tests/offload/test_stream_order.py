"""Engine zero_copy on streams that check their order: no timing of a device can bring two accesses out of order."""

import itertools

import pytest

from offload.config import OffloadConfig
from offload.tables import EngramTables
from tests.offload.clocked_streams import ClockedStreams, Race, watch_updates, watched
from tests.offload.hazard_job import Case, Job, look_up, open_tables, saved_rows, train_step
from tests.offload.test_hazards import drawn, periodic, tokens_of

EVERY = frozenset(range(40))
JOBS = {
    "churn": Job(drawn(3, 12, width=12), evaluated=frozenset({4, 9}), skipped=frozenset({5})),
    "alternating": Job(tuple(tokens_of(ids) for _ in range(7) for ids in (range(20), range(20, 40)))),
    "periodic": Job(periodic(2), evaluated=EVERY, saved=frozenset({6})),
}
LAGS = (0.0, 0.5, 1.0)  # the last is a device that has never finished anything by the time it is asked


def trained(job: Job, config: OffloadConfig, streams: ClockedStreams | None) -> list[object]:
    """Losses, norms and rows of a job, on watched streams if there are any."""
    tables = open_tables(Case(job, config))
    if streams is not None:
        watch_updates(tables, streams)
    results: list[object] = []
    try:
        for step in range(len(job.steps)):
            plan_ahead(tables, job, config, step)
            results.append(train_step(tables, job, step))
            if step in job.evaluated:
                results.append(look_up(tables, job, step))
            if step in job.saved:
                results.append(saved_rows(tables))
        return [*results, saved_rows(tables)]
    finally:
        tables.close()


def plan_ahead(tables: EngramTables, job: Job, config: OffloadConfig, step: int) -> None:
    """Waits for the plans that the step may look ahead to: how far it does must not depend on the planner's thread."""
    for ahead in range(step, min(step + config.depth + 2, len(job.steps))):
        tables._planner.request(ahead)
        tables._planner.plan(ahead)


def configs(job: Job) -> list[OffloadConfig]:
    tiny = job.most_rows(1)
    sizes = [(0, tiny), (1, tiny), (2, tiny + 3), (4, 2 * tiny), (1, 2 * tiny), (2, 1000)]
    return [OffloadConfig(engine="zero_copy", depth=depth, window_rows=rows) for depth, rows in sizes]


def run_watched(job: Job, config: OffloadConfig, streams: ClockedStreams) -> list[object]:
    with watched(streams):
        return trained(job, config, streams)


@pytest.mark.parametrize("name", JOBS)
def test_every_access_is_ordered_and_every_bit_is_that_of_a_resident_shard(name: str) -> None:
    job = JOBS[name]
    expected = trained(job, OffloadConfig(mode="resident"), None)
    for seed, (config, lag) in enumerate(itertools.product(configs(job), LAGS)):
        streams = ClockedStreams(lag, seed)
        assert run_watched(job, config, streams) == expected, (config, lag)
        assert streams.accesses > 500, "hardly an access was checked: the test would prove nothing"


def test_the_host_waits_for_nothing() -> None:
    """Steps are given to a device that never finishes anything."""
    job = Job(JOBS["churn"].steps)
    for config in configs(job):
        streams = ClockedStreams(1.0)
        with watched(streams):
            tables = open_tables(Case(job, config))
            watch_updates(tables, streams)
            for step in range(len(job.steps)):
                plan_ahead(tables, job, config, step)
                train_step(tables, job, step)
            assert streams.host_waits == 0, config
            tables.close()
        assert streams.written or config.window_rows == 1000, "nothing was written: the test would prove nothing"


PAIRS = [("in", "compute"), ("out", "compute"), ("compute", "in"), ("compute", "out"), ("in", "out")]


@pytest.mark.parametrize("ignored", PAIRS, ids="-".join)
def test_each_wait_is_needed_and_a_missing_one_is_noticed(ignored: tuple[str, str]) -> None:
    def races() -> bool:
        for job in JOBS.values():
            for config in configs(job):
                try:
                    run_watched(job, config, ClockedStreams(1.0, ignored=[ignored]))
                except Race:
                    return True
        return False

    assert races()
