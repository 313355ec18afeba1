"""The weights of a checkpoint, read on request, and one at a time."""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from train.checkpoint.saved_image import SavedImage
from train.optim.pieces import BUFFER, WEIGHT, TensorInfo


class SavedWeights(Mapping[str, Tensor]):
    """fp32 weights and buffers of the backbone, by name. Nothing that was read is kept.

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

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape, read or not."""
        return self._image.tensors[self._tensors[name]]

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A weight in flat pieces, one after another.

        Raises:
            Damaged: one is not what was saved.
        """
        tensor = self._tensors[name]
        return (piece.values for piece in self._image.pieces(lambda other, *_: other == tensor))

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
