"""Records of a shard in a file on a local disk, for tables larger than the machine's memory.

Nothing of the file is mapped: whoever asks for records has them read, many at a time, past the system's cache where the
disk allows it, and no page fault waits for the disk. A record begins a sector and has its sectors to itself: so it is
written without being read first, and records side by side travel together.

Shape suffixes: R rows of the shard, C slots, U rows to move, W words of a record.
"""

import errno
import fcntl
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from threading import local

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels import compiled_loops
from offload.errors import Unavailable
from offload.host.disk_space import open_unnamed, reserve

SECTORS = (512, 4096)
"""Bytes that a disk reads and writes at least: the smallest that it takes is used."""
IN_FLIGHT = 32
"""Reads or writes under way at a time: what a disk needs to work at its full rate. Each is a thread that waits."""
_RUN_BYTES = 64 << 10
"""The most that is read or written at once, of records side by side."""
_PARTS = 4
_SCANNED_BYTES = 1 << 20
_FILLED_BYTES = 4 << 20


class FileRecords:
    """What the tables use of a tensor of records [R, W], kept in a file. Several threads may use it at a time.

    All zero at first. The file has no name, and its whole size is written at the start, as fast as the disk takes it:
    into blocks that are merely reserved, file systems let one write in at a time. It is gone with the process, however
    that ends.

    Args:
        num_rows: rows of the shard (R).
        words: fp32 words of a record (W).
        folder: where the file takes its space.

    Raises:
        Unavailable: the folder is not one, cannot be written to, or has too little space.
    """

    device = torch.device("cpu")

    def __init__(self, num_rows: int, words: int, folder: str) -> None:
        self.shape = num_rows, words
        self._folder = folder
        self._file = open_unnamed(folder)
        try:
            self._stride = file_stride(words, _sector_of(self._file))
            reserve(self._file, max(1, num_rows) * self._stride, folder)
        except BaseException:
            os.close(self._file)
            raise
        self._most = max(1, _RUN_BYTES // self._stride)
        self._pool = ThreadPoolExecutor(2 * IN_FLIGHT, "engram-disk")
        self._local = local()
        try:
            self._write_zeros()
        except RuntimeError as error:
            self.close()
            raise Unavailable(
                f"offload.host_file: the system refuses {2 * IN_FLIGHT} threads to wait for the disk ({error}): raise "
                "the process's limits (ulimit -v, -d and -u)"
            ) from None

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return self.shape[0] * self._stride

    def index_select(self, dim: int, rows_U: Tensor) -> Tensor:
        """A copy of the rows' records [U, W]; `dim` is 0."""
        records_UW = torch.empty(len(rows_U), self.shape[1])
        self.fetch(rows_U, records_UW, torch.arange(len(rows_U)))
        return records_UW

    def __setitem__(self, rows_U: Tensor, records_UW: Tensor) -> None:
        self.write(records_UW.contiguous(), torch.arange(len(rows_U)), rows_U)

    def fetch(self, rows_U: Tensor, window_CW: Tensor, slots_U: Tensor) -> None:
        """Copies records of rows (int64, in any order; ascending ones are read together) into slots (int64).

        Raises:
            OSError: the disk fails.
        """
        self._split("reading", rows_U, window_CW, slots_U)

    def write(self, window_CW: Tensor, slots_U: Tensor, rows_U: Tensor) -> None:
        """Copies records of slots to rows: in the order of the file, so that those side by side are written together.

        Raises:
            OSError: the disk fails.
        """
        rows_U, order_U = rows_U.sort()
        self._split("writing", rows_U, window_CW, slots_U[order_U])

    def versions(self, start: int, stop: int) -> Tensor:
        """The versions (int32) of the rows from `start` to `stop`, read from beginning to end."""
        versions = torch.empty(stop - start, dtype=torch.int32)
        rows = max(1, _SCANNED_BYTES // self._stride)
        for first in range(start, stop, rows):
            part = torch.arange(first, min(first + rows, stop))
            versions[part - start] = self.index_select(0, part).view(torch.int32)[:, -1]
        return versions

    def close(self) -> None:
        """Waits for what is under way, and gives up the file."""
        if self._file >= 0:
            self._pool.shutdown()
            os.close(self._file)
            self._file, self.shape = -1, (0, self.shape[1])

    def _write_zeros(self) -> None:
        size = max(1, self.shape[0]) * self._stride

        def write(start: int) -> None:
            os.pwritev(self._file, [memoryview(zeros)[: min(_FILLED_BYTES, size - start)]], start)

        zeros = mmap.mmap(-1, _FILLED_BYTES)
        list(self._pool.map(write, range(0, size, _FILLED_BYTES)))

    def _split(self, what: str, rows_U: Tensor, window_CW: Tensor, slots_U: Tensor) -> None:
        if not len(rows_U):
            return
        rows, slots, window = rows_U.numpy(), slots_U.numpy(), window_CW.numpy()
        move = _mover(what)
        threads = min(IN_FLIGHT, -(-len(rows) // 4))
        parts = min(_PARTS * threads, len(rows))
        taken = count()

        def take() -> None:
            while (part := next(taken)) < parts:
                start, end = len(rows) * part // parts, len(rows) * (part + 1) // parts
                failed = move(self._file, self._buffer(), self._stride, rows, slots, window, self._most, start, end)
                if failed < 0:
                    raise self._failure(what, int(rows[-1 - failed]))

        for done in [self._pool.submit(take) for _ in range(threads)]:
            done.result()

    def _buffer(self) -> NDArray[np.uint8]:
        """This thread's, which begins a page: the disk copies straight from and to it."""
        if not hasattr(self._local, "buffer"):
            self._local.buffer = np.frombuffer(mmap.mmap(-1, self._most * self._stride), np.uint8)
        buffer: NDArray[np.uint8] = self._local.buffer
        return buffer

    def _failure(self, what: str, row: int) -> OSError:
        number, text = errno.EIO, "the disk gave up"
        try:
            os.preadv(self._file, [self._buffer()[: self._stride].data], row * self._stride)
        except OSError as error:
            number, text = error.errno or number, error.strerror or text
        return OSError(number, f"offload.host_file: {what} the tables' file in {self._folder} failed: {text}")


def file_stride(words: int, sector: int) -> int:
    """Bytes from one record to the next in a file."""
    return -(-4 * words // sector) * sector


def _sector_of(file: int) -> int:
    """Reads and writes go past the system's cache from now on, if they can; returns the bytes of a sector."""
    os.ftruncate(file, 2 * SECTORS[-1])  # beyond the end every read succeeds
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT)
    except (OSError, AttributeError):  # a file system in memory; a system without
        return SECTORS[0]
    with mmap.mmap(-1, SECTORS[-1]) as page:
        for sector in SECTORS:
            try:
                with memoryview(page)[:sector] as part:
                    os.preadv(file, [part], sector)
                return sector
            except OSError:
                continue
    fcntl.fcntl(file, fcntl.F_SETFL, flags)
    return SECTORS[0]


def _mover(what: str) -> Callable[..., int]:
    """Moves the records of a part of the rows; returns -1 - index of a row that failed, else 0."""
    if compiled_loops.available():
        from offload.host import file_records_numba as compiled

        return compiled.read if what == "reading" else compiled.write
    return _read if what == "reading" else _write


def _read(file, buffer, stride, rows, slots, window, most, start, end):  # type: ignore[no-untyped-def]
    for place in range(start, end):
        if not _whole(os.preadv, file, buffer[:stride], rows[place] * stride):
            return -1 - place
        window[slots[place]] = buffer[: 4 * window.shape[1]].view(np.float32)
    return 0


def _write(file, buffer, stride, rows, slots, window, most, start, end):  # type: ignore[no-untyped-def]
    for place in range(start, end):
        buffer[: 4 * window.shape[1]] = window[slots[place]].view(np.uint8)
        if not _whole(os.pwritev, file, buffer[:stride], rows[place] * stride):
            return -1 - place
    return 0


def _whole(move: Callable[..., int], file: int, record: NDArray[np.uint8], at: int) -> bool:
    try:
        return move(file, [record], at) == len(record)
    except OSError:  # `FileRecords._failure` says which
        return False
