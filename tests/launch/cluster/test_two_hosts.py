"""The tiny job on two hosts, by `engram launch`: the losses of one host, and what is told when a host is lost."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import losses, table_rows, train, write_job
from tests.launch.cluster.two_hosts import ADDRESSES, SHARED, Host, skip_without_namespaces, two_hosts
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
