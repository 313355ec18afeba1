"""The machine that figures come from, and that a run is on."""

import platform
from pathlib import Path
from typing import Any

import psutil
import torch

from offload.host.cores import usable_cores

_CPU_INFO = Path("/proc/cpuinfo")
_DRIVER = Path("/proc/driver/nvidia/version")


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


def describe_gpu() -> dict[str, Any]:
    """The first GPU and its driver, as a JSON object; empty where there is none."""
    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "gpu_processors": properties.multi_processor_count,
        "gpus": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
        "driver": _driver(),
        "triton": _triton(),
    }


def _driver() -> str | None:
    try:
        words = _DRIVER.read_text(encoding="utf-8").split("\n")[0].split()
    except OSError:
        return None
    return next((word for word in words if word[0].isdigit() and "." in word), None)


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)
