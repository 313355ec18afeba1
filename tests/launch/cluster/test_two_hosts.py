"""The tiny job on two hosts, by `engram launch` and others: the losses of one host, and what is told of a mistake."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

from tests.command_line import losses, table_rows
from tests.launch.cluster.shared_job import Folders, environment, launch, on_one_host, write_shared_job
from tests.launch.cluster.test_launch_page import ON_HOSTS
from tests.launch.cluster.two_hosts import SHARED, Host, skip_without_namespaces
from tests.warm import ROOT
from train.report.metrics import METRICS_FILE, read_metrics


@pytest.mark.long
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
@pytest.mark.parametrize("engine", ["hosts", "hostfile"])
def test_with_experts_on_two_hosts_it_has_the_bits_of_one(
    engine: str, shared: Path, corpus: Path, hosts: tuple[Host, Host]
) -> None:
    if engine == "hostfile":
        skip_without_namespaces("pdsh")
    expert_parallel = [
        "deepspeed.expert_parallel={enabled: true, autoep_size: 2, preset_model: deepseek_v3}",
        "deepspeed.zero_optimization.stage=2",
    ]
    write_shared_job(shared)
    process = launch(hosts[0], engine, *expert_parallel)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    one, two = on_one_host(shared, corpus, *expert_parallel), shared / "runs" / "small"
    assert losses(two) == losses(one)
    assert table_rows(two) == table_rows(one)


@pytest.mark.long
def test_the_lines_that_are_printed_for_each_host_are_one_job(
    shared: Path, corpus: Path, hosts: tuple[Host, Host]
) -> None:
    write_shared_job(shared)
    printed, _ = launch(hosts[0], "hosts", "launch.ssh=false").communicate(timeout=60)
    lines = re.findall(r"^  (n\d):  (bash .*)$", printed, re.MULTILINE)
    assert [name for name, _ in lines] == ["n1", "n2"], printed
    by_name = {host.name: host for host in hosts}
    started = [
        subprocess.Popen(
            by_name[name].command(*shlex.split(line)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for name, line in lines
    ]
    told = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], told
    assert losses(shared / "runs" / "small") == losses(on_one_host(shared, corpus))


@pytest.mark.long
def test_without_a_shared_disk_the_run_goes_on_with_the_hosts_changed_over(
    shared: Path, corpus: Path, hosts: tuple[Host, Host]
) -> None:
    """Each host has a `/tmp` of its own, in which it keeps its half of each checkpoint."""
    write_shared_job(shared, train={"steps": 8}, checkpoint={"every": 2}, schedule={"shape": "constant"})
    local = ["run.dir=/tmp/runs", "run.local_checkpoints=true"]
    for names, steps in (("n1, n2", 4), ("n2, n1", 8)):
        process = launch(hosts[0], "hosts", *local, f"launch.hosts=[{names}]", f"train.steps={steps}")
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
    one = on_one_host(shared, corpus)
    first, second = (Path(f"/proc/{host.pid}/root/tmp/runs/small") for host in hosts)
    # Rank 0 writes them, on the host that torchrun has given it.
    assert losses(one)[-4:] in [losses(run)[-4:] for run in (first, second) if (run / METRICS_FILE).exists()]
    whole = shared / "whole"
    shutil.copytree(first, whole)
    for part in (second / "checkpoints" / "step-00000008").glob("rank-*"):
        shutil.copy(part, whole / "checkpoints" / "step-00000008")
    assert table_rows(whole) == table_rows(one)
    begin_another_phase(shared, corpus, hosts, local, whole)
    for host in hosts:
        host.run("rm", "-r", "/tmp/runs/small/checkpoints/step-00000006")
    hosts[0].run("rm", "-r", "/tmp/runs/small/checkpoints/step-00000008")
    lost = launch(hosts[0], "hosts", *local, "train.steps=10")
    output, _ = lost.communicate(timeout=240)
    assert lost.returncode == 2, output
    assert "are on no node of this job" in output


def begin_another_phase(shared: Path, corpus: Path, hosts: tuple[Host, Host], local: list[str], whole: Path) -> None:
    """Hosts begin with what each of them has its part of, and have the bits of one host that has all of it."""
    phase = ["run.name=next", "train.steps=2", "checkpoint.every=null"]
    process = launch(hosts[0], "hosts", *local, *phase, "checkpoint.init_from=/tmp/runs/small")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    on_one_host(shared, corpus, *phase, f"checkpoint.init_from={whole}")
    runs = [Path(f"/proc/{host.pid}/root/tmp/runs/next") for host in hosts]
    (there,) = [losses(run) for run in runs if (run / METRICS_FILE).exists()]
    assert there == losses(shared / "here" / "next")


@pytest.mark.long
def test_over_a_slow_link_the_bits_are_the_same_and_looking_ahead_hides_the_fetches(
    folders: Folders, corpus: Path, hosts: tuple[Host, Host]
) -> None:
    late = {"offload": {"emulate_link": {"bytes_per_second": 1e9, "latency_s": 0.05}}}
    write_shared_job(folders.shared, train={"steps": 10}, checkpoint={"every": 10}, **late)
    with hosts[0].slow_link("20mbit"), hosts[1].slow_link("20mbit"):
        for depth in (0, 2):
            wanted = [f"offload.depth={depth}", f"run.name=depth{depth}", *folders.overrides]
            process = launch(hosts[0], "hosts", *wanted)
            output, _ = process.communicate(timeout=240)
            assert process.returncode == 0, output
    synchronous, ahead = (folders.of_rank_0(hosts, f"depth{depth}") for depth in (0, 2))
    one = on_one_host(folders.shared, corpus, "offload.emulate_link=null")
    assert losses(synchronous) == losses(ahead) == losses(one)
    if not folders.own:
        assert table_rows(synchronous) == table_rows(ahead) == table_rows(one)
    assert median(stalls_ms(ahead)) < median(stalls_ms(synchronous)) / 2


def stalls_ms(run: Path) -> list[float]:
    """What the steps waited for rows."""
    return [record["offload.stall_ms"] for record in read_metrics(run / METRICS_FILE)]


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
@pytest.mark.parametrize("command", ON_HOSTS, ids=lambda command: command.split()[0])
def test_launchers_of_others_on_two_hosts_have_the_bits_of_one(
    command: str, shared: Path, corpus: Path, hosts: tuple[Host, Host]
) -> None:
    skip_without_namespaces(command.split()[0] if command.startswith("mpirun") else "ssh")
    write_shared_job(shared)
    by_ssh = ["--allow-run-as-root", "--oversubscribe", "--mca", "plm_rsh_args", f"-F {SHARED}/ssh_config"]
    stands_for = {
        "torchrun": [sys.executable, "-m", "torch.distributed.run"],
        "mpirun": ["mpirun", *by_ssh, "-x", "PYTHONPATH", "-x", "DS_ACCELERATOR", "-x", "PATH"],
        "engram": [sys.executable, "-P", "-m", "launch"],
        "configs/tiny.yaml": [str(SHARED / "job.yaml")],
        "--nproc-per-node=8": ["--nproc-per-node=1"],
        "--rdzv-endpoint=node1:29400": ["--rdzv-endpoint=n1:29400"],
        "16": ["2"],
        "node1:8,node2:8": ["n1,n2"],
        "MASTER_ADDR=node1": ["MASTER_ADDR=n1"],
    }
    words = [each for word in shlex.split(command) for each in stands_for.get(word, [word])]
    started = [
        subprocess.Popen(
            host.command(*words),
            env=environment() | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for host in (hosts if command.startswith("torchrun") else hosts[:1])
    ]
    told = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), told
    assert "".join(told).count("validation loss ") == 1
    assert losses(shared / "runs" / "small") == losses(on_one_host(shared, corpus))
