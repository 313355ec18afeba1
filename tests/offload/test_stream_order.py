"""Engine zero_copy on streams that check their order: no timing of a device can bring two accesses out of order."""

import itertools

import pytest

from offload.config import OffloadConfig
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
            results.append(train_step(tables, job, step))
            if step in job.evaluated:
                results.append(look_up(tables, job, step))
            if step in job.saved:
                results.append(saved_rows(tables))
        return [*results, saved_rows(tables)]
    finally:
        tables.close()


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


def test_the_host_never_waits_for_a_step() -> None:
    """On a device that never finishes, a run without saves and evaluations waits only when it is closed."""
    job = Job(JOBS["churn"].steps)
    for config in configs(job):
        tables_closed = ClockedStreams(1.0)
        with watched(tables_closed):
            tables = open_tables(Case(job, config))
            watch_updates(tables, tables_closed)
            for step in range(len(job.steps)):
                train_step(tables, job, step)
            in_loop = tables_closed.host_waits
            tables.close()
        assert in_loop <= ring_waits(config), config


def ring_waits(config: OffloadConfig) -> int:
    """Waits for numbers of steps long past, in a ring of two windows."""
    return 0 if config.window_rows == 1000 else 10**6


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
