"""Slurm's controller and daemons on two hosts of their own; nothing of the machine's own configuration is used."""

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.launch.cluster.two_hosts import ADDRESSES, SHARED, Host, two_hosts
from tests.warm import ROOT

PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "squeue")
_CONF = SHARED / "slurm" / "slurm.conf"
_UP_S = 60


@contextmanager
def slurm_cluster(shared: Path) -> Iterator[tuple[Host, Host]]:
    """Two hosts of a cluster: partition `low` is preempted, and its jobs queued again, by partition `high`."""
    folder = shared / "slurm"
    folder.mkdir()
    (folder / "slurm.conf").write_text(_configuration())
    (folder / "cgroup.conf").write_text("IgnoreSystemd=yes\nCgroupAutomount=yes\n")
    subprocess.run(["/usr/sbin/mungekey", "-c", "-k", folder / "munge.key"], check=True)
    with two_hosts(shared) as hosts:
        for host in hosts:
            host.run("mkdir", "/run/munge")
            places = [f"--{what}-file={SHARED}/slurm/munge.{host.name}.{what}" for what in ("pid", "log", "seed")]
            host.run("munged", "--force", f"--key-file={SHARED}/slurm/munge.key", *places)
        run(hosts[0], "slurmctld", "-f", _CONF)
        for host in hosts:
            run(host, "slurmd", "-f", _CONF, "-N", host.name)
        _wait_until_up(hosts[0])
        yield hosts


def run(host: Host, *words: str | Path) -> str:
    """Runs one of Slurm's programs on a host; returns what it printed."""
    done = subprocess.run(
        host.command(*words), env=environment(), capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout


def environment() -> dict[str, str]:
    """This process's, with the cluster's configuration and this checkout's code."""
    return os.environ | {"SLURM_CONF": str(_CONF), "PYTHONPATH": str(ROOT)}


def _wait_until_up(host: Host) -> None:
    deadline = time.monotonic() + _UP_S
    while (states := run(host, "sinfo", "-h", "-N", "-p", "low", "-o", "%T").split()) != ["idle", "idle"]:
        assert time.monotonic() < deadline, states
        time.sleep(0.5)


def _configuration() -> str:
    first, *_ = ADDRESSES
    places = SHARED / "slurm"
    nodes = "\n".join(
        f"NodeName={name} NodeAddr={address} NodeHostname={name} CPUs=2 RealMemory=2000"
        for name, address in ADDRESSES.items()
    )
    return f"""
ClusterName=engram
SlurmctldHost={first}({ADDRESSES[first]})
AuthType=auth/munge
SlurmUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=30
SlurmdSpoolDir={places}/spool.%n
SlurmdPidFile={places}/slurmd.%n.pid
SlurmdLogFile={places}/slurmd.%n.log
SlurmctldPidFile={places}/slurmctld.pid
SlurmctldLogFile={places}/slurmctld.log
StateSaveLocation={places}/state
MpiDefault=none
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=60 State=UP PriorityTier=1 GraceTime=30
PartitionName=high Nodes=ALL MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
"""
