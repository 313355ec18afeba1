from pathlib import Path

import pytest
import torch

from model.census import take_census
from model.flops import flops_per_token
from tests.command_line import write_job
from train.config.file import load
from train.config.job import JobConfig
from train.report.utilisation import peak_of, utilisation_of_rate


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


def test_utilisation_is_the_models_operations_over_what_all_devices_could_do(tmp_path: Path) -> None:
    path = write_job(tmp_path, tmp_path)
    cpu = torch.device("cpu")
    assert utilisation_of_rate(load(path, [], JobConfig), cpu, 2) is None
    job = load(path, ["train.peak_tflops=0.5"], JobConfig)
    flops = flops_per_token(job.model, take_census(job.model), job.data.sequence_length).total
    of_rate = utilisation_of_rate(job, cpu, 2)
    assert of_rate is not None
    assert 1000 * of_rate == pytest.approx(1000 * flops / (2 * 0.5e12))
