"""A checkpoint of today's format, read back."""

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from train.checkpoint.checked import Damaged
from train.checkpoint.index import ELSEWHERE, Index, PartFile, Range, RowRange, Save
from train.checkpoint.listing import held_ranks
from train.checkpoint.manifest import Manifest
from train.checkpoint.part_reader import PartReader
from train.checkpoint.piece_list import PieceList
from train.checkpoint.saved_image import Home, SavedImage, SavedRows, check_rows
from train.optim.pieces import StatePiece, TensorInfo, check_covered


class Image(SavedImage):
    """A checkpoint of today's format. Opening it reads manifest and indices; see `train.checkpoint` for the files.

    Args:
        path: its folder.
        read: gives the bytes of manifest and indices.

    Raises:
        Damaged: they cannot be read, are not what was saved, or do not fit each other.
        UserError: the checkpoint has a later format.
    """

    bare = False

    def __init__(self, path: Path, read: Callable[[Path], bytes] = Path.read_bytes) -> None:
        self.path, self._read_text = path, read
        self.manifest, self.checksum = Manifest.read(path, read)
        self.here = held_ranks(path)
        self._homes = [Home(path.name, rank) for rank in range(self.manifest.world_size)]
        self._files, self.ranges, self.spans = self._read_indices()
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
        """See `SavedParts.elsewhere`."""
        return [rank for rank in range(self.manifest.world_size) if rank not in self.here]

    def wrong_files(self) -> dict[int, str]:
        """See `SavedParts.wrong_files`."""
        return self._files.wrong_sizes(self.here)

    def home(self, piece: Range | RowRange) -> Home:
        """See `SavedImage.home`."""
        return self._homes[self._files.rank(piece.file)]

    def expect(self, piece: Range | RowRange) -> None:
        """See `SavedImage.expect`."""
        for name in (piece.name,) if isinstance(piece, Range) else piece.names:
            self._files.expect(piece.file, name)

    def piece(self, place: Range) -> StatePiece:
        """See `SavedImage.piece`."""
        return StatePiece(place.tensor, place.start, self._files.read(place.file, place.name, place.sum))

    def rows(self, span: RowRange) -> SavedRows:
        """See `SavedImage.rows`."""
        ids, records = span.names
        rows = SavedRows(
            self._files.read(span.file, ids, span.ids_sum),
            self._files.read(span.file, records, span.records_sum),
            self._files.read(span.file, span.counts_name, span.counts_sum) if span.counts_sum else None,
        )
        check_rows(span, rows, applied=self._applied)
        return rows

    def mapped_rows(self, span: RowRange) -> SavedRows:
        """See `SavedImage.mapped_rows`."""
        ids, records = span.names
        return SavedRows(
            self._files.mapped(span.file, ids, span.ids_sum),
            self._files.mapped(span.file, records, span.records_sum),
            self._files.mapped(span.file, span.counts_name, span.counts_sum) if span.counts_sum else None,
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

    def _read_indices(self) -> tuple[PartReader, PieceList[Range], PieceList[RowRange]]:
        """All ranks', each let go of once its pieces are in columns."""
        files: dict[Save, list[PartFile]] = {}
        ranges, spans = [], []
        for rank in range(self.manifest.world_size):
            index = self._read_index(rank)
            files[index.save] = index.files
            ranges.append(PieceList.of(Range, index.ranges))
            spans.append(PieceList.of(RowRange, index.rows))
        return (
            PartReader(self.path, files),
            PieceList.joined(Range, ranges).sorted_by("tensor", "start"),
            PieceList.joined(RowRange, spans).sorted_by("first"),
        )

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
        for first, last in zip(self.spans.column("first").tolist(), self.spans.column("last").tolist(), strict=True):
            if first <= end:
                raise Damaged(f"its parts do not fit each other: row {first} is there twice")
            end = last
        if self.spans and manifest.addresses is not None and end >= (rows := _num_rows(manifest.addresses)):
            raise Damaged(f"its parts do not fit each other: row {end} of {rows} is there")
        if self.spans.column("count").sum() != manifest.num_rows:
            raise Damaged("its parts do not fit each other: some rows are missing")

    @cached_property
    def _applied(self) -> int:
        """Updates of the tables, whose learning rates are known."""
        tables = self.manifest.tables
        return len(tables["learning_rates"]) if tables else 0


def _num_rows(addresses: dict[str, Any]) -> int:
    return sum(sum(primes) for primes in addresses["primes"])
