"""What every checkpoint can do, whatever ranks and whatever version wrote it: tensors by name, rows by id."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from train.checkpoint.checked import Damaged
from train.checkpoint.index import Range, RowRange
from train.checkpoint.manifest import Manifest
from train.checkpoint.piece_list import PieceList
from train.optim.pieces import Beginning, StatePiece, TensorInfo


class SavedRows(NamedTuple):
    """Rows of the tables.

    Attributes:
        ids_N: int64 [N], ascending.
        records_NW: fp32 [N, W].
        counts_N: uint8 [N], how often each was updated, 255 for more; None if that was not saved.
    """

    ids_N: Tensor
    records_NW: Tensor
    counts_N: Tensor | None = None


class Home(NamedTuple):
    """A part of a checkpoint, or of the full save that it adds to: the folder's name, and the rank that wrote it."""

    folder: str
    rank: int


class SavedParts(Protocol):
    """What one save wrote."""

    path: Path
    manifest: Manifest
    here: frozenset[int]
    """See `SavedImage`."""

    @property
    def elsewhere(self) -> list[int]:
        """The ranks whose parts other nodes have."""

    def wrong_files(self) -> dict[int, str]:
        """By rank whose parts are here, what is wrong with the size of a file."""


class SavedImage(Protocol):
    """A checkpoint, whatever format it has."""

    path: Path
    """Its folder."""
    bare: bool
    """Whether rows are weights alone, [N, D], and there is no state of optimizers."""
    here: frozenset[int]
    """The ranks whose parts are in that folder: all of them, except where each node keeps its own."""
    manifest: Manifest
    """What it says about itself."""
    checksum: str
    """Of its manifest, and so of all that is in it."""
    spans: PieceList[RowRange]
    """All rows of the tables, by ids, in parts that are read together."""
    ranges: PieceList[Range]
    """The backbone in pieces, by tensor and place."""

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """The backbone's tensors, by name; see `train.optim.pieces.StatePiece`."""

    def beginning(self, tensor: str) -> Beginning | None:
        """See `train.optim.pieces.SavedState.beginning`: of a run's checkpoint all must be there."""
        return None

    @property
    def bytes(self) -> int:
        """Bytes of all files."""

    @property
    def images(self) -> tuple[SavedParts, ...]:
        """The saves that it consists of, as far as they have today's format."""

    def check_files(self) -> None:
        """Raises Damaged if a file that should be here is missing or has another size; reads none."""

    def home(self, piece: Range | RowRange) -> Home:
        """Whose part has a piece."""

    def expect(self, piece: Range | RowRange) -> None:
        """Tells the system that a piece will be read soon; what is wrong with it, reading it will tell."""

    def piece(self, place: Range) -> StatePiece:
        """Reads a piece of the backbone.

        Raises:
            Damaged: it is not what was saved.
        """

    def pieces(self, wanted: Callable[[str, int, int], bool]) -> Iterator[StatePiece]:
        """The pieces of the backbone for which `wanted(tensor, start, count)` is true, by tensor and place.

        Raises:
            Damaged: one is not what was saved.
        """
        return (self.piece(place) for place in self.ranges if wanted(place.tensor, place.start, place.count))

    def rows(self, span: RowRange) -> SavedRows:
        """Reads rows of the tables.

        Raises:
            Damaged: they are not what was saved.
        """

    def mapped_rows(self, span: RowRange) -> SavedRows:
        """The same, memory-mapped: to pick some of them."""

    def faults(self) -> Iterator[str]:
        """Reads every byte that is here; yields what is wrong, once per file."""


def check_rows(span: RowRange, rows: SavedRows, *, applied: int) -> None:
    """Raises Damaged if rows are not those of `span`, do not ascend, or have more updates than the `applied` ones."""
    ids_N, versions_N = rows.ids_N, rows.records_NW.view(torch.int32)[:, -1]
    if (int(ids_N[0]), int(ids_N[-1]), len(ids_N), len(versions_N)) != (span.first, span.last, span.count, span.count):
        raise Damaged(f"{span.file} has other rows than its index says")
    if bool((ids_N.diff() <= 0).any()):
        raise Damaged(f"{span.file} has rows that do not ascend")
    if int(versions_N.min()) < 1 or int(versions_N.max()) > applied:
        raise Damaged(f"{span.file} has rows with an update that never was")
    if rows.counts_N is not None and (len(rows.counts_N) != span.count or int(rows.counts_N.min()) < 1):
        raise Damaged(f"{span.file} has rows without an update")


def find_rows(image: SavedImage, ids_U: Tensor, out_UW: Tensor) -> Tensor:
    """Looks rows up by ascending ids (int64), puts their records into `out_UW`, and returns which were there (bool)."""
    there_U = torch.zeros(len(ids_U), dtype=torch.bool)
    for part, held, places, here in _held(image, ids_U):
        out_UW[part][here] = held.records_NW[places]
        there_U[part] |= here
    return there_U


def find_counts(image: SavedImage, ids_U: Tensor) -> Tensor:
    """How often rows were updated, by ascending ids (int64): int64 [U], 255 for more; -1 where that was not saved."""
    counts_U = torch.zeros(len(ids_U), dtype=torch.int64)
    for part, held, places, here in _held(image, ids_U):
        counts_U[part][here] = -1 if held.counts_N is None else held.counts_N[places].to(torch.int64)
    return counts_U


def _held(image: SavedImage, ids_U: Tensor) -> Iterator[tuple[slice, SavedRows, Tensor, Tensor]]:
    """For each span that may have some of the ids: which of them, its rows, the places of those it has, and which."""
    if not len(ids_U):
        return
    lowest, highest = int(ids_U[0]), int(ids_U[-1])
    near = (image.spans.column("last") >= lowest) & (image.spans.column("first") <= highest)
    for span in (image.spans[number] for number in near.nonzero()[0].tolist()):
        start, end = torch.searchsorted(ids_U, torch.tensor([span.first, span.last + 1])).tolist()
        if start == end:
            continue
        held = image.mapped_rows(span)
        places = torch.searchsorted(held.ids_N, ids_U[start:end])
        here = held.ids_N[places] == ids_U[start:end]
        yield slice(start, end), held, places[here], here
