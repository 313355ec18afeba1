"""Writes one rank's part of a checkpoint: safetensors files of bounded size, and their index.

Shape suffixes: N rows of a piece, W words of a record.
"""

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Semaphore
from types import TracebackType
from typing import Self

from torch import Tensor

from train.checkpoint.checked import checksum
from train.checkpoint.direct import write_all
from train.checkpoint.index import Index, PartFile, Range, RowRange, Save, Written, index_name
from train.checkpoint.tensor_files import TensorSource, header, tensor_bytes

PIECE_BYTES = 4 << 20
"""The most bytes of a piece: what a reader holds at a time, and reads to check what it needs of it."""
FILE_BYTES = 16 << 20
"""The most bytes of a file's pieces: a writer holds two files' at a time."""
_MOST_UNSYNCED = 2


class PartWriter:
    """Writes a rank's pieces into `folder`. What was given is held until its file is full. A context manager.

    Args:
        folder: of the checkpoint.
        save: whose pieces these are.
    """

    def __init__(self, folder: Path, save: Save) -> None:
        self._folder, self._index = folder, Index(save)
        self._held: list[tuple[TensorSource, memoryview]] = []
        # A file is put together while the one before is written, and those before that travel to the disk.
        self._disk = ThreadPoolExecutor(_MOST_UNSYNCED + 1, "engram-save")
        self._writing: list[Future[None]] = []
        self._handed_over = Semaphore(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._held.clear()
        self._disk.shutdown()

    def add(self, tensor: str, start: int, values: Tensor) -> None:
        """A piece of the backbone, up to `PIECE_BYTES` of elements from `start`; must not change until `finish`."""
        (found,), file = self._hold([(f"{tensor}@{start}", values)])
        self._index.ranges.append(Range(tensor, start, values.numel(), found, file))

    def add_rows(self, ids_N: Tensor, records_NW: Tensor, counts_N: Tensor | None = None) -> None:
        """Rows of the tables, by ascending ids, with their update counts (uint8) if these are known."""
        first, last = int(ids_N[0]), int(ids_N[-1])
        counts = [] if counts_N is None else [(f"counts@{first}", counts_N)]
        found, file = self._hold([(f"ids@{first}", ids_N), (f"records@{first}", records_NW), *counts])
        of_ids, of_records, of_counts = [*found, ""][:3]
        self._index.rows.append(RowRange(first, last, len(ids_N), of_ids, of_records, of_counts, file))

    def finish(self) -> Written:
        """Writes what is held and the index; returns when all of it is on the disk.

        Raises:
            OSError: the disk is full or cannot be written.
        """
        self._write_file()
        self._wait(0)
        text, found = self._index.text()
        path = self._folder / index_name(self._index.save.rank)
        write_synced(path, [text])
        size = len(text) + sum(file.bytes for file in self._index.files)
        return Written(path.name, found, sum(piece.count for piece in self._index.rows), size)

    def _hold(self, tensors: list[tuple[str, Tensor]]) -> tuple[list[str], str]:
        """Keeps tensors for the file under way, written first if it is full; their checksums, and the file's name."""
        sources = [TensorSource.of(name, tensor) for name, tensor in tensors]
        held = sum(source.bytes for source, _ in self._held)
        if held and held + sum(source.bytes for source in sources) > FILE_BYTES:
            self._write_file()
        data = [tensor_bytes(tensor) for _, tensor in tensors]
        self._held += zip(sources, data, strict=True)
        return [checksum(part) for part in data], self._next_name()

    def _next_name(self) -> str:
        return f"rank-{self._index.save.rank:05d}-{len(self._index.files):06d}.safetensors"

    def _write_file(self) -> None:
        if not self._held:
            return
        path, start = self._folder / self._next_name(), header([s for s, _ in self._held], self._index.save.metadata())
        size = len(start) + sum(len(data) for _, data in self._held)
        self._index.files.append(PartFile(path.name, size, checksum(start)))
        self._handed_over.acquire()
        held, self._held = self._held, []
        self._writing.append(self._disk.submit(self._put, path, start, held))
        self._wait(_MOST_UNSYNCED)

    def _put(self, path: Path, start: bytes, held: list[tuple[TensorSource, memoryview]]) -> None:
        """Writes a file; what it holds is released before the disk has it."""
        with _naming(path), ExitStack() as stack:
            try:
                file = stack.enter_context(path.open("wb", buffering=0))
                write_all(file.fileno(), [memoryview(start), *(data for _, data in held)])
            finally:
                held.clear()
                self._handed_over.release()
            os.fsync(file.fileno())

    def _wait(self, most: int) -> None:
        while len(self._writing) > most:
            self._writing.pop(0).result()


def write_synced(path: Path, parts: list[bytes]) -> None:
    """Writes a file and waits until it is on the disk."""
    with _naming(path), path.open("wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Names the file in errors of operations on its descriptor, which do not."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise
