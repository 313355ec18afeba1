"""A checkpoint read back as what it is whatever ranks wrote it: tensors of the backbone by name, rows by id."""

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from train.checkpoint.checked import Damaged
from train.checkpoint.index import ELSEWHERE, Index, Range, RowRange, Save
from train.checkpoint.listing import held_ranks
from train.checkpoint.manifest import Manifest
from train.checkpoint.part_reader import PartReader
from train.optim.pieces import StatePiece, TensorInfo, check_covered


class Rows(NamedTuple):
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
    """A part of a checkpoint, or of the full save that it adds to: the name of the folder, and the rank that wrote."""

    folder: str
    rank: int


class SavedImage(Protocol):
    """A checkpoint, whatever format it has."""

    path: Path
    """Its folder."""
    here: frozenset[int]
    """The ranks whose parts are in that folder: all of them, but where each node keeps its own."""
    manifest: Manifest
    """What it says of itself."""
    checksum: str
    """Of its manifest, and so of all that is in it."""
    spans: list[RowRange]
    """All rows of the tables, by ids, in parts that are read together."""
    ranges: list[Range]
    """The backbone in pieces, by tensor and place."""

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """The backbone's tensors, by name; see `train.optim.pieces.StatePiece`."""

    @property
    def bytes(self) -> int:
        """Bytes of all files."""

    @property
    def images(self) -> "tuple[Image, ...]":
        """Those of today's format that it consists of."""

    def check_files(self) -> None:
        """Raises Damaged if a file that should be here is missing or has another size; reads none."""

    def home(self, piece: Range | RowRange) -> "Home":
        """Whose part has a piece."""

    def piece(self, place: Range) -> StatePiece:
        """Reads a piece of the backbone.

        Raises:
            Damaged: it is not what was saved.
        """

    def pieces(self, wanted: Callable[[str, int, int], bool]) -> Iterator[StatePiece]:
        """The pieces of the backbone of which `wanted(tensor, start, count)` says so, by tensor and place.

        Raises:
            Damaged: one is not what was saved.
        """

    def rows(self, span: RowRange) -> Rows:
        """Reads rows of the tables.

        Raises:
            Damaged: they are not what was saved.
        """

    def mapped_rows(self, span: RowRange) -> Rows:
        """The same, memory-mapped: to pick some of them."""

    def faults(self) -> Iterator[str]:
        """Reads every byte that is here; what is wrong, once a file."""


class Image:
    """A checkpoint of today's format. Opening it reads manifest and indices; see `train.checkpoint` for the files.

    Args:
        path: its folder.
        read: gives the bytes of manifest and indices.

    Raises:
        Damaged: they cannot be read, are not what was saved, or do not fit each other.
        UserError: the checkpoint has a later format.
    """

    def __init__(self, path: Path, read: Callable[[Path], bytes] = Path.read_bytes) -> None:
        self.path, self._read_text = path, read
        self.manifest, self.checksum = Manifest.read(path, read)
        self.here = held_ranks(path)
        self._indices = [self._read_index(rank) for rank in range(self.manifest.world_size)]
        self._files = PartReader(path, self._indices)
        self.ranges = sorted((p for index in self._indices for p in index.ranges), key=lambda p: (p.tensor, p.start))
        self.spans: list[RowRange] = sorted((p for i in self._indices for p in i.rows), key=lambda p: p.first)
        self._check_whole()

    @property
    def steps(self) -> int:
        """See `SavedImage.steps`."""
        return self.manifest.steps_applied

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """See `SavedImage.tensors`."""
        return self.manifest.infos()

    @property
    def bytes(self) -> int:
        """See `SavedImage.bytes`; the manifest's are left out."""
        return sum(rank.bytes for rank in self.manifest.ranks)

    def check_files(self) -> None:
        """See `SavedImage.check_files`."""
        for fault in self.wrong_files().values():
            raise Damaged(fault)

    @property
    def images(self) -> "tuple[Image, ...]":
        """See `SavedImage.images`."""
        return (self,)

    @property
    def elsewhere(self) -> list[int]:
        """The ranks whose parts other nodes have."""
        return [rank for rank in range(self.manifest.world_size) if rank not in self.here]

    def wrong_files(self) -> dict[int, str]:
        """By rank whose parts are here, what is wrong with the size of a file."""
        return self._files.wrong_sizes(self.here)

    def home(self, piece: Range | RowRange) -> Home:
        """See `SavedImage.home`."""
        return Home(self.path.name, self._files.rank(piece.file))

    def piece(self, place: Range) -> StatePiece:
        """See `SavedImage.piece`."""
        return StatePiece(place.tensor, place.start, self._files.read(place.file, place.name, place.sum))

    def pieces(self, wanted: Callable[[str, int, int], bool]) -> Iterator[StatePiece]:
        """See `SavedImage.pieces`."""
        return (self.piece(place) for place in self.ranges if wanted(place.tensor, place.start, place.count))

    def rows(self, span: RowRange) -> Rows:
        """See `SavedImage.rows`."""
        ids, records = span.names
        rows = Rows(
            self._files.read(span.file, ids, span.ids_sum),
            self._files.read(span.file, records, span.records_sum),
            self._files.read(span.file, span.counts_name, span.counts_sum) if span.counts_sum else None,
        )
        check_rows(span, rows, applied=self._applied)
        return rows

    def mapped_rows(self, span: RowRange) -> Rows:
        """See `SavedImage.mapped_rows`."""
        ids, records = span.names
        return Rows(
            self._files.mapped(span.file, ids, span.ids_sum), self._files.mapped(span.file, records, span.records_sum)
        )

    def faults(self) -> Iterator[str]:
        """See `SavedImage.faults`."""
        seen: set[str] = set()
        pieces: list[Range | RowRange] = [*self.ranges, *self.spans]
        for piece in pieces:
            try:
                if piece.file not in seen and self.home(piece).rank in self.here:
                    self._read(piece)
            except Damaged as error:
                seen.add(piece.file)
                yield str(error)

    def _read(self, piece: Range | RowRange) -> None:
        if isinstance(piece, Range):
            self._files.read(piece.file, piece.name, piece.sum)
        else:
            self.rows(piece)

    def _read_index(self, rank: int) -> Index:
        written, manifest = self.manifest.ranks[rank], self.manifest
        folder = self.path if rank in self.here else self.path / ELSEWHERE
        index, found = Index.read(folder / written.index, self._read_text)
        if found != written.index_sum or index.save != Save(manifest.step, manifest.nonce, rank, manifest.world_size):
            raise Damaged(f"{written.index} is of another save (step {index.save.step}, rank {index.save.rank})")
        return index

    def _check_whole(self) -> None:
        manifest, end = self.manifest, -1
        try:
            check_covered(self.tensors, ((p.tensor, p.start, p.count) for p in self.ranges))
        except ValueError as error:
            raise Damaged(f"its parts do not fit each other: {error}") from None
        for span in self.spans:
            if span.first <= end:
                raise Damaged(f"its parts do not fit each other: row {span.first} is there twice")
            end = span.last
        if self.spans and manifest.addresses is not None and end >= (rows := _num_rows(manifest.addresses)):
            raise Damaged(f"its parts do not fit each other: row {end} of {rows} is there")
        if sum(span.count for span in self.spans) != manifest.num_rows:
            raise Damaged("its parts do not fit each other: some rows are missing")

    @cached_property
    def _applied(self) -> int:
        """Updates of the tables, whose learning rates are known."""
        tables = self.manifest.tables
        return len(tables["learning_rates"]) if tables else 0


def check_rows(span: RowRange, rows: Rows, *, applied: int) -> None:
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
    """Looks rows up by ascending ids (int64), puts their records into `out_UW`, and tells which were there (bool)."""
    there_U = torch.zeros(len(ids_U), dtype=torch.bool)
    if not len(ids_U):
        return there_U
    lowest, highest = int(ids_U[0]), int(ids_U[-1])
    for span in image.spans:
        if span.last < lowest or span.first > highest:
            continue
        start, end = torch.searchsorted(ids_U, torch.tensor([span.first, span.last + 1])).tolist()
        if start == end:
            continue
        held = image.mapped_rows(span)
        places = torch.searchsorted(held.ids_N, ids_U[start:end])
        here = held.ids_N[places] == ids_U[start:end]
        out_UW[start:end][here] = held.records_NW[places[here]]
        there_U[start:end] |= here
    return there_U


def _num_rows(addresses: dict[str, Any]) -> int:
    return sum(sum(primes) for primes in addresses["primes"])
