import json
import os
import platform
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from train.run_state import RunState, State
from train.status.pulse import SILENT_S, Pulse
from train.status.status import Observed, RunStatus, rank_list
from train.watch.heartbeat import Beat, Heartbeat, beat_path, forget_beats

BEAT = Beat(0, "a", 1, 7, "compute", 40, 0.0, 0.0, host_bytes=2**30, device_peak_bytes=2**20)


def beats(folder: Path, *told: Beat) -> None:
    for beat in told:
        path = beat_path(folder, beat.rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(beat)))


def run(folder: Path, state: State = "running", ages: tuple[float, ...] = (), why: str | None = None) -> RunStatus:
    """How a run is whose ranks beat so many seconds ago; the last one is on another host."""
    now = time.time()
    beats(folder, *(replace(BEAT, rank=rank, host=f"h{rank}", written=now - age) for rank, age in enumerate(ages)))
    RunState(state, 5, 9, why=why, ranks=len(ages)).write(folder)
    return Observed(folder).look()


class Clock:
    """Time passes when someone sleeps; then what is to happen does."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.events: list[tuple[float, Beat, Path]] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for _, beat, folder in [event for event in self.events if event[0] <= self.now]:
            beats(folder, beat)


def test_a_run_that_beats_runs_and_one_that_does_not_is_lost(tmp_path: Path) -> None:
    assert (run(tmp_path, ages=(1, 2)).state, run(tmp_path, ages=(1, 2)).why) == ("running", None)
    lost = run(tmp_path, ages=(SILENT_S + 60, SILENT_S + 70))
    assert lost.state == "lost"
    assert lost.why is not None
    assert lost.why.startswith("h0: no heartbeat of rank 0 for 1:20, last seen in step 7, compute; h1: ")
    one = run(tmp_path, ages=(1, SILENT_S + 70))
    assert (one.state, [life.silent for life in one.lives]) == ("running", [False, True])
    assert one.why == "h1: no heartbeat of rank 1 for 1:30, last seen in step 7, compute"


@pytest.mark.parametrize(("state", "why"), [("finished", None), ("interrupted", "by SIGTERM"), ("failed", "boom")])
def test_how_a_run_ended_is_told_and_its_last_heartbeats_are_not(state: State, why: str | None, tmp_path: Path) -> None:
    found = run(tmp_path, state, ages=(500,), why=why)
    assert (found.state, found.why, found.step, found.steps, found.lives) == (state, why, 5, 9, [])
    assert not found.active


def test_before_its_ranks_beat_a_run_starts_and_later_it_is_lost(tmp_path: Path) -> None:
    assert Observed(tmp_path).look().state == "not started"
    assert run(tmp_path).state == "starting"
    os.utime(tmp_path / "run.json", times=(0, time.time() - SILENT_S - 1))
    assert Observed(tmp_path).look().state == "lost"


def test_the_step_is_the_furthest_that_anything_tells_of(tmp_path: Path) -> None:
    assert run(tmp_path, ages=(1,)).step == 6
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 6, "loss": 3.0, "val_loss": 3.5, "step_ms": 1000}\n{"step": 8, "loss": 2.0, "step_ms": 3000}\n{"st'
    )
    found = run(tmp_path, ages=(1,))
    assert (found.step, found.eta_s) == (8, 2.0)
    assert found.metrics["loss"] == 2.0
    assert (found.metrics["val_loss"], found.metrics["val_step"]) == (3.5, 6)
    (tmp_path / "checkpoints" / "step-00000004").mkdir(parents=True)
    assert Observed(tmp_path).look().saved_step is None
    (tmp_path / "checkpoints" / "step-00000004" / "manifest.json").touch()
    assert Observed(tmp_path).look().saved_step == 4


@pytest.mark.parametrize("off_s", [-300.0, 300.0])
def test_a_clock_that_is_off_is_no_silence(off_s: float, tmp_path: Path) -> None:
    clock = Clock()
    first = replace(BEAT, written=clock.now + off_s)
    beats(tmp_path, first)
    clock.events = [(1004.0, replace(first, written=1004 + off_s), tmp_path)]
    (life,) = Pulse(tmp_path, clock, clock).look_well(1, clock.sleep)
    assert not life.silent
    assert life.age_s == 0
    assert clock.now == 1004


def test_who_does_not_beat_again_is_silent_whatever_its_clock_says(tmp_path: Path) -> None:
    clock = Clock()
    beats(tmp_path, replace(BEAT, written=clock.now + 300))
    pulse = Pulse(tmp_path, clock, clock)
    assert [life.silent for life in pulse.look_well(1, clock.sleep)] == [True]
    assert 1010 <= clock.now < 1012


def test_while_watched_a_rank_falls_silent(tmp_path: Path) -> None:
    clock = Clock()
    beats(tmp_path, replace(BEAT, written=999.0))
    pulse = Pulse(tmp_path, clock, clock)
    silent = []
    for _ in range(3):
        silent += [life.silent for life in pulse.look()]
        clock.now += 15
    assert silent == [False, False, True]


def test_ranks_of_an_earlier_start_do_not_count(tmp_path: Path) -> None:
    beats(tmp_path, *(replace(BEAT, rank=rank, written=time.time()) for rank in range(4)))
    assert len(Pulse(tmp_path).look(2)) == 2
    forget_beats(tmp_path)
    assert Pulse(tmp_path).look(4) == []
    heartbeat = Heartbeat(tmp_path, 1, 5.0, memory=lambda: (7, 8))
    heartbeat.beat()
    (life,) = Pulse(tmp_path).look(4)
    assert (life.beat.rank, life.beat.host_bytes, life.beat.device_peak_bytes) == (1, 7, 8)
    assert life.beat.host == platform.node()


def test_lists_of_ranks_are_short() -> None:
    assert [rank_list([3]), rank_list([0, 1, 2, 6])] == ["rank 3", "ranks 0-2, 6"]
