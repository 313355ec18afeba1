"""The tiny job on a real Slurm of two hosts: submitted, started by srun, preempted."""

import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command_line import losses, table_rows
from tests.launch.cluster import slurm_cluster
from tests.launch.cluster.shared_job import LAUNCH, ON, SLOW, on_one_host, write_shared_job
from tests.launch.cluster.test_launch_page import SLURMS
from tests.launch.cluster.two_hosts import SHARED, Host, skip_without_namespaces
from train.checkpoint.listing import checkpoints_in


@pytest.mark.long
def test_slurm_runs_what_was_submitted_with_the_bits_of_one_host(shared: Path, corpus: Path) -> None:
    skip_without_namespaces(*slurm_cluster.PROGRAMS)
    write_shared_job(shared)
    wanted = [*ON["nproc"], "launch.nodes=2", "launch.slurm.cpus_per_rank=1"]
    submit = [*LAUNCH, "--on", "slurm", "--submit", *wanted]
    with slurm_cluster.slurm_cluster(shared) as (first, _):
        submitted = slurm_cluster.run(first, *submit)
        number = submitted.split()[-1]
        log = wait_for_job(first, number, shared)
        assert "step 5/5  loss " in log, log
        wrong = slurm_cluster.run(first, *submit, "run.name=wrong", "offload.window_rows=9")
        log = wait_for_job(first, wrong.split()[-1], shared, "wrong")
    assert log.splitlines()[-1].startswith("Error: offload.window_rows: step 1 alone needs "), log
    assert log.count("step 1 alone needs") == 1
    one, two = on_one_host(shared, corpus), shared / "runs" / "small"
    assert losses(two) == losses(one)
    assert table_rows(two) == table_rows(one)


@pytest.mark.long
def test_srun_alone_makes_tasks_the_ranks_of_one_job(shared: Path) -> None:
    skip_without_namespaces(*slurm_cluster.PROGRAMS)
    write_shared_job(shared)
    (doctor,), (train,) = (
        [on_the_hosts(command) for command in SLURMS if ("doctor" in command) is wanted] for wanted in (True, False)
    )
    with slurm_cluster.slurm_cluster(shared) as (first, second):
        assert "step 5/5  loss " in slurm_cluster.run(first, *train)
        with second.slow_link("100mbit"):
            told = slurm_cluster.run(first, *doctor)
    for what in ("all-reduce", "all-to-all"):
        assert re.search(rf"{what} +0\.0[1-3] GB/s a rank", told), told
    assert re.search(r"slowest is n1 - n2 with 0\.0[1-3] GB/s each way", told), told


@pytest.mark.long
def test_a_preempted_job_is_queued_again_saves_what_there_is_and_ends_with_the_bits_of_one_host(
    shared: Path, corpus: Path
) -> None:
    skip_without_namespaces(*slurm_cluster.PROGRAMS)
    write_shared_job(shared, **SLOW | {"checkpoint": {"every": 100, "grace_s": 20.0}})
    wanted = [*ON["nproc"], "launch.nodes=2", "launch.slurm.cpus_per_rank=1", "launch.slurm.partition=low"]
    run = shared / "runs" / "small"
    log = run / "launches" / "0001" / "job.log"
    with slurm_cluster.slurm_cluster(shared) as (first, _):
        number = slurm_cluster.run(first, *LAUNCH, "--on", "slurm", "--submit", *wanted).split()[-1]
        wait_until(lambda: log.exists() and "reading the data" in log.read_text())
        preempt(first, number)
        assert "Terminated" in log.read_text(), log.read_text()
        assert not checkpoints_in(run / "checkpoints")
        wait_until(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) > 0)
        preempt(first, number)
        assert "Exited with exit code 75" in log.read_text(), log.read_text()
        assert 0 < len(losses(run)) < 8, "it was not preempted in its midst"
        assert checkpoints_in(run / "checkpoints"), "nothing was saved"
        told = wait_for_job(first, number, shared)
    assert "step 8/8  loss " in told, told
    assert told.count("waiting for all ranks") == 3
    one = on_one_host(shared, corpus, "offload.emulate_link=null")
    assert losses(run) == losses(one)
    assert table_rows(run) == table_rows(one)


