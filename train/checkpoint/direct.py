"""Files written past the system's page cache, where their file system can.

Through the cache, the system finds a page for every 4 KiB, copies them there and writes them back later, on any core:
0.3 to 2.1 s of processor time per GiB, where steps want it, and other files leave the cache. Past it, 0.2 s.
"""

import errno
import fcntl
import mmap
import os
from collections.abc import Iterable

import numpy as np

BLOCK_BYTES = 1 << 20
"""Written at a time, from memory that begins a page: no more than a core's cache holds."""
_DIRECT = getattr(os, "O_DIRECT", 0)


def write_all(descriptor: int, parts: Iterable[memoryview]) -> None:
    """Writes parts one after another to a new file; what is less than a block, at its end, through the cache.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    if not _set_direct(descriptor, True):
        for part in parts:
            _write(descriptor, part)
        return
    block, filled = np.frombuffer(mmap.mmap(-1, BLOCK_BYTES), np.uint8), 0
    for part in parts:
        data = np.frombuffer(part, np.uint8)
        while len(data):
            taken = min(len(data), BLOCK_BYTES - filled)
            block[filled : filled + taken] = data[:taken]
            data, filled = data[taken:], filled + taken
            if filled == BLOCK_BYTES:
                _write(descriptor, block.data)
                filled = 0
    _set_direct(descriptor, False)
    _write(descriptor, block[:filled].data)


def _write(descriptor: int, data: memoryview) -> None:
    while len(data):
        try:
            data = data[os.write(descriptor, data) :]
        except OSError as error:
            # Its file system takes the flag but not the writes, or the rest of one that was cut short.
            if error.errno != errno.EINVAL or not _set_direct(descriptor, False):
                raise


def _set_direct(descriptor: int, direct: bool) -> bool:
    """Whether the file was changed to be written past the cache, or through it."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    wanted = flags | _DIRECT if direct else flags & ~_DIRECT
    if wanted == flags:
        return False
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, wanted)
    except OSError:  # a file system in memory
        return False
    return True
