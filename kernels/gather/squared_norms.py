"""The squared norm of each row."""

import torch
from torch import Tensor

from kernels.threads import split_rows

_SHARED = 1 << 15
"""Numbers from which on torch shares an operation among its threads: see `kernels.threads.on_one_thread`."""


def squared_norms(rows_UD: Tensor) -> Tensor:
    """What `torch.linalg.vecdot` makes of rows and themselves: float32 [U], with its bits.

    On a CPU in blocks that stay in a core's cache, shared among threads that wait for nothing afterwards.
    """
    if rows_UD.device.type != "cpu":
        return torch.linalg.vecdot(rows_UD, rows_UD)
    norms_U = rows_UD.new_empty(len(rows_UD))
    size = max(1, (_SHARED - 1) // max(1, rows_UD.shape[1]))

    def take(start: int, end: int) -> None:
        for block_BD, out_B in zip(rows_UD[start:end].split(size), norms_U[start:end].split(size), strict=True):
            torch.linalg.vecdot(block_BD, block_BD, out=out_B)

    split_rows(len(rows_UD), take)
    return norms_U
