"""The machine that figures come from."""

import platform
from pathlib import Path
from typing import Any

import psutil
import torch

from launch.bench.devices import describe_gpu
from train.machine import usable_cores

_CPU_INFO = Path("/proc/cpuinfo")


def describe_machine(threads: int) -> dict[str, Any]:
    """Processor, cores, memory and versions, as a JSON object."""
    return {
        "processor": _processor(),
        "cores": usable_cores(),
        "threads": threads,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **describe_gpu(),
    }


def _processor() -> str:
    if _CPU_INFO.exists():
        for line in _CPU_INFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
