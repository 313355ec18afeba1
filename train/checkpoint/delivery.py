"""A checkpoint read by all ranks together: each piece by one rank, which sends it to the others that need it.

So each byte is read once in the job, whatever ranks saved and load it, and a node that lacks a part gets it from one
that has it. All ranks go through the pieces in one order, and each waits only for those that concern it: whoever is
farthest behind can always go on. A rank holds three pieces at most, and the disk is told which ones come after these.
(Several threads that read would keep it as busy, but memory that one thread frees another one's heap does not reuse.)

Shape suffixes: P pieces.
"""

import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from train.checkpoint.checked import Damaged
from train.checkpoint.index import Range, RowRange
from train.checkpoint.saved_image import Home, SavedImage, SavedRows
from train.checkpoint.together import together
from train.optim.pieces import Beginning, StatePiece, TensorInfo

_READ_AHEAD, _EXPECTED = 1, 8
_MOST_TENSORS = 3
Piece = TypeVar("Piece", Range, RowRange)


class _Turn(NamedTuple):
    """A piece that this rank reads, gets, or both: its number, who reads it, and the others that want it."""

    number: int
    reader: int
    others: list[int]


class Delivery:
    """An image, as `train.optim.pieces.SavedState` and by rows. All ranks ask for the same in the same order.

    Args:
        image: opened on every rank.
        readers: the ranks that can read each part; not empty.
        group: of all ranks, with communication in host memory.
    """

    def __init__(self, image: SavedImage, readers: Mapping[Home, Sequence[int]], group: dist.ProcessGroup) -> None:
        self._image, self._readers, self._group = image, readers, group
        self._rank = dist.get_rank()

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""
        return self._image.steps

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The backbone's tensors, by name."""
        return self._image.tensors

    def beginning(self, tensor: str) -> Beginning | None:
        """See `SavedState.beginning`."""
        return self._image.beginning(tensor)

    def pieces(self, wanted: Callable[[str, int, int], bool]) -> Iterator[StatePiece]:
        """See `SavedImage.pieces`; to be consumed to the end. Collective.

        Raises:
            Failed: at the end, on all ranks, if one has read what was not saved.
        """
        places = self._image.ranges
        mine = [wanted(place.tensor, place.start, place.count) for place in places]
        for number, (data,) in self._delivered(places, mine, lambda place: (self._image.piece(place).values,)):
            place = places[number]
            yield StatePiece(place.tensor, place.start, data.view(self.tensors[place.tensor].dtype))

    def rows(self, wanted: Callable[[RowRange], bool]) -> Iterator[SavedRows]:
        """The rows of the spans for which `wanted` is true; as `pieces`, with those of a full save before others."""
        spans = self._image.spans
        for _, parts in self._delivered(spans, [wanted(span) for span in spans], self._tensors_of_rows):
            ids_N, records = parts[0].view(torch.int64), parts[1].view(torch.float32)
            yield SavedRows(ids_N, records.view(len(ids_N), -1), *parts[2:])

    def _tensors_of_rows(self, span: RowRange) -> list[Tensor]:
        return [part for part in self._image.rows(span) if part is not None]

    def _delivered(
        self, pieces: Sequence[Piece], mine: list[bool], read: Callable[[Piece], Sequence[Tensor]]
    ) -> Iterator[tuple[int, list[Tensor]]]:
        """The pieces that this rank wants, by number: the bytes of their tensors."""
        turns, failed = self._turns(pieces, mine), False
        mine_to_read = (pieces[turn.number] for turn in turns if turn.reader == self._rank)
        own = _ahead(mine_to_read, read, self._image.expect)
        fault: Damaged | None = None
        for turn in turns:
            if turn.reader == self._rank:
                parts = next(own)
                fault = fault or (parts if isinstance(parts, Damaged) else None)
                # What is damaged reaches nobody, and nothing does after it.
                data = [] if isinstance(parts, Damaged) else parts
                for other in turn.others:
                    self._send(data, other)
            else:
                data = self._receive(turn.reader)
            failed = failed or not data
            if mine[turn.number] and not failed:
                yield turn.number, data

        def tell() -> None:
            if fault:
                raise fault

        together(tell, self._group)

    def _send(self, data: list[Tensor], to: int) -> None:
        sizes = torch.tensor([len(part) for part in data] + [-1] * (_MOST_TENSORS - len(data)))
        for part in (sizes, *(part for part in data if len(part))):
            dist.send(part, to, self._group)

    def _receive(self, source: int) -> list[Tensor]:
        """What `_send` sent; nothing if it could not be read."""
        sizes = torch.empty(_MOST_TENSORS, dtype=torch.int64)
        dist.recv(sizes, source, self._group)
        data = [torch.empty(size, dtype=torch.uint8) for size in sizes.tolist() if size >= 0]
        for part in data:
            if len(part):
                dist.recv(part, source, self._group)
        return data

    def _turns(self, pieces: Sequence[Piece], mine: list[bool]) -> list[_Turn]:
        """What concerns this rank, in the order that all ranks keep to."""
        if not pieces:
            return []
        wants = self._everyones(np.array(mine))
        homes = [self._image.home(piece) for piece in pieces]
        turns: list[_Turn] = []
        travels = False
        for number, home in enumerate(homes):
            able = self._readers[home]
            wanting: list[int] = [rank for rank, bits in enumerate(wants) if bits[number >> 3] & (128 >> (number & 7))]
            if not wanting:
                continue
            both = [rank for rank in wanting if rank in able] or able
            reader = both[number % len(both)]
            others = [rank for rank in wanting if rank != reader]
            travels = travels or bool(others)
            if self._rank in (reader, *wanting):
                turns.append(_Turn(number, reader, others))
        if travels:
            # All parts' first pieces, then their second ones: otherwise ranks would send pieces one after another.
            order = _interleaved(homes)
            turns.sort(key=lambda turn: order[turn.number])
        return turns

    def _everyones(self, mine: NDArray[np.bool_]) -> list[NDArray[np.uint8]]:
        """What each rank wants, eight pieces per byte."""
        bits = torch.from_numpy(np.packbits(mine))
        everyones = [torch.empty_like(bits) for _ in range(dist.get_world_size())]
        dist.all_gather(everyones, bits, self._group)
        return [bits.numpy() for bits in everyones]


