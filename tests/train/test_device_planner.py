"""A whole job whose steps a device plans, on CPU tensors: the losses, rows and backbone of the CPU's plans."""

from pathlib import Path
from unittest import mock

import pytest
import torch

from offload.plan import finders
from tests.command_line import backbone, engram, losses, table_rows, write_job
from tests.distributed import run_ranks
from train import run
from train.config.file import load
from train.config.job import JobConfig


def train_with(job: Path, planner: str) -> int:
    """Trains on the ranks that are there; returns how often a device found rows."""
    found = mock.Mock(side_effect=finders.DeviceFinder.of_batches)
    with (
        mock.patch.object(run, "join_ranks", return_value=torch.device("cpu")),
        mock.patch.object(finders, "_PLANNING", ("cpu",)),
        mock.patch.object(finders.DeviceFinder, "of_batches", lambda *args: found(*args)),
    ):
        run.train(load(str(job), [f"run.name={planner}", f"offload.planner={planner}"], JobConfig))
    return int(found.call_count)


def test_a_job_has_the_same_bits_whoever_plans(corpus: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path, corpus)
    assert run_ranks(train_with, 2, job, "cpu") == [0, 0]
    assert min(run_ranks(train_with, 2, job, "device")) > 5, "fewer plans than steps and evaluations"
    by_cpu, by_device = (tmp_path / "runs" / planner for planner in ("cpu", "device"))
    assert len(losses(by_cpu)) == 5
    assert losses(by_device) == losses(by_cpu)
    assert table_rows(by_device) == table_rows(by_cpu)
    assert backbone(by_device) == backbone(by_cpu)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to plan on")
def test_a_job_without_a_gpu_is_told_in_one_line_that_no_device_can_plan(corpus: Path, tmp_path: Path) -> None:
    result = engram("train", write_job(tmp_path, corpus), "offload.planner=device", "--nproc", "1")
    assert result.returncode != 0
    (line,) = (line for line in (result.stderr + result.stdout).splitlines() if "offload.planner" in line)
    assert line.endswith("offload.planner=device needs a GPU, and ranks run on the CPU here: set it to auto")
    assert "Traceback" not in result.stderr + result.stdout
