"""The weights of a checkpoint, read on request, and one at a time."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from functools import cached_property

import torch
from torch import Tensor

from train.checkpoint.saved_image import SavedImage
from train.optim.pieces import BUFFER, WEIGHT, TensorInfo


class SavedWeights(Mapping[str, Tensor]):
    """fp32 weights and buffers of the backbone, by name. Of what was read, the last piece is kept.

    Args:
        image: the checkpoint.
    """

    def __init__(self, image: SavedImage) -> None:
        self._image = image
        self._tensors = {
            name: tensor
            for tensor in image.tensors
            for slot, _, name in [tensor.partition("/")]
            if slot in (WEIGHT, BUFFER)
        }
        self._last: tuple[int, Tensor] = -1, torch.empty(0)

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape, read or not."""
        return self._image.tensors[self._tensors[name]]

    def pieces(self, name: str, start: int = 0, count: int | None = None) -> Iterator[Tensor]:
        """A weight in flat pieces, one after another; or the `count` elements of it from `start` on.

        Raises:
            Damaged: one is not what was saved.
        """
        starts, numbers = self._places[self._tensors[name]]
        end = math.prod(self.info(name).shape) if count is None else start + count
        for at in range(bisect_right(starts, start) - 1, bisect_left(starts, end)):
            yield self._read(numbers[at])[max(0, start - starts[at]) : end - starts[at]]

    def _read(self, number: int) -> Tensor:
        if self._last[0] != number:
            self._last = number, self._image.piece(self._image.ranges[number]).values
        return self._last[1]

    @cached_property
    def _places(self) -> dict[str, tuple[list[int], list[int]]]:
        """By tensor, where each of its pieces starts, and the piece's number."""
        found: dict[str, tuple[list[int], list[int]]] = {}
        for number, piece in enumerate(self._image.ranges):
            starts, numbers = found.setdefault(piece.tensor, ([], []))
            starts.append(piece.start)
            numbers.append(number)
        return found

    def copy_to(self, name: str, target: Tensor) -> None:
        """Copies a weight into a tensor of its shape, piece by piece. Raises Damaged."""
        place = 0
        for values in self.pieces(name):
            target.view(-1)[place : place + len(values)].copy_(values)
            place += len(values)

    def __getitem__(self, name: str) -> Tensor:
        info = self.info(name)
        whole = torch.empty(math.prod(info.shape), dtype=info.dtype)
        self.copy_to(name, whole)
        return whole.view(info.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
