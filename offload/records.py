"""The record of a row: weights, optimizer state and version, side by side in one row of fp32 words.

A record is what travels: one contiguous piece of memory holds all that an update needs. Version 0 marks a row that
was never updated; its weights are not stored but drawn from (seed, row id), so that a table needs no start-up pass.

Shape suffixes: U rows, D columns of a row's weights, W words of a record.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.row_init import initial_rows
from offload.config import TableOptimizerConfig


@dataclass(frozen=True)
class RecordLayout:
    """Where the parts of a record stand.

    Args:
        dim: columns of a row's weights (D).
        state_words: fp32 words of optimizer state.
    """

    dim: int
    state_words: int

    @classmethod
    def of(cls, dim: int, optimizer: TableOptimizerConfig) -> "RecordLayout":
        """The layout for rows of `dim` columns under this optimizer."""
        return cls(dim, 2 * dim if optimizer.type == "adam" else 1)

    @property
    def words(self) -> int:
        """fp32 words of a record: weights, state and one word of version (W)."""
        return self.dim + self.state_words + 1

    @property
    def bytes(self) -> int:
        """Bytes of a record."""
        return 4 * self.words

    def weights(self, records_UW: Tensor) -> Tensor:
        """View [U, D] of the weights."""
        return records_UW[:, : self.dim]

    def state(self, records_UW: Tensor) -> Tensor:
        """View [U, state_words] of the optimizer state."""
        return records_UW[:, self.dim : self.dim + self.state_words]

    def version(self, records_UW: Tensor) -> Tensor:
        """View int32 [U]: the number of the last update that was applied to the row, counted from 1; 0 for none."""
        return records_UW.view(torch.int32)[:, -1]


@dataclass(frozen=True)
class RowInit:
    """How rows that were never updated come to their values.

    Args:
        seed: of the table.
        std: standard deviation of the values.
    """

    seed: int
    std: float

    def fill(self, layout: RecordLayout, records_UW: Tensor, row_ids_U: Tensor) -> None:
        """Writes the initial weights of the rows (job-wide ids, int64) whose version is 0."""
        fresh = (layout.version(records_UW) == 0).nonzero().flatten()
        if fresh.numel():
            weights = initial_rows(row_ids_U[fresh], layout.dim, seed=self.seed, std=self.std)
            layout.weights(records_UW)[fresh] = weights
