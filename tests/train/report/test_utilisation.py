from pathlib import Path

import pytest
import torch

from model.census import take_census
from model.flops import flops_per_token
from tests.command_line import write_job
from train.config.file import load
from train.config.job import JobConfig
from train.report.utilisation import ideal_s_per_token, peak_of


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA B200", 2250.0),
        ("Some GPU", None),
    ],
)
def test_peaks_are_known_by_the_devices_name(name: str, tflops: float | None) -> None:
    assert peak_of(name) == (tflops and tflops * 1e12)


def test_ideal_time_is_the_models_operations_over_what_all_devices_could_do(tmp_path: Path) -> None:
    path = write_job(tmp_path, tmp_path)
    cpu = torch.device("cpu")
    assert ideal_s_per_token(load(path, [], JobConfig), cpu, 2) is None
    job = load(path, ["train.peak_tflops=0.5"], JobConfig)
    ideal_s = ideal_s_per_token(job, cpu, 2)
    assert ideal_s is not None
    for length in (job.data.sequence_length, 4 * job.data.sequence_length):
        flops = flops_per_token(job.model, take_census(job.model), length).total
        assert ideal_s(length) == pytest.approx(flops / (2 * 0.5e12))
