"""`offload.depth=auto`: what is tried, what is kept, and that all ranks keep the same."""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from offload.window.interface import Traffic
from tests.distributed import run_ranks
from train.look_ahead import TIMED, TRIED, WARMUP, WATCHED, Choice, LookAhead, least_depth, schedule

TRIALS = len(schedule(WARMUP))
SLOW, FAST = {1: 0.5, 2: 0.2, 4: 0.2}, {1: 0.0, 2: 0.0, 4: 0.0}


@dataclass
class Waiting:
    """Tables whose loop waits a given time at each look-ahead, and whose fetched rows grow with the steps."""

    waits_s: dict[int, float]
    fetched: dict[int, int]
    depths: list[int] = field(default_factory=list)
    traffic: Traffic = field(default_factory=Traffic)

    def look_ahead(self, depth: int) -> None:
        self.depths.append(depth)

    def work(self, step: int) -> None:
        rows = max(rows for first, rows in self.fetched.items() if first <= step)
        then = self.traffic
        self.traffic = replace(
            then, waited_s=then.waited_s + self.waits_s[self.depths[-1]], fetched=then.fetched + rows
        )


def run(waits_s: list[dict[int, float]], fetched: dict[int, int], steps: int) -> tuple[list[int], list[Choice]]:
    """The look-aheads of all steps, and what was told."""
    tables, told = Waiting(waits_s[dist.get_rank()], fetched), []
    ahead = LookAhead(cast(Any, tables), torch.device("cpu"), steps, told.append)
    for step in range(steps):
        with ahead.step(step):
            tables.work(step)
    return tables.depths, told


def test_each_look_ahead_counts_twice_and_never_with_what_another_one_fetched() -> None:
    steps = schedule(WARMUP)
    assert Counter(depth for depth, counts in steps if counts) == dict.fromkeys(TRIED, 2 * TIMED)
    depths = [depth for depth, _ in steps]
    for step, (depth, counts) in enumerate(steps):
        # A step's rows were fetched under the largest look-ahead of those before it that reach it.
        reach = [before for ago, before in enumerate(reversed(depths[:step]), 1) if before >= ago]
        assert not counts or set(reach) == {depth}, f"step {step} counts for {depth}, but {set(reach)} fetched for it"


@pytest.mark.parametrize(
    ("costs", "depth"),
    [({1: 0.5, 2: 0.2, 4: 0.2}, 2), ({1: 0.004, 2: 0.0, 4: 0.0}, 1), ({1: 0.3, 2: 0.2, 4: 0.1}, 4)],
)
def test_the_smallest_that_waits_hardly_longer_is_kept(costs: dict[int, float], depth: int) -> None:
    assert least_depth(costs, 1.0) == depth


def test_ranks_agree_by_the_slowest_and_try_again_when_many_more_rows_travel() -> None:
    steps = TRIALS + 3 * WATCHED + TRIALS
    grown = {0: 10, TRIALS + WATCHED: 100}
    first, second = run_ranks(run, 2, [FAST, SLOW], grown, steps)
    assert first[0] == second[0]
    assert [choice.depth for choice in first[1]] == [choice.depth for choice in second[1]] == [2, 2]
    assert first[1][0].cost_s == pytest.approx(SLOW), "it is not the slowest rank that counts"
    again = TRIALS + 2 * WATCHED
    assert set(first[0][TRIALS:again]) == {2}
    assert first[0][again : again + len(schedule(0))] == [depth for depth, _ in schedule(0)]
    assert set(first[0][again + len(schedule(0)) :]) == {2}


def test_a_run_too_short_for_trials_says_so() -> None:
    ((depths, told),) = run_ranks(run, 1, [SLOW], {0: 10}, TRIALS)
    assert set(depths) == {1}
    assert [str(choice) for choice in told] == ["offload.depth: 1 (too few steps are left to try others)"]
