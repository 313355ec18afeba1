"""What one rank writes of a checkpoint: safetensors files of bounded size, and an index of the pieces in them.

A piece is a range of one tensor of the backbone, or some rows of the tables. Pieces of all ranks together are the
image; none is there twice. The index has each piece's range, so that a reader opens only what it needs, and the
checksum of each tensor and each file's header, which names the save, so that no file can be taken for another's.

Shape suffixes: N rows of a piece, W words of a record.
"""

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Semaphore
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from train.checkpoint.checked import Damaged, checked_text, checksum, read_checked
from train.checkpoint.tensor_files import TensorSource, header, tensor_bytes

PIECE_BYTES = 4 << 20
"""Most bytes of a piece: what a reader holds at a time, and reads to check what it needs of it."""
FILE_BYTES = 16 << 20
"""Most bytes of a file's pieces: a writer holds two files' at a time."""
_MOST_UNSYNCED = 2


@dataclass(frozen=True)
class Save:
    """Which save a file belongs to.

    Attributes:
        step: steps that were done.
        nonce: drawn for this save.
        rank, world_size: who wrote it.
    """

    step: int
    nonce: str
    rank: int
    world_size: int

    def metadata(self) -> dict[str, str]:
        """For the header of a file."""
        return {key: str(value) for key, value in asdict(self).items()}


@dataclass(frozen=True)
class Range:
    """A piece of the backbone: elements [start, start + count) of a tensor, in row-major order.

    Attributes:
        tensor: `weight/` or another slot's name and the parameter's, or `buffer/` and the buffer's.
        sum: checksum of its bytes.
        file: that it is in.
    """

    tensor: str
    start: int
    count: int
    sum: str
    file: str

    @property
    def name(self) -> str:
        """Of the piece, in its file."""
        return f"{self.tensor}@{self.start}"


@dataclass(frozen=True)
class RowRange:
    """A piece of the tables: `count` rows, the ids of which ascend from `first` to `last`.

    Attributes:
        ids_sum, records_sum: checksums of the bytes of ids (int64 [N]) and records (fp32 [N, W]).
        file: that they are in.
    """

    first: int
    last: int
    count: int
    ids_sum: str
    records_sum: str
    file: str

    @property
    def names(self) -> tuple[str, str]:
        """Of ids and records, in their file."""
        return f"ids@{self.first}", f"records@{self.first}"


@dataclass(frozen=True)
class PartFile:
    """A file of pieces: its name, size in bytes, and the checksum of its header."""

    name: str
    bytes: int
    header_sum: str


@dataclass(frozen=True)
class Index:
    """All that a rank wrote."""

    save: Save
    files: list[PartFile] = field(default_factory=list)
    ranges: list[Range] = field(default_factory=list)
    rows: list[RowRange] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> tuple[Self, str]:
        """The index in a file, and the file's checksum.

        Raises:
            Damaged: it cannot be read, or any byte of it is another.
        """
        values, found = read_checked(path)
        try:
            files = [PartFile(*entry) for entry in values["files"]]
            names = [file.name for file in files]
            ranges = [Range(*_piece(entry, names)) for entry in values["ranges"]]
            rows = [RowRange(*_piece(entry, names)) for entry in values["rows"]]
            return cls(Save(**values["save"]), files, ranges, rows), found
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise Damaged(f"{path.name} is no index of this format ({error!r})") from None

    def text(self) -> tuple[bytes, str]:
        """The index as a file, and that file's checksum."""
        place = {file.name: number for number, file in enumerate(self.files)}
        values: dict[str, Any] = {
            "save": asdict(self.save),
            "files": [[*vars(file).values()] for file in self.files],
            "ranges": [_entry(piece, place) for piece in self.ranges],
            "rows": [_entry(piece, place) for piece in self.rows],
        }
        return checked_text(values)


@dataclass(frozen=True)
class Written:
    """What a rank has put on the disk: its index file, that file's checksum, rows of the tables, and all bytes."""

    index: str
    index_sum: str
    rows: int
    bytes: int


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

    def add_rows(self, ids_N: Tensor, records_NW: Tensor) -> None:
        """Rows of the tables, by ascending ids."""
        first, last = int(ids_N[0]), int(ids_N[-1])
        (of_ids, of_records), file = self._hold([(f"ids@{first}", ids_N), (f"records@{first}", records_NW)])
        self._index.rows.append(RowRange(first, last, len(ids_N), of_ids, of_records, file))

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
        """Writes a file; what it holds is let go of before the disk has it."""
        with _naming(path), path.open("wb", buffering=0) as file:
            try:
                _write_all(file.fileno(), [memoryview(start), *(data for _, data in held)])
            finally:
                held.clear()
                self._handed_over.release()
            os.fsync(file.fileno())

    def _wait(self, most: int) -> None:
        while len(self._writing) > most:
            self._writing.pop(0).result()


def index_name(rank: int) -> str:
    """Name of a rank's index."""
    return f"rank-{rank:05d}.json"


def write_synced(path: Path, parts: list[bytes]) -> None:
    """Writes a file and waits until it is on the disk."""
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def _write_all(descriptor: int, parts: list[memoryview]) -> None:
    for part in parts:
        written = 0
        while written < len(part):
            written += os.write(descriptor, part[written:])


def _entry(piece: Range | RowRange, place: dict[str, int]) -> list[Any]:
    """A piece as a list, with the number of its file for the name."""
    *values, file = vars(piece).values()
    return [*values, place[file]]


def _piece(entry: list[Any], names: list[str]) -> list[Any]:
    """What `_entry` undoes."""
    *values, place = entry
    return [*values, names[place]]


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """What is done with a descriptor alone does not name its file when it fails."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise
