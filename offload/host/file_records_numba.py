"""Reads and writes of records in a file, compiled: each thread waits for the disk without the GIL."""

import numpy as np
from numba import types

from kernels.numba_intrinsics import compiled

_pread = types.ExternalFunction("pread", types.intp(types.int32, types.uintp, types.uintp, types.int64))
_pwrite = types.ExternalFunction("pwrite", types.intp(types.int32, types.uintp, types.uintp, types.int64))


@compiled
def read(file, buffer, stride, rows, slots, window, most, start, end):  # type: ignore[no-untyped-def]
    """Copies the records of `rows[start:end]` into slots, those side by side by one read; 0, or -1 - the place of a row
    that could not be read."""
    words = buffer.view(np.float32)
    place = start
    while place < end:
        size = _run(rows, place, min(end, place + most))
        nbytes = size * stride
        if _pread(file, buffer.ctypes.data, nbytes, rows[place] * stride) != nbytes:
            return -1 - place
        for number in range(size):
            first, slot = number * stride // 4, slots[place + number]
            for word in range(window.shape[1]):
                window[slot, word] = words[first + word]
        place += size
    return 0


@compiled
def write(file, buffer, stride, rows, slots, window, most, start, end):  # type: ignore[no-untyped-def]
    """The way back: see `read`."""
    words = buffer.view(np.float32)
    place = start
    while place < end:
        size = _run(rows, place, min(end, place + most))
        for number in range(size):
            first, slot = number * stride // 4, slots[place + number]
            for word in range(window.shape[1]):
                words[first + word] = window[slot, word]
        nbytes = size * stride
        if _pwrite(file, buffer.ctypes.data, nbytes, rows[place] * stride) != nbytes:
            return -1 - place
        place += size
    return 0


@compiled
def _run(rows, place, end):  # type: ignore[no-untyped-def]
    """How many rows from `place` on lie side by side in the file."""
    size = 1
    while place + size < end and rows[place + size] == rows[place] + size:
        size += 1
    return size
