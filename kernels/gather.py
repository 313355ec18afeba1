"""Gathers table rows for every lookup; the backward sums the lookups' gradients row by row, in a planned order.

N lookups (batch x sequence x slots), U unique rows, D columns of a row.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag


class RowIndex(NamedTuple):
    """Which row every lookup reads, and the lookups grouped by row. `row_index` builds it, once, when planning."""

    index_N: Tensor
    """int32; the row of every lookup, lookups in (batch, token, slot) order."""
    order_N: Tensor
    """int32; the lookups sorted by row, in lookup order within a row."""
    offsets_U: Tensor
    """int32; where every row's group starts in `order_N`."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "RowIndex":
        """The same index on `device`."""
        return RowIndex(*(part.to(device, non_blocking=non_blocking) for part in self))


def row_index(index_N: Tensor, num_rows: int) -> RowIndex:
    """Groups lookups by the row they read.

    Args:
        index_N: integer row of every lookup, of any shape, read in row-major order.
        num_rows: the number of rows U. Rows that no lookup reads have an empty group.

    Raises:
        ValueError: a lookup reads a row outside [0, num_rows).
    """
    index_N = index_N.flatten()
    if index_N.numel() > 0:
        low, high = index_N.aminmax()
        if low < 0 or high >= num_rows:
            raise ValueError(f"lookups read rows {int(low)} to {int(high)}, but the table has rows 0 to {num_rows - 1}")
    index_N = index_N.to(torch.int32)
    # The type that the sort is given matters: torch sorts 32-bit integers by radix, twice as fast as 64-bit ones.
    order_N = index_N.argsort(stable=True).to(torch.int32)
    counts_U = torch.bincount(index_N, minlength=num_rows)
    return RowIndex(index_N, order_N, (counts_U.cumsum(0) - counts_U).to(torch.int32))


def gather(rows_UD: Tensor, index: RowIndex, *, out_dtype: torch.dtype | None = None) -> Tensor:
    """Row of every lookup, [N, D].

    The gradient of `rows_UD` is the sum over each row's lookups in the type of `rows_UD`, added one by one in lookup
    order: it has the same bits on every run and at any number of threads, and zeros for rows that no lookup reads.

    Args:
        rows_UD: the rows, float32 in training.
        index: built by `row_index` for U rows, on the device of the rows.
        out_dtype: type of the result, by default that of the rows. Gradients arrive in it and are summed in the
            type of the rows.

    Raises:
        ValueError: the index was built for another number of rows.
    """
    if index.offsets_U.shape[0] != rows_UD.shape[0]:
        raise ValueError(f"the index was built for {index.offsets_U.shape[0]} rows, but {rows_UD.shape[0]} are given")
    return _Gather.apply(rows_UD, *index, out_dtype or rows_UD.dtype)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_UD: Tensor, index_N: Tensor, order_N: Tensor, offsets_U: Tensor, out_dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(order_N, offsets_U)
        ctx.rows_dtype = rows_UD.dtype
        # Casting commutes with selecting; the smaller of the two tensors is the cheaper one to cast.
        if rows_UD.shape[0] <= index_N.shape[0]:
            return rows_UD.to(out_dtype).index_select(0, index_N)
        return rows_UD.index_select(0, index_N).to(out_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        order_N, offsets_U = ctx.saved_tensors
        return _segment_sum(grad_ND.to(ctx.rows_dtype), order_N, offsets_U), None, None, None, None


def _segment_sum(values_ND: Tensor, order_N: Tensor, offsets_U: Tensor) -> Tensor:
    # A bag is summed by one thread, in order: deterministic without atomics, and no slower than index_add_.
    return embedding_bag(order_N, values_ND, offsets_U, mode="sum")
