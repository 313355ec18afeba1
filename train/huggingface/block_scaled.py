"""Weights in 8-bit floats with a scale for each block of them, as DeepSeek-V3 is published.

A matrix `X.weight` [R, C] has its scales in `X.weight_scale_inv` [R / B, C / D], rounded up, for blocks of B x D; a
weight is its 8-bit value times its block's scale (README_WEIGHTS.md of deepseek-ai/DeepSeek-V3).

Shape suffixes: N of the R rows, C columns.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from train.errors import UserError
from train.huggingface.folder import Stored, TensorFolder

SCALES = "_scale_inv"
_EIGHT_BITS = "F8_E4M3"
Block = tuple[int, int]


@dataclass(frozen=True)
class BlockScaled:
    """A matrix: its values, their scales, and rows and columns of a block."""

    values: Stored
    scales: Stored
    block: Block

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        return self.values.shape

    def elements(self, start: int, count: int) -> Tensor:
        """Consecutive elements, flat, in row-major order: fp32."""
        columns = self.shape[1]
        first, end = start // columns, -(-(start + count) // columns)
        values_NC = self.values.elements(first * columns, (end - first) * columns).view(-1, columns).float()
        scales = self.scales.elements(0, math.prod(self.scales.shape)).view(self.scales.shape).float()
        scales_NC = scales[torch.arange(first, end) // self.block[0]][:, torch.arange(columns) // self.block[1]]
        return (values_NC * scales_NC).flatten()[start - first * columns :][:count]


def weights_of(folder: TensorFolder, block: Block | None) -> dict[str, Stored | BlockScaled]:
    """A folder's tensors by name, scales with what they scale.

    Args:
        folder: a model's.
        block: rows and columns of a block; None for a model whose weights are not scaled.

    Raises:
        UserError: a tensor of 8 bits has no scales, or scales of another shape.
    """
    return dict(_paired(folder, block))


def _paired(folder: TensorFolder, block: Block | None) -> Iterator[tuple[str, Stored | BlockScaled]]:
    scaled = {name for name, stored in folder.tensors.items() if stored.code == _EIGHT_BITS}
    for name, stored in folder.tensors.items():
        if name not in scaled:
            if name.removesuffix(SCALES) not in scaled:
                yield name, stored
            continue
        scales = folder.tensors.get(name + SCALES)
        if block is None or scales is None or len(stored.shape) != 2:
            raise UserError(f"{name} is {_EIGHT_BITS}, without {name}{SCALES}; convert the weights to bf16 first")
        wanted = tuple(-(-size // part) for size, part in zip(stored.shape, block, strict=True))
        if scales.shape != wanted:
            raise UserError(f"{name}{SCALES} has shape {list(scales.shape)}, but {list(wanted)} for blocks of {block}")
        yield name, BlockScaled(stored, scales, block)
