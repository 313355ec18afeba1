"""Where a model's rows come from, as the model takes them.

Shape suffixes: B sequences, T tokens of a sequence, U unique rows, D columns of a row.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kernels.gather import row_index
from model.engram import MemoryRows
from offload.plan.plan import Tokens
from offload.step import Rows
from offload.tables import EngramTables


class RowSource(Protocol):
    """Where a model's rows are read, without a step."""

    def look_up(self, tokens_BT: Tensor, positions_BT: Tensor, *, skip: int = 0) -> list[MemoryRows]:
        """What the model reads for a batch, one entry for each Engram layer, on any device.

        Args:
            tokens_BT: int64, on the CPU.
            positions_BT: int64 positions within documents.
            skip: leading tokens that are there only for n-grams to look back to: the model reads nothing for them.
        """


@dataclass(frozen=True)
class TrainedRows:
    """The rows of tables under training, as of now."""

    tables: EngramTables

    def look_up(self, tokens_BT: Tensor, positions_BT: Tensor, *, skip: int = 0) -> list[MemoryRows]:
        """See `RowSource`; the next call may overwrite what this one returned. Collective."""
        memory = memory_of(self.tables.look_up([Tokens(tokens_BT, positions_BT)]), 0)
        if not skip:
            return memory
        return [
            MemoryRows(rows_UD, row_index(index.index_N.view(*tokens_BT.shape, -1)[:, skip:], len(rows_UD)))
            for rows_UD, index in memory
        ]


def memory_of(rows: Rows | None, micro_batch: int) -> list[MemoryRows]:
    """What the model reads for one micro-batch: for each Engram layer the tables' rows; nothing without Engram."""
    return [MemoryRows(*part) for part in rows.of(micro_batch)] if rows else []
