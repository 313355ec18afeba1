"""A real disk that is full in the middle of a save, and has room again later."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.local.environment import may_use_gpus
from tests.command_line import backbone, losses, table_rows, train, write_job
from tests.launch.test_interrupted_runs import LIMIT_S, QUICK, SLOW, started_quickly, steps_done, wait_until
from train.checkpoint.listing import checkpoints_in

MIB = 1 << 20


@pytest.fixture
def checkpoints(tmp_path: Path) -> Iterator[Path]:
    """The run's folder of checkpoints, on a file system of 32 MiB."""
    folder = tmp_path / "runs" / "small" / "checkpoints"
    folder.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "none", folder], capture_output=True).returncode != 0:
        pytest.skip("no right to mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.long
@pytest.mark.skipif(may_use_gpus(), reason="written for CPUs")
@pytest.mark.parametrize("asynchronous", ["true", "false"], ids=["beside", "in-the-loop"])
def test_a_disk_that_is_full_in_mid_save_costs_that_save_alone(
    asynchronous: str, checkpoints: Path, corpus: Path, tmp_path: Path
) -> None:
    job = write_job(tmp_path, corpus, train={"steps": 10}, checkpoint={"every": 2}, offload=SLOW)
    run = checkpoints.parent
    filler = checkpoints / "filler"
    with started_quickly(job, f"checkpoint.asynchronous={asynchronous}") as command:
        wait_until(lambda: (checkpoints / "step-00000002").exists(), command)
        (saved,) = checkpoints_in(checkpoints)
        size = sum(path.stat().st_size for path in saved.path.iterdir())
        filler.write_bytes(bytes(shutil.disk_usage(checkpoints).free - size // 2))
        log = run / "log.txt"
        wait_until(lambda: "was not saved: " in log.read_text(), command)
        failed_at = steps_done(run)
        assert [found.step for found in checkpoints_in(checkpoints)] == [2], "the one before is as it was"
        wait_until(lambda: steps_done(run) > failed_at, command)
        filler.unlink()
        result = command.result(LIMIT_S)
    assert result.returncode == 0, result.stderr
    (told, *_) = re.findall(r"step (\d+) was not saved: .*no space left on device.*; training goes on", log.read_text())
    assert told == "4"
    assert sorted(path.name for path in checkpoints.iterdir())[-1] == "step-00000010"
    assert not [*checkpoints.glob(".step*")], "what was begun is gone"
    train(job, "run.name=straight", *QUICK)
    straight = run.with_name("straight")
    assert losses(run) == losses(straight)
    assert table_rows(run) == table_rows(straight)
    assert backbone(run) == backbone(straight)
