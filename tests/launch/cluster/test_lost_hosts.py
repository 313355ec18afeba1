"""A host or its link is lost in the middle of a run: what is told, and how the run goes on."""

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.command_line import losses
from tests.launch.cluster.shared_job import SLOW, Folders, launch, on_one_host, write_shared_job
from tests.launch.cluster.two_hosts import Host, child_of, skip_without_namespaces, wait_for
from tests.signals import skip_if_ignored
from train.checkpoint.listing import checkpoints_in

LOST = "lost another rank, whose host or link failed: "
QUICK = "offload.emulate_link=null"


def assert_goes_on_like_one_host(
    folders: Folders, hosts: Sequence[Host], corpus: Path, *overrides: str, by: int = 0
) -> None:
    """The next launch, by one of the hosts, comes to the losses of a run on one host that was left alone."""
    again = launch(hosts[by], "hosts", QUICK, *folders.overrides, *overrides)
    output, _ = again.communicate(timeout=240)
    assert again.returncode == 0, output
    assert losses(folders.of_rank_0(hosts)) == losses(on_one_host(folders.shared, corpus, QUICK))


@pytest.mark.long
def test_a_link_that_is_cut_ends_both_sides_with_the_reason_and_the_relaunch_resumes(
    folders: Folders, corpus: Path, hosts: tuple[Host, Host]
) -> None:
    write_shared_job(folders.shared, **SLOW)
    process = launch(hosts[0], "hosts", "launch.timeout_s=20", *folders.overrides)
    wait_for(folders.of(hosts[0]) / "checkpoints/step-00000002", process)
    hosts[1].run("ip", "link", "set", "e0", "down")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 1, output
    assert LOST in output.splitlines()[-1], output
    wait_for_reports(folders, hosts)
    hosts[1].run("ip", "link", "set", "e0", "up")
    assert_goes_on_like_one_host(folders, hosts, corpus)


@pytest.mark.long
def test_when_a_rank_is_killed_nothing_runs_on_any_host_any_more_when_it_is_told(
    shared: Path, corpus: Path, hosts: tuple[Host, Host]
) -> None:
    write_shared_job(shared, **SLOW)
    process = launch(hosts[0], "hosts")
    wait_for(shared / "runs/small/checkpoints/step-00000002", process)
    assert len(at_work(hosts)) > 4
    hosts[1].run("pkill", "-KILL", "-f", "launch.local.rank")
    output, _ = process.communicate(timeout=240)
    assert not at_work(hosts)
    assert process.returncode == 1, output
    assert "a host failed: waiting " in output
    assert_goes_on_like_one_host(Folders(shared, own=False), hosts, corpus)


def at_work(hosts: Sequence[Host]) -> list[str]:
    """Command lines of ranks and agents on the hosts."""
    return [line for host in hosts for line in host.processes(" launch.")]


def wait_for_reports(folders: Folders, hosts: Sequence[Host]) -> None:
    """Each host's rank has left a report."""
    deadline = time.monotonic() + 60
    while len({path for host in hosts for path in (folders.of(host) / "launches/0001/reports").glob("rank?")}) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.long
def test_when_the_host_of_the_rendezvous_is_lost_the_relaunch_resumes(
    folders: Folders, corpus: Path, hosts: tuple[Host, Host]
) -> None:
    """With a shared disk on the host that is left; without, once the other is there again."""
    write_shared_job(folders.shared, **SLOW)
    # From the host that stays, which is not the first.
    process = launch(hosts[1], "hosts", "launch.timeout_s=20", *folders.overrides)
    wait_for(folders.of(hosts[1]) / "checkpoints/step-00000002", process)
    hosts[0].kill()
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 1, output
    told = output.splitlines()[-1]
    assert LOST in told or "host 0 failed (exit code 255)" in told, output
    if folders.own:
        hosts[0].start_again()
    elsewhere = [] if folders.own else ["launch.hosts=[n2]", "run.nproc=2"]
    assert_goes_on_like_one_host(folders, hosts, corpus, *elsewhere, by=1)


MORE = ["launch.min_nodes=1", "launch.restarts=3", "offload.window_rows=3000"]


@pytest.mark.long
def test_when_a_host_is_lost_the_job_goes_on_with_those_that_are_left(
    shared: Path, corpus: Path, hosts: tuple[Host, Host]
) -> None:
    write_shared_job(shared, **SLOW)
    process = launch(hosts[0], "hosts", *MORE)
    wait_for(shared / "runs/small/checkpoints/step-00000002", process)
    hosts[1].kill()
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert_like(shared / "runs" / "small", on_one_host(shared, corpus, QUICK))


@pytest.mark.long
def test_without_a_shared_disk_it_goes_on_with_what_those_that_are_left_have_whole(
    shared: Path, corpus: Path, hosts: tuple[Host, Host]
) -> None:
    """The first host has step 2, which it trained alone; half of what both saved is gone with the other one."""
    constant = {"schedule": {"shape": "constant"}}
    write_shared_job(shared, **SLOW | constant | {"checkpoint": {"every": 2, "keep": 5}})
    folders = Folders(shared, own=True)
    process = launch(hosts[0], "hosts", *MORE, *folders.overrides, "launch.hosts=[n1]", "train.steps=2")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    process = launch(hosts[0], "hosts", *MORE, *folders.overrides)
    wait_for(folders.of(hosts[0]) / "checkpoints/step-00000004", process)
    hosts[1].kill()
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    lost = [line for line in output.splitlines() if "step-00000004 was passed over: " in line]
    assert len(lost) == 1, output
    assert "saved on node n2 are on no node of this job" in lost[0] or "saved on node n2 is on no node" in lost[0]
    assert_like(folders.of(hosts[0]), on_one_host(shared, corpus, QUICK))


def assert_like(run: Path, straight: Path) -> None:
    """Both have all 8 steps, each once; a number of ranks that changes changes the order of sums alone."""
    found, expected = losses(run), losses(straight)
    assert len(found) == len(expected) == 8
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], rel=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("engine", ["hosts", "hostfile"])
def test_who_ends_the_launcher_waits_for_the_ranks_elsewhere_which_save(
    engine: str, signum: int, shared: Path, corpus: Path, hosts: tuple[Host, Host]
) -> None:
    """Ctrl-C, or a signal to the launcher alone: both end it with `checkpoint.interrupted_exit`."""
    skip_if_ignored(signum)
    if engine == "hostfile":
        skip_without_namespaces("pdsh")
    write_shared_job(shared, **SLOW | {"checkpoint": {"every": 100, "interrupted_exit": 75}})
    run = shared / "runs" / "small"
    process = launch(hosts[0], engine)
    wait_for(run / "metrics.jsonl", process)
    while not losses(run):
        time.sleep(0.05)
    os.kill(child_of(process), signum)
    output, _ = process.communicate(timeout=240)
    left = checkpoints_in(run / "checkpoints"), at_work(hosts)
    assert process.returncode == 75, output
    assert "s at most for the ranks to save and end" in output
    told = f"interrupted by SIGTERM after step {len(losses(run))}: all is saved in "
    (line,) = [number for number, line in enumerate(output.splitlines()) if line.startswith(told)]
    # DeepSpeed's launcher and pdsh tell of the exit code after it.
    assert engine == "hostfile" or line == len(output.splitlines()) - 1, output
    assert left[0], "nothing was saved when it returned"
    assert not left[1]
    assert_goes_on_like_one_host(Folders(shared, own=False), hosts, corpus)
