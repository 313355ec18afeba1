"""Large results in host memory that was used before.

By default the C library gives large blocks back to the system when they are freed, and the next step's result costs a
page fault for every 4 KiB of it: several times what it takes to fill them with gathered rows.
"""

import math
import sys
import threading

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_LARGE = 1 << 20  # bytes; smaller blocks are kept by the C library itself
_WASTE = 2  # a block may be so many times as large as what is asked for

_lock = threading.Lock()
_blocks: list[NDArray[np.uint8]] = []


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory on the CPU: that of an earlier call, if no tensor holds it any more.

    A block is in use as long as any tensor, view or graph refers to its memory: nothing is overwritten under a holder.
    Blocks that nobody holds when a larger one has to be made are given back.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _LARGE:
        return torch.empty(shape, dtype=dtype)
    with _lock:
        return torch.from_numpy(_take(nbytes)[:nbytes]).view(dtype).view(shape)


def _take(nbytes: int) -> NDArray[np.uint8]:
    for place in range(len(_blocks)):
        if nbytes <= _blocks[place].nbytes <= _WASTE * nbytes and _is_idle(_blocks, place):
            return _blocks[place]
    for place in reversed(range(len(_blocks))):
        if _blocks[place].nbytes < nbytes and _is_idle(_blocks, place):
            del _blocks[place]
    # A little more than asked for: the next steps' results differ a little in size.
    _blocks.append(np.empty(nbytes + nbytes // 8, np.uint8))
    return _blocks[-1]


def _references(blocks: list[NDArray[np.uint8]], place: int) -> int:
    # Every tensor on a block's memory holds one, by way of the array that `torch.from_numpy` was given.
    return sys.getrefcount(blocks[place])


_IDLE = _references([np.empty(1, np.uint8)], 0)  # not the same in all versions of Python


def _is_idle(blocks: list[NDArray[np.uint8]], place: int) -> bool:
    return _references(blocks, place) == _IDLE
