"""The tiny job on two hosts, by `engram launch`: the losses of one host, and what is told when a host is lost."""

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import losses, table_rows, train, write_job
from tests.launch.cluster import slurm_cluster
from tests.launch.cluster.test_launch_page import SLURMS
from tests.launch.cluster.two_hosts import ADDRESSES, SHARED, Host, skip_without_namespaces, two_hosts, wait_for
from tests.warm import ROOT

ON = {
    "nproc": ["run.nproc=1", "launch.gpus=0", "launch.threads=1"],
    "hosts": [
        f"launch.hosts=[{', '.join(ADDRESSES)}]",
        "launch.ssh=true",
        f"launch.ssh_options=[-F, {SHARED}/ssh_config]",
    ],
}
LAUNCH = [sys.executable, "-P", "-m", "launch", "launch", SHARED / "job.yaml"]


@pytest.fixture
def shared(corpus: Path, tmp_path: Path) -> Path:
    """A folder that the hosts share, with the corpus and the job in it."""
    skip_without_namespaces()
    shutil.copytree(corpus, tmp_path / "corpus")
    return tmp_path


def write_shared_job(shared: Path, **sections: dict[str, Any]) -> Path:
    """The job as it is read on the hosts."""
    job = write_job(shared, SHARED / "corpus", **sections)
    job.write_text(job.read_text().replace(f"dir: {shared}", f"dir: {SHARED}"))
    return job


@pytest.fixture
def hosts(shared: Path) -> Iterator[tuple[Host, Host]]:
    with two_hosts(shared) as both:
        yield both


def environment() -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


def launch(host: Host, engine: str, *overrides: str) -> "subprocess.Popen[str]":
    """Starts `engram launch` on a host."""
    command = host.command(*LAUNCH, "--on", engine, *ON["nproc"], *ON["hosts"], *overrides)
    return subprocess.Popen(
        command, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def on_one_host(shared: Path, corpus: Path, *overrides: str) -> Path:
    """Trains the same job here, on as many ranks; returns its run's folder."""
    train(shared / "job.yaml", f"run.dir={shared / 'here'}", f"data.path={corpus}", "--nproc", "2", *overrides)
    return shared / "here" / "small"


def test_torchrun_on_two_hosts_has_the_bits_of_one(shared: Path, corpus: Path, hosts: tuple[Host, Host]) -> None:
    write_shared_job(shared)
    process = launch(hosts[0], "hosts")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert output.count("validation loss ") == 1
    one, two = on_one_host(shared, corpus), shared / "runs" / "small"
    assert losses(two) == losses(one)
    assert table_rows(two) == table_rows(one)
    assert (two / "launches" / "0001" / "code" / "launch" / "cli.py").exists()
    assert (two / "logs" / "rank1.log").exists()


@pytest.mark.long
def test_deepspeeds_launcher_on_two_hosts_has_the_bits_of_one(
    shared: Path, corpus: Path, hosts: tuple[Host, Host]
) -> None:
    skip_without_namespaces("pdsh")
    expert_parallel = [
        "deepspeed.expert_parallel={enabled: true, autoep_size: 2, preset_model: deepseek_v3}",
        "deepspeed.zero_optimization.stage=2",
    ]
    write_shared_job(shared)
    process = launch(hosts[0], "hostfile", *expert_parallel)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    one, two = on_one_host(shared, corpus, *expert_parallel), shared / "runs" / "small"
    assert losses(two) == losses(one)
    assert table_rows(two) == table_rows(one)


SLOW = {
    "train": {"steps": 8},
    "checkpoint": {"every": 2},
    "offload": {"depth": 0, "emulate_link": {"bytes_per_second": 1e9, "latency_s": 0.5}},
}
"""Steps that last, so that something happens in their midst."""


@pytest.mark.long
@pytest.mark.parametrize("engine", ["hosts", "hostfile"])
def test_a_mistake_is_told_last_and_once(engine: str, shared: Path, hosts: tuple[Host, Host]) -> None:
    write_shared_job(shared)
    process = launch(hosts[0], engine, "offload.window_rows=10")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 2, output
    assert output.splitlines()[-1].startswith("Error: offload.window_rows: step 1 alone needs ")
    assert output.count("step 1 alone needs") == 1


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
    again = launch(hosts[0], "hosts", "offload.emulate_link=null")
    output, _ = again.communicate(timeout=240)
    assert again.returncode == 0, output
    assert losses(shared / "runs" / "small") == losses(on_one_host(shared, corpus, "offload.emulate_link=null"))


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
    again = launch(hosts[1], "hosts", "launch.hosts=[n2]", "run.nproc=2", "offload.emulate_link=null")
    output, _ = again.communicate(timeout=240)
    assert again.returncode == 0, output
    assert losses(shared / "runs" / "small") == losses(on_one_host(shared, corpus, "offload.emulate_link=null"))


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
    print(output)
    assert process.returncode == 0, output
    two, one = (
        run / "metrics.jsonl"
        for run in (shared / "runs" / "small", on_one_host(shared, corpus, "offload.emulate_link=null"))
    )
    assert len(two.read_text().splitlines()) == len(one.read_text().splitlines()) == 8


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
    with slurm_cluster.slurm_cluster(shared) as (first, _):
        for command in SLURMS:
            told = slurm_cluster.run(first, *on_the_hosts(command))
            expected = ("all-to-all", "slowest is n1 - n2") if "doctor" in command else ("step 5/5  loss ",)
            assert all(text in told for text in expected), told


def on_the_hosts(command: str) -> list[str]:
    """A command of the page, with this interpreter and the small job."""
    engram = [sys.executable, "-P", "-m", "launch"]
    stands_for = {"engram": engram, "configs/tiny.yaml": [str(SHARED / "job.yaml")]}
    return [each for word in shlex.split(command) for each in stands_for.get(word, [word])]


def wait_for_job(host: Host, number: str, shared: Path, run: str = "small") -> str:
    """Waits until a job of Slurm has ended; returns its log."""
    deadline = time.monotonic() + 200
    while f"JobId={number}" in slurm_cluster.run(host, "squeue", "-h", "-o", "JobId=%A"):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    return (shared / "runs" / run / "launches" / "0001" / "job.log").read_text()
