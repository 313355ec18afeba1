"""A host or its link is lost in the middle of a run: what is told, and how the run goes on."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.command_line import losses
from tests.launch.cluster.shared_job import SLOW, launch, on_one_host, write_shared_job
from tests.launch.cluster.two_hosts import Host, child_of, wait_for
from train.checkpoint.listing import checkpoints_in


def assert_goes_on_like_one_host(host: Host, shared: Path, corpus: Path, *overrides: str) -> None:
    """The next launch comes to the losses of a run on one host that was left alone."""
    again = launch(host, "hosts", "offload.emulate_link=null", *overrides)
    output, _ = again.communicate(timeout=240)
    assert again.returncode == 0, output
    assert losses(shared / "runs" / "small") == losses(on_one_host(shared, corpus, "offload.emulate_link=null"))


@pytest.mark.long
def test_a_link_that_is_cut_ends_both_sides_with_the_reason_and_the_relaunch_resumes(
    shared: Path, corpus: Path, hosts: tuple[Host, Host]
) -> None:
    write_shared_job(shared, **SLOW)
    process = launch(hosts[0], "hosts", "launch.timeout_s=20")
    wait_for(shared / "runs/small/checkpoints/step-00000002", process)
    hosts[1].run("ip", "link", "set", "e0", "down")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 1, output
    assert "lost another rank, whose host or link failed: " in output.splitlines()[-1], output
    other_side = shared / "runs/small/launches/0001/reports/rank1"
    wait_for(other_side, process=None)
    hosts[1].run("ip", "link", "set", "e0", "up")
    assert_goes_on_like_one_host(hosts[0], shared, corpus)


@pytest.mark.long
def test_when_the_host_of_the_rendezvous_is_lost_the_relaunch_resumes(
    shared: Path, corpus: Path, hosts: tuple[Host, Host]
) -> None:
    write_shared_job(shared, **SLOW)
    # From the host that stays, which is not the first.
    process = launch(hosts[1], "hosts", "launch.timeout_s=20")
    wait_for(shared / "runs/small/checkpoints/step-00000002", process)
    hosts[0].kill()
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 1, output
    told = output.splitlines()[-1]
    assert "lost another rank, whose host or link failed: " in told or "host 0 failed (exit code 255)" in told, output
    assert_goes_on_like_one_host(hosts[1], shared, corpus, "launch.hosts=[n2]", "run.nproc=2")


@pytest.mark.long
def test_when_a_host_is_lost_the_job_goes_on_with_those_that_are_left(
    shared: Path, corpus: Path, hosts: tuple[Host, Host]
) -> None:
    write_shared_job(shared, **SLOW)
    more = ["launch.min_nodes=1", "launch.restarts=3", "offload.window_rows=3000"]
    process = launch(hosts[0], "hosts", *more)
    wait_for(shared / "runs/small/checkpoints/step-00000002", process)
    hosts[1].kill()
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    two, one = (
        run / "metrics.jsonl"
        for run in (shared / "runs" / "small", on_one_host(shared, corpus, "offload.emulate_link=null"))
    )
    assert len(two.read_text().splitlines()) == len(one.read_text().splitlines()) == 8


@pytest.mark.long
def test_who_ends_the_launcher_waits_for_the_ranks_elsewhere_which_save(
    shared: Path, corpus: Path, hosts: tuple[Host, Host]
) -> None:
    write_shared_job(shared, **SLOW | {"checkpoint": {"every": 100}})
    run = shared / "runs" / "small"
    process = launch(hosts[0], "hosts")
    wait_for(run / "metrics.jsonl", process)
    while not losses(run):
        time.sleep(0.05)
    os.kill(child_of(process), signal.SIGTERM)
    output, _ = process.communicate(timeout=240)
    left = checkpoints_in(run / "checkpoints"), [name for host in hosts for name in host.processes("torch")]
    assert process.returncode == 0, output
    assert "s at most for the ranks to save and end" in output
    assert output.splitlines()[-1].startswith("interrupted by SIGTERM after step "), output
    assert left[0], "nothing was saved when it returned"
    assert not left[1]
    assert_goes_on_like_one_host(hosts[0], shared, corpus)
