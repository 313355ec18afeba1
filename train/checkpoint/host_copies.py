"""This rank's part of the backbone, copied to host memory so that steps may go on while it is written."""

from collections.abc import Iterable

import torch
from torch import Tensor

from train.optim.pieces import StatePiece


class HostCopies:
    """Memory for one copy, which every save reuses; pinned for pieces on a GPU, whose copy engines then fill it."""

    def __init__(self) -> None:
        self._memory: dict[tuple[str, int], Tensor] = {}

    @torch.no_grad()
    def copied(self, pieces: Iterable[StatePiece]) -> list[StatePiece]:
        """The pieces as they are now. The next call overwrites them."""
        copies, on_gpu = [], False
        for piece in pieces:
            place, values = (piece.tensor, piece.start), piece.values
            if place not in self._memory:
                self._memory[place] = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            copies.append(piece._replace(values=self._memory[place].copy_(values, non_blocking=True)))
            on_gpu |= values.is_cuda
        if on_gpu:
            torch.cuda.synchronize()
        return copies
