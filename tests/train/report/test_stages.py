"""Every moment of a step belongs to one stage, and a profile is told of it."""

import time

import pytest

from offload.spans import record_spans, take_spans
from train.report.stages import StageClock


def test_stages_add_up_to_all_the_time_that_is_not_left_out() -> None:
    clock = StageClock()
    started = time.perf_counter()
    for stage in ("plan", "forward", "plan", "other"):
        clock.enter(stage)  # type: ignore[arg-type]
        time.sleep(0.01)
    clock.leave_out(0.005)
    seconds = clock.seconds()
    assert seconds.keys() == {"plan", "forward", "other"}
    assert sum(seconds.values()) == pytest.approx(time.perf_counter() - started - 0.005, abs=2e-3)
    assert seconds["plan"] >= 0.02 > seconds["forward"] - 0.005
    clock.restart()
    assert sum(clock.seconds().values()) < 0.005


def test_a_profile_is_told_of_the_stages_and_of_nothing_outside_one() -> None:
    clock = StageClock()
    clock.enter("plan")
    record_spans()
    started_ns = time.time_ns()
    for stage in ("forward", "other", "update", "plan"):
        clock.enter(stage)  # type: ignore[arg-type]
    spans = take_spans()
    assert [(each.lane, each.name) for each in spans] == [("loop", "forward"), ("loop", "update")]
    assert started_ns <= spans[0].started_ns <= spans[0].ended_ns <= spans[1].started_ns
