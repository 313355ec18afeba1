"""The job that two hosts train, from a folder that they share, by `engram launch`; and the same job on this machine."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.command_line import train, write_job
from tests.launch.cluster.two_hosts import ADDRESSES, DISK, SHARED, Host
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


SLOW = {
    "train": {"steps": 8},
    "checkpoint": {"every": 2},
    "offload": {"depth": 0, "emulate_link": {"bytes_per_second": 1e9, "latency_s": 0.5}},
}
"""Steps that last, so that something happens in their midst."""


@dataclass(frozen=True)
class Folders:
    """Where the run is: in the folder that hosts share, or on a disk of each host's `own`, and none is shared."""

    shared: Path
    own: bool

    @property
    def overrides(self) -> list[str]:
        """Of the job."""
        return [f"run.dir={DISK}/runs", "run.local_checkpoints=true"] if self.own else []

    def of(self, host: Host, name: str = "small") -> Path:
        """A run's folder on a host, as this machine sees it."""
        return (host.disk if self.own else self.shared) / "runs" / name

    def of_rank_0(self, hosts: Sequence[Host], name: str = "small") -> Path:
        """That of the host on which rank 0 was last, which has the metrics."""
        runs = [run for host in hosts if (run := self.of(host, name) / "metrics.jsonl").exists()]
        return max(runs, key=lambda path: path.stat().st_mtime).parent


def write_shared_job(shared: Path, **sections: dict[str, Any]) -> Path:
    """The job as it is read on the hosts."""
    job = write_job(shared, SHARED / "corpus", **sections)
    job.write_text(job.read_text().replace(f"dir: {shared}", f"dir: {SHARED}"))
    return job


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
