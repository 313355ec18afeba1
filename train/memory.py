"""The memory that this process takes."""

from typing import NamedTuple

import psutil
import torch


class MemoryUse(NamedTuple):
    """Bytes."""

    host: int
    """Resident, shared pages included."""
    device_peak: int
    """Most that tensors took on the device so far; 0 on a CPU."""


def memory_use(device: torch.device) -> MemoryUse:
    """What it takes now. Nobody waits for the device: the allocator on the host counts. From any thread."""
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return MemoryUse(psutil.Process().memory_info().rss, peak)
