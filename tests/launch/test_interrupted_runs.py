"""A training run that signals end: saved, told, and continued by the same command with the same bits."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest

from launch.local.environment import may_use_gpus
from tests.command_line import backbone, losses, table_rows, train, write_job
from tests.distributed import free_port
from tests.launch.ranks import assert_gone
from tests.signals import skip_if_ignored
from tests.warm_command import WarmCommand, started_warm
from train import validation
from train.watch.heartbeat import Beat, beat_path

SLOW = {"depth": 0, "emulate_link": {"bytes_per_second": 1e9, "latency_s": 0.1}}
"""Every step lasts some tenths of a second."""
QUICK = ["offload.emulate_link=null", "offload.depth=2"]
LIMIT_S = 120
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "launch"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def wait_until(happened: Callable[[], object], process: subprocess.Popen[str] | WarmCommand) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not happened():
        if isinstance(process, WarmCommand):
            assert process.process.exitcode is None, process.result(0)
        else:
            assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


@contextmanager
def started_by_torchrun(job: Path) -> Iterator[subprocess.Popen[str]]:
    """The run in fresh processes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with subprocess.Popen(
        [sys.executable, *TORCHRUN, "train", str(job)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        process_group=0,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def started_quickly(job: Path, *overrides: str, prepare: Callable[[], None] | None = None) -> Iterator[WarmCommand]:
    """The run in warm processes."""
    arguments = ["train", str(job), "--nproc", "2", *overrides]
    with started_warm(arguments, cwd=None, environment={"OMP_NUM_THREADS": "1"}, prepare=prepare) as command:
        yield command


def rank_pids(run: Path) -> list[int]:
    return [json.loads(path.read_text())["pid"] for path in sorted((run / "heartbeats").iterdir())]


def state(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text())
    return found


def steps_done(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def assert_goes_on_like(straight: Path, run: Path, job: Path, *overrides: str) -> None:
    """The same command again comes to the bits of a run that was left alone."""
    train(job, f"run.name={run.name}", *QUICK, *overrides)
    assert state(run)["state"] == "finished"
    assert losses(run) == losses(straight)
    assert table_rows(run) == table_rows(straight)
    assert backbone(run) == backbone(straight)


def evaluate_slowly(evaluated: Path) -> None:
    """Every micro-batch of an evaluation waits for a tenth of a second, and has a byte in a file."""
    batches = validation.batches

    def slowly(*arguments: Any) -> Iterator[Any]:
        for batch in batches(*arguments):
            time.sleep(0.1)
            with evaluated.open("a") as file:
                file.write(".")
            yield batch

    validation.batches = slowly


def write_slow_job(folder: Path, corpus: Path) -> Path:
    return write_job(folder, corpus, train={"steps": 12}, checkpoint={"every": 100}, eval={"every": 6}, offload=SLOW)


@pytest.fixture
def job(corpus: Path, tmp_path: Path) -> Path:
    return write_slow_job(tmp_path, corpus)


@pytest.fixture(scope="module")
def straight(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job's run that was left alone."""
    folder = tmp_path_factory.mktemp("straight")
    train(write_slow_job(folder, corpus), *QUICK)
    return folder / "runs" / "small"


def left_alone(job: Path, run: Path, *overrides: str) -> Path:
    """A run like it that is left alone, with these settings."""
    train(job, "run.name=straight", *QUICK, *overrides)
    return run.with_name("straight")


@pytest.mark.skipif(may_use_gpus(), reason="written for CPUs")
class TestASignalInTraining:
    def test_is_obeyed_once_however_often_it_comes(self, job: Path, straight: Path, tmp_path: Path) -> None:
        """As Slurm and terminals send it: twice, to the launcher and to the ranks."""
        skip_if_ignored(signal.SIGINT)
        run = tmp_path / "runs" / "small"
        # In a group of its own, as a shell starts it.
        with started_quickly(job, "checkpoint.interrupted_exit=75", prepare=os.setpgrp) as command:
            wait_until(lambda: steps_done(run) >= 2, command)
            assert state(run)["state"] == "running"
            launcher, ranks = command.process.pid, rank_pids(run)
            assert launcher is not None
            os.killpg(launcher, signal.SIGINT)
            os.kill(ranks[1], signal.SIGUSR1)
            time.sleep(0.1)
            os.killpg(launcher, signal.SIGINT)
            result = command.result(LIMIT_S)
        assert (result.returncode, result.stderr) == (75, "")
        assert len(ranks) == 2
        assert_gone(ranks)
        done = steps_done(run)
        told = f"after step {done}: all is saved in {run}/checkpoints/step-{done:08d}, and the same command goes on"
        assert told in result.stdout
        assert told in (run / "log.txt").read_text()
        found = state(run)
        assert (found["state"], found["step"]) == ("interrupted", done)
        assert told in found["why"]
        assert 2 <= done < 12
        assert_goes_on_like(straight, run, job)

    def test_reaches_the_ranks_of_another_launcher(self, job: Path, straight: Path, tmp_path: Path) -> None:
        run = tmp_path / "runs" / "small"
        world = {
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        world["ENGRAM_LOGS"] = str(tmp_path / "logs")
        with ExitStack() as both:
            ranks = [
                both.enter_context(
                    started_warm(
                        ["train", str(job)],
                        cwd=None,
                        environment=world | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
                    )
                )
                for rank in "01"
            ]
            wait_until(lambda: steps_done(run) >= 2, ranks[0])
            for rank in ranks:
                rank.process.terminate()
            first, second = [rank.result(LIMIT_S) for rank in ranks]
        assert "interrupted by SIGTERM after step" in first.stdout
        assert (second.stdout, (tmp_path / "logs" / "rank1.log").exists()) == ("", True)
        assert state(run)["state"] == "interrupted"
        assert_goes_on_like(straight, run, job)

    @pytest.mark.long
    def test_reaches_the_run_under_torchrun(self, job: Path, straight: Path, tmp_path: Path) -> None:
        run = tmp_path / "runs" / "small"
        with started_by_torchrun(job) as process:
            wait_until(lambda: steps_done(run) >= 2, process)
            process.terminate()
            out, _ = process.communicate(timeout=LIMIT_S)
        assert "interrupted by SIGTERM after step" in out
        assert state(run)["state"] == "interrupted"
        assert_goes_on_like(straight, run, job)


def stop_within_a_save(run: Path, command: WarmCommand) -> int:
    """Stops rank 1 while a checkpoint is being saved; returns after how many steps that is."""
    checkpoints = run / "checkpoints"
    while True:
        wait_until(lambda: [*checkpoints.glob(".step-*.partial")], command)
        pid = rank_pids(run)[1]
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.2)  # what rank 0 can do without the other it has done then
        if under_way := [*checkpoints.glob(".step-*.partial")]:
            return int(under_way[0].name.split("-")[1].split(".")[0])
        os.kill(pid, signal.SIGCONT)


@pytest.mark.skipif(may_use_gpus(), reason="written for CPUs")
class TestARun:
    def test_that_is_saving_ends_with_that_save(self, job: Path, straight: Path, tmp_path: Path) -> None:
        run = tmp_path / "runs" / "small"
        every = ("checkpoint.every=1", "checkpoint.asynchronous=false")
        with started_quickly(job, *every) as command:
            wait_until(lambda: steps_done(run) >= 1, command)
            step = stop_within_a_save(run, command)
            command.process.terminate()
            time.sleep(0.2)
            os.kill(rank_pids(run)[1], signal.SIGCONT)
            result = command.result(LIMIT_S)
        assert (result.returncode, result.stderr) == (0, "")
        assert f"interrupted by SIGTERM after step {step}: " in result.stdout
        assert steps_done(run) == step
        assert_goes_on_like(straight, run, job)

    def test_that_evaluates_ends_within_that_and_evaluates_when_it_goes_on(self, job: Path, tmp_path: Path) -> None:
        run = tmp_path / "runs" / "small"
        overrides = ("train.steps=3", "eval.every=2", "eval.sequences=40")
        overrides += ("train.global_batch_size=2", "train.micro_batch_size=1", "checkpoint.every_minutes=1e-6")
        evaluated_batches = tmp_path / "evaluated"
        with started_quickly(job, *overrides, prepare=partial(evaluate_slowly, evaluated_batches)) as command:
            wait_until(lambda: steps_done(run) == 1, command)
            time.sleep(1)  # step 2 is done, and has no record before it is evaluated
            command.process.terminate()
            result = command.result(LIMIT_S)
        assert "interrupted by SIGTERM after step 2: " in result.stdout
        assert "step-00000001" in (run / "log.txt").read_text(), "it was saved by the clock"
        (_, (_, evaluated)) = losses(run)
        assert evaluated is None, "the evaluation had come to its end: the test proves nothing"
        assert evaluated_batches.stat().st_size < 40, "it was evaluated to the end all the same"
        assert_goes_on_like(left_alone(job, run, *overrides), run, job, *overrides)
        assert sorted(path.name[-1] for path in (run / "checkpoints").iterdir()) == ["2", "3"]

    def test_that_saves_nothing_says_so(self, job: Path, tmp_path: Path) -> None:
        run = tmp_path / "runs" / "small"
        with started_quickly(job, "checkpoint.every=null", "checkpoint.interrupted_exit=75") as command:
            wait_until(lambda: steps_done(run) >= 1, command)
            command.process.terminate()
            result = command.result(LIMIT_S)
        assert result.returncode == 143
        assert state(run)["why"].endswith("checkpoint.every is null, nothing was saved")

    def test_whose_rank_is_killed_starts_again_by_itself(self, job: Path, straight: Path, tmp_path: Path) -> None:
        run = tmp_path / "runs" / "small"
        with started_quickly(job, "train.restarts=1", "checkpoint.every=2", "checkpoint.resume=never") as command:
            wait_until(lambda: steps_done(run) >= 3, command)
            os.kill(rank_pids(run)[1], signal.SIGKILL)
            result = command.result(LIMIT_S)
        assert result.returncode == 0
        first, second = result.stderr.strip().splitlines()[0], result.stderr.strip().splitlines()[-1]
        assert first.startswith("rank 1 was killed by SIGKILL")
        assert second == "restarting all ranks (1 of 1: train.restarts)"
        assert_goes_on_like(straight, run, job)

    def test_whose_rank_is_stuck_names_it_and_leaves_stacks(self, job: Path, tmp_path: Path) -> None:
        run = tmp_path / "runs" / "small"
        with started_quickly(job, "train.hang_s=5") as command:
            wait_until(lambda: (beat := Beat.read(beat_path(run, 1))) and beat.step >= 2, command)
            pid = rank_pids(run)[1]
            os.kill(pid, signal.SIGSTOP)
            result = command.result(LIMIT_S)
        assert result.returncode == 1
        assert_gone([pid])
        told = re.search(r"train.hang_s: rank 1 gave no sign .* seen in step (\d+), stage (\w+), .*", result.stderr)
        assert told is not None, result.stderr
        assert int(told[1]) >= 2
        assert told[2] in {"plan", "fetch", "exchange", "compute"}
        assert state(run)["state"] == "failed"
        assert told[0] in state(run)["why"]
        (stacks,) = (run / "stacks").iterdir()
        assert "trainer.py" in stacks.read_text()


End = Callable[[int, list[int], Random], None]


def kill_a_rank(launcher: int, ranks: list[int], choice: Random) -> None:
    os.kill(choice.choice(ranks), signal.SIGKILL)


def kill_all(launcher: int, ranks: list[int], choice: Random) -> None:
    for pid in [launcher, *ranks]:
        os.kill(pid, signal.SIGKILL)


def kill_the_launcher(launcher: int, ranks: list[int], choice: Random) -> None:
    os.kill(launcher, signal.SIGKILL)


def send_a_signal(launcher: int, ranks: list[int], choice: Random) -> None:
    os.kill(choice.choice([launcher, *ranks]), choice.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP]))


KILLS = (kill_a_rank, kill_all, kill_the_launcher)


@pytest.mark.skipif(may_use_gpus(), reason="written for CPUs")
@pytest.mark.parametrize(
    ("ends", "times"),
    [
        pytest.param(KILLS, 2, id="kills"),
        pytest.param(KILLS, 21, id="many-kills", marks=pytest.mark.long),
        pytest.param((send_a_signal,), 20, id="signals", marks=pytest.mark.long),
    ],
)
def test_whatever_ends_a_run_at_whatever_moment_the_same_command_comes_to_the_same_bits(
    ends: tuple[End, ...], times: int, corpus: Path, tmp_path: Path
) -> None:
    """A save at every step, so that moments within saves are many."""
    if send_a_signal in ends:
        skip_if_ignored(signal.SIGHUP)
    sections = {"checkpoint": {"every": 1}, "eval": {"every": 3}, "offload": {"window_rows": 1500}}
    job, choice = write_job(tmp_path, corpus, train={"steps": 8 * times}, **sections), Random(0)
    run = tmp_path / "runs" / "small"
    for number in range(times):
        end_somewhere(job, run, ends[number % len(ends)], choice, in_its_start=number % 4 == 3)
    assert_goes_on_like(left_alone(job, run, "checkpoint.every=1000"), run, job)


def end_somewhere(job: Path, run: Path, end: End, choice: Random, *, in_its_start: bool) -> None:
    before = steps_done(run)
    with started_quickly(job) as command:
        launcher = command.process.pid
        assert launcher is not None
        wait_until(lambda: len(children(launcher)) == 2, command)
        ranks = children(launcher)
        if not in_its_start:
            wait_until(lambda: steps_done(run) > before, command)
        time.sleep(choice.uniform(0, 1 if in_its_start else 0.5))
        assert command.process.exitcode is None, "make the run longer"
        with suppress(ProcessLookupError):
            end(launcher, ranks, choice)
        command.process.join(LIMIT_S)
        assert_gone([launcher, *ranks], within_s=10)


def children(pid: int) -> list[int]:
    lists = [task.read_text().split() for task in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for found in lists for child in found]