def _interleaved(homes: Sequence[Home]) -> list[tuple[int, int]]:
    """The place of each piece in the order: by folder as they come, and there by its number within its part."""
    folders = {folder: place for place, folder in enumerate(dict.fromkeys(home.folder for home in homes))}
    seen: Counter[Home] = Counter()
    order = []
    for home in homes:
        order.append((folders[home.folder], seen[home]))
        seen[home] += 1
    return order


def _ahead(
    pieces: Iterator[Piece], read: Callable[[Piece], Sequence[Tensor]], expect: Callable[[Piece], None]
) -> Iterator[list[Tensor] | Damaged]:
    """Pieces as bytes, read while those before are being consumed; from the first damaged one on, its error."""

    def read_bytes(piece: Piece) -> list[Tensor]:
        return [part.contiguous().flatten().view(torch.uint8) for part in read(piece)]

    with ThreadPoolExecutor(1, "engram-load") as reader:
        expected: deque[Piece] = deque()
        coming: deque[Future[list[Tensor]]] = deque()
        while True:
            for piece in itertools.islice(pieces, _EXPECTED - len(expected)):
                reader.submit(expect, piece)
                expected.append(piece)
            while expected and len(coming) <= _READ_AHEAD:
                coming.append(reader.submit(read_bytes, expected.popleft()))
            if not coming:
                return
            try:
                data = coming.popleft().result()
            except Damaged as error:
                for future in coming:
                    future.cancel()
                while True:
                    yield error
            yield data
