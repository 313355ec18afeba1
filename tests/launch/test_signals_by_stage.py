"""Every signal in every stage of a run, at the very moment at which a rank enters it."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launch.local.environment import may_use_gpus
from tests.command_line import write_job
from tests.launch.test_interrupted_runs import (
    LIMIT_S,
    assert_goes_on_like,
    left_alone,
    started_quickly,
    state,
    steps_done,
)
from tests.signals import skip_if_ignored
from train.checkpoint.listing import checkpoints_in
from train.watch.ending import ENDING
from train.watch.heartbeat import Heartbeat

STAGES = ("plan", "fetch", "exchange", "compute", "evaluate", "save")


@dataclass(frozen=True)
class SignalAt:
    """Has a rank send a signal, to itself or to its launcher, as it enters a stage of the n-th step of its process."""

    stage: str
    signum: int
    rank: int
    nth: int
    to_launcher: bool

    def __call__(self) -> None:
        enter, first, sent = Heartbeat.enter, 0, False

        def entering(heartbeat: Heartbeat, stage: Any, step: int | None = None) -> None:
            nonlocal first, sent
            enter(heartbeat, stage, step)
            now = heartbeat.now()
            first = first or now.step
            if not sent and (now.rank, stage, now.step) == (self.rank, self.stage, first + self.nth - 1):
                sent = True
                os.kill(os.getppid() if self.to_launcher else os.getpid(), self.signum)

        Heartbeat.enter = entering  # type: ignore[method-assign]


def interrupted(job: Path, run: Path, at: SignalAt) -> None:
    """The run goes on, is ended by the signal, and says that all is saved."""
    before = steps_done(run)
    with started_quickly(job, "checkpoint.interrupted_exit=75", prepare=at) as command:
        result = command.result(LIMIT_S)
    assert (result.returncode, result.stderr) == (75, ""), at
    # The launcher passes on whatever it hears as SIGTERM.
    name = signal.Signals(signal.SIGTERM if at.to_launcher else at.signum).name
    done = steps_done(run)
    assert before + 2 <= done <= before + 3, at
    assert f"interrupted by {name} after step {done}: all is saved in {run}/checkpoints/step-{done:08d}" in (
        result.stdout
    )
    assert (state(run)["state"], state(run)["step"]) == ("interrupted", done)
    assert checkpoints_in(run / "checkpoints")[-1].step == done


@pytest.mark.long
@pytest.mark.skipif(may_use_gpus(), reason="written for CPUs")
@pytest.mark.parametrize("asynchronous", [True, False], ids=["beside", "in-the-loop"])
def test_every_signal_in_every_stage_is_obeyed_and_the_run_comes_to_the_same_bits(
    asynchronous: bool, corpus: Path, tmp_path: Path
) -> None:
    """An evaluation and a save at every step, so that each step has all stages."""
    for signum in ENDING:
        skip_if_ignored(signum)
    cases = [(stage, signum) for stage in STAGES for signum in ENDING]
    job = write_job(
        tmp_path,
        corpus,
        train={"steps": 3 * len(cases) + 2},
        checkpoint={"every": 1, "asynchronous": asynchronous},
        eval={"every": 1, "sequences": 2},
    )
    run = tmp_path / "runs" / "small"
    for number, (stage, signum) in enumerate(cases):
        interrupted(job, run, SignalAt(stage, signum, number % 2, nth=2, to_launcher=number // 2 % 2 == 0))
    assert_goes_on_like(left_alone(job, run, "checkpoint.every=1000"), run, job)


@pytest.mark.long
@pytest.mark.skipif(may_use_gpus(), reason="written for CPUs")
@pytest.mark.parametrize("signum", ENDING)
def test_in_the_first_step_a_signal_ends_the_run_at_once_and_nothing_is_lost(
    signum: int, corpus: Path, tmp_path: Path
) -> None:
    skip_if_ignored(signum)
    job, run = write_job(tmp_path, corpus, train={"steps": 6}, checkpoint={"every": 1}), tmp_path / "runs" / "small"
    for again in (False, True):
        for stage in ("plan", "exchange"):
            with started_quickly(job, prepare=SignalAt(stage, signum, 1, nth=1, to_launcher=True)) as command:
                result = command.result(LIMIT_S)
            told = f"stopped by {signal.Signals(signum).name}\n"
            assert (result.returncode, result.stderr) == (128 + signum, told)
            assert state(run)["state"] == "interrupted"
            assert steps_done(run) == (2 if again else 0)
        if not again:
            interrupted(job, run, SignalAt("compute", signum, 0, nth=2, to_launcher=False))
    assert_goes_on_like(left_alone(job, run, "checkpoint.every=1000"), run, job)