LONG = {"train": {"steps": 80}, "checkpoint": {"every": 1000, "grace_s": 20.0}}
"""Some eighty seconds of steps, more than there are before the signal."""


@pytest.mark.long
@pytest.mark.parametrize("requeue", [True, False])
def test_the_signal_ahead_of_the_time_limit_has_it_saved_and_queued_again_or_left_to_be_submitted(
    requeue: bool, shared: Path, corpus: Path
) -> None:
    skip_without_namespaces(*slurm_cluster.PROGRAMS)
    write_shared_job(shared, **SLOW | LONG)
    wanted = [*ON["nproc"], "launch.nodes=2", "launch.slurm.cpus_per_rank=1", "launch.time_limit_min=2"]
    submit = [*LAUNCH, "--on", "slurm", "--submit", *wanted, f"launch.slurm.requeue={str(requeue).lower()}"]
    run, launches = shared / "runs" / "small", 0
    with slurm_cluster.slurm_cluster(shared) as (first, _):
        while not launches or steps_left(run):
            number = slurm_cluster.run(first, *submit).split()[-1]
            launches += 1
            assert launches < 5
            told = wait_for_job(first, number, shared, launch=launches, again=requeue)
            assert "DUE TO TIME LIMIT" not in told, told
            if launches == 1:
                assert "interrupted by SIGTERM after step " in told, told
                assert "Exited with exit code 75" in told, told
                assert checkpoints_in(run / "checkpoints")
    assert (launches == 1) is requeue
    assert "step 80/80  loss " in told, told
    assert requeue or told.count("waiting for all ranks") == 1
    one = on_one_host(shared, corpus, "offload.emulate_link=null")
    assert losses(run) == losses(one)
    assert table_rows(run) == table_rows(one)


def steps_left(run: Path) -> bool:
    return len(losses(run)) < LONG["train"]["steps"]


def preempt(host: Host, number: str) -> None:
    """Runs a short job of higher priority on both hosts, then lets the one that it preempted start again at once."""
    slurm_cluster.run(host, "srun", "--partition=high", "--nodes=2", "--exclusive", "true")

    def runs_again() -> bool:
        start_at_once(host, number)
        return slurm_cluster.run(host, "squeue", "-h", "-j", number, "-o", "%T").strip() == "RUNNING"

    wait_until(runs_again, every_s=1)


def start_at_once(host: Host, number: str) -> None:
    """Slurm would let a job that was queued again wait for two minutes."""
    at_once = host.command("scontrol", "update", f"JobId={number}", "StartTime=now")
    subprocess.run(at_once, env=slurm_cluster.environment(), capture_output=True, check=False)


def wait_until(happened: Callable[[], bool], within_s: float = 120, every_s: float = 0.1) -> None:
    deadline = time.monotonic() + within_s
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(every_s)


def on_the_hosts(command: str) -> list[str]:
    """A command of the page, with this interpreter and the small job."""
    engram = [sys.executable, "-P", "-m", "launch"]
    stands_for = {"engram": engram, "configs/tiny.yaml": [str(SHARED / "job.yaml")]}
    return [each for word in shlex.split(command) for each in stands_for.get(word, [word])]


def wait_for_job(
    host: Host, number: str, shared: Path, run: str = "small", *, launch: int = 1, again: bool = False
) -> str:
    """Waits until a job of Slurm has ended, started at once `again` if it queues itself; returns its log."""

    def ended() -> bool:
        state = slurm_cluster.run(host, "squeue", "-h", "-o", "%A %T").splitlines()
        if again and f"{number} PENDING" in state:
            start_at_once(host, number)
        return not any(line.startswith(f"{number} ") for line in state)

    wait_until(ended, 400, 0.5)
    return (shared / "runs" / run / "launches" / f"{launch:04d}" / "job.log").read_text()
