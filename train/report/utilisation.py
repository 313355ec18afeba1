"""Model FLOPs utilisation: which share of what the devices could compute goes into the model (`model/flops.py`)."""

from collections.abc import Callable

import torch

from model.census import take_census
from model.flops import flops_per_token
from train.config.job import JobConfig

_TERA = 1e12
_PEAKS = {
    "H100 PCIe": 756.5,
    "H100 NVL": 835.5,
    "H100": 989.5,
    "H200 NVL": 835.5,
    "H200": 989.5,
    "B200": 2250.0,
    "A100": 312.0,
    "L40S": 362.0,
}
"""TFLOP/s of bf16 products without sparsity, by what a device's name has in it; from NVIDIA's data sheets, which give
twice as much with sparsity."""


def peak_of(device_name: str) -> float | None:
    """Operations a second of bf16 products that a device's data sheet promises; None for one that is not known here."""
    return next((tera * _TERA for name, tera in _PEAKS.items() if name in device_name), None)


def ideal_s_per_token(job: JobConfig, device: torch.device, world_size: int) -> Callable[[int], float] | None:
    """Seconds that all devices together would take for a token at their peak, as a function of its sequence's length.

    None where the peak is not known. Utilisation is what tokens would have taken over what they took.

    Args:
        job: its config: `train.peak_tflops` goes before a data sheet.
        device: of this rank; the others are taken to be alike.
        world_size: number of ranks.
    """
    peak = job.train.peak_tflops * _TERA if job.train.peak_tflops else None
    if peak is None and device.type == "cuda" and job.train.dtype == "bf16":
        peak = peak_of(torch.cuda.get_device_name(device))
    if peak is None:
        return None
    census, rate = take_census(job.model), peak * world_size
    return lambda length: flops_per_token(job.model, census, length).total / rate
