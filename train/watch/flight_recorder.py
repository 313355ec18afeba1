"""What each rank's last operations with others were: PyTorch's flight recorder, kept for when one of them does not end.

`torchfrtrace STACKS -p nccl-rank-`, which comes with PyTorch, tells from all ranks' files which one differs.
"""

import os
from contextlib import suppress
from pathlib import Path

import torch
import torch._C._distributed_c10d as c10d

STACKS = "stacks"
"""Folder, in that of the run, with the stacks and last operations of ranks that hung."""
_PREFIX = "nccl-rank-"


def record_operations(folder: Path) -> None:
    """Has PyTorch keep this rank's last operations, and NCCL write them into the run's folder when one does not end.

    To be called before any group of ranks is made. What the user has set stays.
    """
    stacks = (folder / STACKS).absolute()
    with suppress(OSError):  # a folder that cannot be made is told when the run opens it
        stacks.mkdir(parents=True, exist_ok=True)
    wanted = {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_FR_DUMP_TEMP_FILE": str(stacks / _PREFIX),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


def write_operations(folder: Path, rank: int) -> None:
    """Writes what was kept, if anything is, where NCCL would write it. Never raises."""
    dump = getattr(c10d, "_dump_nccl_trace" if torch.cuda.is_available() else "_dump_fr_trace", None)
    if dump is None or not int(os.environ.get("TORCH_FR_BUFFER_SIZE", "0")):
        return
    with suppress(Exception):  # what hangs is told all the same
        # Without PyTorch's own stacks, which may wait for the interpreter's lock: those of all threads are there.
        (folder / STACKS / f"{_PREFIX}{rank}").write_bytes(dump(True, False, False))
