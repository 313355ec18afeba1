"""`engram doctor` on three hosts, of which one pair has a slow link."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.launch.cluster.shared_job import environment, write_shared_job
from tests.launch.cluster.test_slurm import on_the_hosts
from tests.launch.cluster.two_hosts import ADDRESSES, two_hosts
from tests.warm import ROOT

THIRD = "10.77.0.3"


@pytest.mark.long
def test_the_slowest_pair_of_three_hosts_is_named(shared: Path) -> None:
    """The ranks are told their places by hand, as by a launcher of one's own."""
    write_shared_job(shared)
    doctor = on_the_hosts("engram doctor configs/tiny.yaml")
    meeting = ["MASTER_ADDR=n1", "MASTER_PORT=29400", "WORLD_SIZE=3", "LOCAL_RANK=0", "LOCAL_WORLD_SIZE=1"]
    with two_hosts(shared, n3=THIRD) as hosts:
        _, second, third = hosts
        with second.slow_link_to(THIRD, "50mbit"), third.slow_link_to(ADDRESSES["n2"], "50mbit"):
            started = [
                subprocess.Popen(
                    host.command("env", f"RANK={rank}", *meeting, "DS_ACCELERATOR=cpu", *doctor),
                    env=environment(),
                    cwd=ROOT,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
                for rank, host in enumerate(hosts)
            ]
            told, *others = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], [told, *others]
    (line,) = [line for line in told.splitlines() if "pairs of hosts" in line]
    found = re.search(r"^warning .* slowest is n2 - n3 with (\S+) GB/s each way, median (\S+): look at", line)
    assert found is not None, line
    assert float(found[1]) < 0.02 < float(found[2])
    assert others == ["", ""], "rank 0 tells for all"
