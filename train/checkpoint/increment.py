"""A save of the rows that were updated since a full one, read as one image with it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from train.checkpoint.checked import Damaged
from train.checkpoint.image import Image
from train.checkpoint.index import Range, RowRange
from train.checkpoint.piece_list import PieceList
from train.checkpoint.saved_image import Home, SavedImage, SavedRows, find_rows
from train.optim.pieces import StatePiece, TensorInfo


class Increment(SavedImage):
    """A checkpoint: a backbone of its own, and its rows over the base's.

    Args:
        own: what was saved.
        base: the full save that it adds to.

    Raises:
        Damaged: the base is another one.
    """

    bare = False

    def __init__(self, own: Image, base: Image) -> None:
        if own.manifest.base is None or base.checksum != own.manifest.base.checksum:
            raise Damaged(f"{base.path.name} is not the full save that it adds to")
        self.own, self.base = own, base
        self.path, self.manifest, self.checksum = own.path, own.manifest, own.checksum
        self.here, self.ranges = own.here, own.ranges
        # In this order: a row of both is the later one's.
        self.spans = PieceList.joined(RowRange, [base.spans, own.spans])

    @property
    def images(self) -> tuple[Image, ...]:
        """See `SavedImage.images`."""
        return self.own, self.base

    @property
    def steps(self) -> int:
        """See `SavedImage.steps`."""
        return self.own.steps

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """See `SavedImage.tensors`."""
        return self.own.tensors

    @property
    def bytes(self) -> int:
        """See `SavedImage.bytes`; the base's are left out."""
        return self.own.bytes

    def check_files(self) -> None:
        """See `SavedImage.check_files`; the base's too."""
        self.own.check_files()
        with self._naming(self.base):
            self.base.check_files()

    def home(self, piece: Range | RowRange) -> Home:
        """See `SavedImage.home`."""
        return (self._image(piece) if isinstance(piece, RowRange) else self.own).home(piece)

    def expect(self, piece: Range | RowRange) -> None:
        """See `SavedImage.expect`."""
        (self._image(piece) if isinstance(piece, RowRange) else self.own).expect(piece)

    def piece(self, place: Range) -> StatePiece:
        """See `SavedImage.piece`."""
        return self.own.piece(place)

    def rows(self, span: RowRange) -> SavedRows:
        """See `SavedImage.rows`."""
        image = self._image(span)
        with self._naming(image):
            return image.rows(span)

    def mapped_rows(self, span: RowRange) -> SavedRows:
        """See `SavedImage.mapped_rows`."""
        image = self._image(span)
        with self._naming(image):
            return image.mapped_rows(span)

    def faults(self) -> Iterator[str]:
        """See `SavedImage.faults`; the base's too."""
        yield from self.own.faults()
        yield from (f"{self.base.path.name}: {fault}" for fault in self.base.faults())

    def _image(self, span: RowRange) -> Image:
        """Which of both has it; those of the increment ascend, too."""
        number = int(self.own.spans.column("first").searchsorted(span.first))
        return self.own if span in self.own.spans[number : number + 1] else self.base

    @contextmanager
    def _naming(self, image: Image) -> Iterator[None]:
        """Files of both have the same names."""
        try:
            yield
        except Damaged as error:
            raise Damaged(f"{image.path.name}: {error}" if image is self.base else str(error)) from None


def rows_once(image: SavedImage) -> Iterator[SavedRows]:
    """All rows of a checkpoint as it stands, each once.

    Raises:
        Damaged: they are not what was saved.
    """
    of_base = len(image.base.spans) if isinstance(image, Increment) else 0
    for number, span in enumerate(image.spans):
        rows = image.rows(span)
        if isinstance(image, Increment) and number < of_base:
            kept_N = ~find_rows(image.own, rows.ids_N, torch.empty_like(rows.records_NW))
            rows = SavedRows(rows.ids_N[kept_N], rows.records_NW[kept_N])
        yield rows
