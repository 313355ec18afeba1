"""What becomes of the ranks on other hosts when one fails."""

import os
from pathlib import Path

import pytest

from launch.cluster.processes import HostProcesses
from launch.local.failures import RankFailed


def test_when_a_host_fails_the_others_are_asked_to_end_and_waited_for(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As ssh does, which ends when the command elsewhere has ended: that is asked by the end of its input."""
    other = f"touch {tmp_path}/up; cat; sleep 0.5; touch {tmp_path}/ended"
    failing = f"until [ -e {tmp_path}/up ]; do sleep 0.01; done; exit 7"
    starts = [(["sh", "-c", command], dict(os.environ)) for command in (other, failing)]
    with pytest.raises(RankFailed, match=r"^host 1 failed \(exit code 7\)"):
        HostProcesses(20, attached=True).run(starts, tmp_path / "logs")
    assert (tmp_path / "ended").exists()
    assert "waiting 20 s at most for the ranks on the others" in capfd.readouterr().err
