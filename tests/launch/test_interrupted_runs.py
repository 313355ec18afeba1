"""A training run that signals end: saved, told, and continued by the same command with the same bits."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launch.local.environment import may_use_gpus
from tests.command_line import backbone, losses, table_rows, train, write_job
from tests.launch.ranks import assert_gone
from tests.signals import skip_if_ignored

SLOW = {"depth": 0, "emulate_link": {"bytes_per_second": 1e9, "latency_s": 0.1}}
"""Every step lasts some tenths of a second."""
QUICK = ["offload.emulate_link=null", "offload.depth=2"]
LIMIT_S = 120
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "launch"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def wait_until(happened: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def started(
    job: Path, *overrides: str, by: tuple[str, ...] | list[str] = ("-m", "launch")
) -> Iterator[subprocess.Popen[str]]:
    """The run, in a process group of its own as a shell starts it."""
    command = [sys.executable, *by, "train", str(job), *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, process_group=0
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def state(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text())
    return found


def steps_done(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def assert_goes_on_like(straight: Path, run: Path, job: Path, *overrides: str) -> None:
    """The same command again comes to the bits of a run that was left alone."""
    if not straight.exists():
        train(job, f"run.name={straight.name}", *QUICK, *overrides)
    train(job, f"run.name={run.name}", *QUICK, *overrides)
    assert state(run)["state"] == "finished"
    assert losses(run) == losses(straight)
    assert table_rows(run) == table_rows(straight)
    assert backbone(run) == backbone(straight)


@pytest.fixture
def job(corpus: Path, tmp_path: Path) -> Path:
    return write_job(tmp_path, corpus, train={"steps": 12}, checkpoint={"every": 100}, eval={"every": 6}, offload=SLOW)


@pytest.mark.skipif(may_use_gpus(), reason="written for CPUs")
class TestASignalInTraining:
    def test_is_obeyed_once_however_often_it_comes(self, job: Path, tmp_path: Path) -> None:
        """As Slurm and terminals send it: twice, to the launcher and to the ranks."""
        skip_if_ignored(signal.SIGINT)
        run = tmp_path / "runs" / "small"
        with started(job, "checkpoint.interrupted_exit=75") as process:
            wait_until(lambda: steps_done(run) >= 2, process)
            assert state(run)["state"] == "running"
            ranks = [json.loads(path.read_text())["pid"] for path in sorted((run / "heartbeats").iterdir())]
            os.killpg(process.pid, signal.SIGINT)
            os.kill(ranks[1], signal.SIGUSR1)
            time.sleep(0.1)
            os.killpg(process.pid, signal.SIGINT)
            out, err = process.communicate(timeout=LIMIT_S)
        assert (process.returncode, err) == (75, "")
        assert len(ranks) == 2
        assert_gone(ranks)
        done = steps_done(run)
        told = f"after step {done}: all is saved in {run}/checkpoints/step-{done:08d}, and the same command goes on"
        assert told in out
        assert told in (run / "log.txt").read_text()
        found = state(run)
        assert (found["state"], found["step"]) == ("interrupted", done)
        assert told in found["why"]
        assert 2 <= done < 12
        assert_goes_on_like(run.with_name("straight"), run, job)

    def test_reaches_the_run_under_torchrun(self, job: Path, tmp_path: Path) -> None:
        run = tmp_path / "runs" / "small"
        with started(job, by=TORCHRUN) as process:
            wait_until(lambda: steps_done(run) >= 2, process)
            process.terminate()
            out, _ = process.communicate(timeout=LIMIT_S)
        assert "interrupted by SIGTERM after step" in out
        assert state(run)["state"] == "interrupted"
        assert_goes_on_like(run.with_name("straight"), run, job)
