"""Every moment of a step belongs to one stage, and a profile names it."""

import time

import pytest
import torch

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


def test_a_profile_names_the_stages_and_nothing_is_named_outside_one() -> None:
    clock = StageClock()
    clock.enter("plan")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        clock.enter("forward")
        torch.ones(2) + 1
        clock.enter("other")
    names = [event.name for event in profile.events() if event.name.startswith("engram ")]
    assert names == ["engram forward"]
