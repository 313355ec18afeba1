"""Host memory for large results, reused.

By default the C library returns large blocks to the system when they are freed, and the next step's result costs a page
fault for every 4 KiB: several times what filling it with gathered rows takes.
"""

import math
import sys
import threading

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_LARGE = 1 << 20  # bytes; smaller blocks are kept by the C library itself
_WASTE = 2  # a block may be this many times as large as the request
_LINE = 64  # bytes of a cache line: whole ones are written faster

_lock = threading.Lock()
_blocks: list[NDArray[np.uint8]] = []


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory on the CPU: an earlier call's, if no tensor holds it any more. A large block begins a line.

    A block is in use as long as any tensor, view or graph refers to its memory: nothing is overwritten under a holder.
    Smaller blocks that nobody holds are freed when a larger one has to be allocated.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _LARGE:
        return torch.empty(shape, dtype=dtype)
    with _lock:
        block = _take(nbytes + _LINE)
        start = -block.ctypes.data % _LINE
        return torch.from_numpy(block[start : start + nbytes]).view(dtype).view(shape)


def _take(nbytes: int) -> NDArray[np.uint8]:
    for place in range(len(_blocks)):
        if nbytes <= _blocks[place].nbytes <= _WASTE * nbytes and _is_idle(_blocks, place):
            return _blocks[place]
    for place in reversed(range(len(_blocks))):
        if _blocks[place].nbytes < nbytes and _is_idle(_blocks, place):
            del _blocks[place]
    # A little more than requested: the next steps' results differ a little in size.
    _blocks.append(np.empty(nbytes + nbytes // 8, np.uint8))
    return _blocks[-1]


def _references(blocks: list[NDArray[np.uint8]], place: int) -> int:
    # Every tensor on a block's memory holds one, by way of the array that `torch.from_numpy` was given.
    return sys.getrefcount(blocks[place])


_IDLE = _references([np.empty(1, np.uint8)], 0)  # not the same in all versions of Python


def _is_idle(blocks: list[NDArray[np.uint8]], place: int) -> bool:
    return _references(blocks, place) == _IDLE
