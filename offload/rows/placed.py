"""Rows' records where they lie, read and written a block of rows at a time, in fp32 in between.

Shape suffixes: U rows, C slots, W words of a record, X words of a record in fp32, P some of the rows, B rows
of a block.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from offload.rows.records import RecordLayout

_BLOCK_BYTES = 1 << 20  # of records: they and the scratch beside them stay in a core's cache


@dataclass(frozen=True)
class PlacedRecords:
    """The records of U rows in their slots.

    Args:
        layout: of the records.
        records_CW: a window, or a whole shard.
        slots_U: int64, unique, on the device of the records.
    """

    layout: RecordLayout
    records_CW: Tensor
    slots_U: Tensor

    @classmethod
    def in_order(cls, layout: RecordLayout, records_UW: Tensor) -> "PlacedRecords":
        """Records of exactly these rows, in order."""
        return cls(layout, records_UW, torch.arange(len(records_UW), device=records_UW.device))

    def __len__(self) -> int:
        return len(self.slots_U)

    def everything(self) -> Tensor:
        """The indices of all U rows: int64 [U]."""
        return torch.arange(len(self), device=self.slots_U.device)

    def copy_weights(self, indices_P: Tensor, out_UD: Tensor) -> None:
        """Writes the weights of some of the U rows, given by their indices, into theirs of `out_UD` (fp32)."""
        weights_CD = self.layout.weights(self.records_CW)
        if len(indices_P) == len(self):
            out_UD.copy_(weights_CD.index_select(0, self.slots_U))
        else:
            out_UD.index_copy_(0, indices_P, weights_CD.index_select(0, self.slots_U[indices_P]).float())

    def versions(self) -> Tensor:
        """A copy of the versions: int32 [U]."""
        return self.layout.version(self.records_CW).index_select(0, self.slots_U)

    def row_states(self) -> Tensor:
        """A copy of the state of optimizers that keep one number per row: fp32 [U]."""
        return self.layout.state(self.records_CW)[:, 0].index_select(0, self.slots_U)

    def blocks(self, indices_P: Tensor) -> Iterator[slice]:
        """Cuts some of the rows into blocks: on a CPU, such that a block fits into its cache."""
        for start in range(0, len(indices_P), self._block_rows):
            yield slice(start, min(start + self._block_rows, len(indices_P)))

    def scratch(self, *shape: int) -> Tensor:
        """Uninitialised fp32 memory for the largest block: [*shape[:-1], B, shape[-1]]."""
        return self.records_CW.new_empty(*shape[:-1], min(len(self), self._block_rows), shape[-1])

    def gather(self, indices_B: Tensor, out_BX: Tensor) -> Tensor:
        """The records of some rows, unpacked."""
        slots_B = self.slots_U[indices_B]
        if not self.layout.packed:
            return torch.index_select(self.records_CW, 0, slots_B, out=out_BX)
        return self.layout.unpack(self.records_CW.index_select(0, slots_B), out_BX)

    def scatter(self, indices_B: Tensor, rows_BX: Tensor) -> None:
        """Stores unpacked records, whose parts hold values of their dtypes."""
        self.records_CW.index_copy_(0, self.slots_U[indices_B], self.layout.pack(rows_BX))

    @property
    def _block_rows(self) -> int:
        on_cpu = self.records_CW.device.type == "cpu"
        return max(1, _BLOCK_BYTES // self.layout.unpacked.bytes if on_cpu else len(self))
