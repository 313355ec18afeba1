"""A rank's shard of the tables in host memory."""

import mmap
from pathlib import Path

import psutil
import torch
from torch import Tensor

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_CGROUP_USE = Path("/sys/fs/cgroup/memory.current")


class HostTable:
    """Records of a shard in anonymous memory of exactly the size asked for, all zero: no row was ever updated.

    Pages that nobody wrote take no memory.

    Args:
        num_rows: rows of the shard.
        words: fp32 words of a record.

    Raises:
        ValueError: if the machine has less memory free than the shard takes when every row is touched.
    """

    def __init__(self, num_rows: int, words: int) -> None:
        nbytes = num_rows * words * 4
        available = available_memory()
        if nbytes > available:
            raise ValueError(
                f"this rank's shard of the tables takes {nbytes / 2**30:.2f} GiB of host memory and "
                f"{available / 2**30:.2f} GiB are free: lower model.engram.rows_per_head or use more ranks"
            )
        # A mapping of no bytes is refused: an empty shard keeps one word.
        self._memory = mmap.mmap(-1, max(nbytes, 4))
        self.records_RW: Tensor = torch.frombuffer(self._memory, dtype=torch.float32)[: num_rows * words].view(
            num_rows, words
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the shard."""
        return self.records_RW.numel() * 4


def available_memory() -> int:
    """Bytes that this process may still take: the system's available memory, or the container's if that is less."""
    available = psutil.virtual_memory().available
    if _CGROUP_LIMIT.exists() and (limit := _CGROUP_LIMIT.read_text().strip()) != "max":
        available = min(available, int(limit) - int(_CGROUP_USE.read_text()))
    return available
