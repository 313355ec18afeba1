"""The job that two hosts train, from a folder that they share, by `engram launch`; and the same job on this machine."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.command_line import train, write_job
from tests.launch.cluster.two_hosts import ADDRESSES, SHARED, Host
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
