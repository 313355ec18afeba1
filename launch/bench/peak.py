"""Part `peak`: the rate of a large matrix product on one device, of which model FLOPs utilisation is a share."""

import torch

from launch.bench.clock import clock_of, matmul_rate
from launch.bench.devices import open_device
from launch.bench.measure import Spread
from launch.bench.options import BenchOptions
from launch.bench.progress import Progress
from launch.bench.report import Cell, Section

SIZE = {"cuda": 8192, "cpu": 1024}
SECONDS = {"cuda": 0.5, "cpu": 1.0}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def measure_peak(options: BenchOptions, progress: Progress) -> Section:
    """Times products of bf16 and of fp32 matrices, the latter in fp32 throughout.

    Raises:
        ValueError: there is no such device.
    """
    device = open_device(options.device)
    size = SIZE[device.type]
    clock = clock_of(device, SECONDS[device.type])
    progress.expect(len(DTYPES))
    rows: list[dict[str, Cell]] = []
    for name, dtype in DTYPES.items():
        rate = matmul_rate(device, clock, size, dtype)
        rows.append({"dtype": name, "size": size, "TFLOP_per_s": rate / 1e12})
        progress.advance()
    return Section("Products of two square matrices", rows)


def peak_of(section: Section, dtype: str) -> float:
    """Operations a second of one device."""
    (rate,) = (row["TFLOP_per_s"] for row in section.rows if row["dtype"] == dtype)
    if rate is None or isinstance(rate, str | Spread):
        raise TypeError(f"{rate} is no rate")
    return 1e12 * rate
