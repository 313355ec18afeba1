"""Rows wherever they are: in a tensor of their own, or where they are stored, to be looked up there without a copy.

Shape suffixes: C records, W words of a record, U rows, P some of them, N lookups, D columns of a row.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels import recycled


class RowValues(NamedTuple):
    """The values of U rows. Nobody may change them for as long as they are looked up."""

    table_CW: Tensor
    """float32, the words of a record side by side, the weights first."""
    places_U: Tensor | None = None
    """int64; the record of every row, or -1 - u where its values are `apart_UD[u]`; all on a CPU where loops are
    compiled. None: the table has these rows alone, and nothing but their values."""
    apart_UD: Tensor | None = None
    """float32; values that differ from those stored. Of the other rows it has anything."""
    bf16: bool = False
    """Whether the stored weights are bfloat16."""

    @property
    def dim(self) -> int:
        """Columns of a row (D)."""
        return (self.table_CW if self.apart_UD is None else self.apart_UD).shape[1]

    def zeros(self) -> Tensor:
        """As many rows of zeros."""
        num_rows = len(self.table_CW if self.places_U is None else self.places_U)
        if self.table_CW.device.type != "cpu":
            return torch.zeros(num_rows, self.dim, device=self.table_CW.device)
        return recycled.empty((num_rows, self.dim), torch.float32).zero_()

    def only(self, rows_P: Tensor | slice) -> "RowValues":
        """Some of the rows, by a slice or by int32 or int64 numbers."""
        if self.places_U is not None:
            return self._replace(places_U=self.places_U[rows_P])
        if isinstance(rows_P, slice):
            return RowValues(self.table_CW[rows_P])
        return RowValues(self.table_CW.index_select(0, rows_P))

    def tensor(self) -> Tensor:
        """They themselves: float32 [U, D]. A copy, unless they have a tensor of their own."""
        if self.places_U is None:
            return self.table_CW
        return self.look_up(torch.arange(len(self.places_U), dtype=torch.int32), torch.float32)

    def look_up(self, index_N: Tensor, dtype: torch.dtype) -> Tensor:
        """The row of every lookup [N, D], of rows that have places.

        Args:
            index_N: int32.
            dtype: float32 or bfloat16, to the nearest value.
        """
        from kernels.gather.values_numba import gather_rows

        assert self.places_U is not None
        assert self.apart_UD is not None
        out_ND = recycled.empty((len(index_N), self.dim), dtype)
        gather_rows(self.table_CW, self.places_U, self.apart_UD, index_N, out_ND, bf16=self.bf16)
        return out_ND
