"""What of a checkpoint is in which file: the pieces that one rank wrote, and their checksums.

A piece is a range of one tensor of the backbone, or some rows of the tables. Pieces of all ranks together are the
image; none occurs twice. The index has each piece's range, so that a reader opens only what it needs, and the checksum
of each tensor and each file's header, which names the save, so that no file can be taken for another's.

Shape suffixes: N rows of a piece, W words of a record.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from train.checkpoint.checked import Damaged, checked_text, read_checked

ELSEWHERE = "elsewhere"
"""Folder, in a checkpoint's, of the indices of parts that another node has."""


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
        tensor: `weight/` or another kind of state and the parameter's name, or `buffer/` and the buffer's.
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
        counts_sum: that of their update counts (uint8 [N]); empty if these are not there, as before format 4.
        file: that they are in.
    """

    first: int
    last: int
    count: int
    ids_sum: str
    records_sum: str
    counts_sum: str
    file: str

    @property
    def names(self) -> tuple[str, str]:
        """Of ids and records, in their file."""
        return f"ids@{self.first}", f"records@{self.first}"

    @property
    def counts_name(self) -> str:
        """Of the update counts."""
        return f"counts@{self.first}"


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
    def read(cls, path: Path, read: Callable[[Path], bytes] = Path.read_bytes) -> tuple[Self, str]:
        """The index in a file, and the file's checksum. `read` gives a file's bytes.

        Raises:
            Damaged: it cannot be read, or any byte of it differs.
        """
        values, found = read_checked(path, read)
        try:
            files = [PartFile(*entry) for entry in values["files"]]
            names = [file.name for file in files]
            ranges = [Range(*_piece(entry, names)) for entry in values["ranges"]]
            rows = [RowRange(*_with_counts(_piece(entry, names))) for entry in values["rows"]]
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


def index_name(rank: int) -> str:
    """Name of a rank's index."""
    return f"rank-{rank:05d}.json"


def _entry(piece: Range | RowRange, place: dict[str, int]) -> list[Any]:
    """A piece as a list, with the number of its file for the name."""
    *values, file = vars(piece).values()
    return [*values, place[file]]


def _piece(entry: list[Any], names: list[str]) -> list[Any]:
    """The inverse of `_entry`."""
    *values, place = entry
    return [*values, names[place]]


def _with_counts(row_range: list[Any]) -> list[Any]:
    """An entry of rows in the form it has from format 4 on."""
    return row_range if len(row_range) == len(fields(RowRange)) else [*row_range[:-1], "", row_range[-1]]
