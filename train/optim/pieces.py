"""The backbone's state as one logical image: named tensors, in pieces, whatever the ranks that hold them."""

import math
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

WEIGHT, BUFFER = "weight", "buffer"


class StatePiece(NamedTuple):
    """Some consecutive elements of one tensor of the image.

    Attributes:
        tensor: `weight/NAME` is the fp32 master weight of the parameter NAME; `exp_avg/`, `exp_avg_sq/` (Adam) and
            `momentum_buffer/` (Muon) are its optimizer's state. `buffer/NAME` is a persistent buffer of the model.
        start: first element, in row-major order.
        values: flat, on any device; fp32 but for buffers.
    """

    tensor: str
    start: int
    values: Tensor


class TensorInfo(NamedTuple):
    """Dtype and logical shape of a tensor of the image."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class Beginning(Enum):
    """How a tensor begins that an image does not have."""

    DRAWN = "drawn"
    """As it was made."""
    ZERO = "zero"
    """With zeros."""


class SavedState(Protocol):
    """An image to continue from."""

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All of its tensors, by name."""

    def beginning(self, tensor: str) -> Beginning | None:
        """How a tensor begins that is not there; None if it must be."""

    def pieces(self, wanted: Callable[[str, int, int], bool]) -> Iterable[StatePiece]:
        """The pieces for which `wanted(tensor, start, count)` is true."""


def check_covered(tensors: Mapping[str, TensorInfo], ranges: Iterable[tuple[str, int, int]]) -> None:
    """Raises ValueError unless (tensor, start, count) cover every tensor exactly once, and nothing else."""
    spans: dict[str, list[tuple[int, int]]] = {name: [] for name in tensors}
    for name, start, count in ranges:
        if name not in spans:
            raise ValueError(f"there are pieces of {name}, which is not one of its tensors")
        spans[name].append((start, count))
    for name, info in tensors.items():
        end = 0
        for start, count in sorted(spans[name]):
            if start != end:
                raise ValueError(f"elements {min(start, end)} to {max(start, end)} of {name} are there twice or not")
            end += count
        if end != math.prod(info.shape):
            raise ValueError(f"{end} of {math.prod(info.shape)} elements of {name} are there")
