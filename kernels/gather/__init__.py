"""Gathers table rows for every lookup; the backward sums the lookups' gradients row by row, in a planned order.

Both directions are custom operators, which torch.compile takes as they are: it copies no table and sorts nothing.

N lookups (batch x sequence x slots), U unique rows, D columns of a row.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import recycled
from kernels.gather.segment_sum import segment_sum


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

    The gradient of `rows_UD` is the sum over each row's lookups, in lookup order and in the chunks of
    `kernels.gather.segment_sum`: it has the same bits on every run, at any number of threads, on CPU and GPU, and zeros
    for rows that no lookup reads.

    Args:
        rows_UD: the rows, float32 in training.
        index: built by `row_index` for U rows, on the device of the rows.
        out_dtype: type of the result, by default that of the rows. Gradients arrive in it and are summed in the
            type of the rows, or in float32 where that is narrower.

    Raises:
        ValueError: the index was built for another number of rows.
    """
    if index.offsets_U.shape[0] != rows_UD.shape[0]:
        raise ValueError(f"the index was built for {index.offsets_U.shape[0]} rows, but {rows_UD.shape[0]} are given")
    return _gather(rows_UD, *index, out_dtype or rows_UD.dtype)


@torch.library.custom_op("engram::gather", mutates_args=())
def _gather(rows_UD: Tensor, index_N: Tensor, order_N: Tensor, offsets_U: Tensor, out_dtype: torch.dtype) -> Tensor:
    if rows_UD.is_cuda:
        from kernels.gather.triton import gather_rows

        out_ND = rows_UD.new_empty(len(index_N), rows_UD.shape[1], dtype=out_dtype)
        gather_rows(rows_UD, index_N, out_ND)
        return out_ND
    # Casting commutes with selecting; the smaller of the two tensors is the cheaper one to cast.
    if rows_UD.shape[0] <= index_N.shape[0]:
        return _select(rows_UD.to(out_dtype), index_N)
    return _select(rows_UD, index_N).to(out_dtype)


def _select(rows_UD: Tensor, index_N: Tensor) -> Tensor:
    out_ND = recycled.empty((len(index_N), rows_UD.shape[1]), rows_UD.dtype)
    return torch.index_select(rows_UD, 0, index_N, out=out_ND)


@_gather.register_fake
def _(rows_UD: Tensor, index_N: Tensor, order_N: Tensor, offsets_U: Tensor, out_dtype: torch.dtype) -> Tensor:
    return rows_UD.new_empty(index_N.shape[0], rows_UD.shape[1], dtype=out_dtype)


@torch.library.custom_op("engram::gather_backward", mutates_args=())
def _gather_backward(
    grad_ND: Tensor, index_N: Tensor, order_N: Tensor, offsets_U: Tensor, rows_dtype: torch.dtype
) -> Tensor:
    sum_dtype = torch.promote_types(rows_dtype, torch.float32)
    if grad_ND.is_cuda:
        from kernels.gather.triton import sum_gradients

        return sum_gradients(grad_ND, index_N, order_N, offsets_U, sum_dtype).to(rows_dtype)
    return segment_sum(grad_ND.to(sum_dtype), order_N, offsets_U).to(rows_dtype)


@_gather_backward.register_fake
def _(grad_ND: Tensor, index_N: Tensor, order_N: Tensor, offsets_U: Tensor, rows_dtype: torch.dtype) -> Tensor:
    return grad_ND.new_empty(offsets_U.shape[0], grad_ND.shape[1], dtype=rows_dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows_UD, index_N, order_N, offsets_U, _ = inputs
    ctx.save_for_backward(index_N, order_N, offsets_U)
    ctx.rows_dtype = rows_UD.dtype


def _differentiate(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
    return _gather_backward(grad_ND, *ctx.saved_tensors, ctx.rows_dtype), None, None, None, None


_gather.register_autograd(_differentiate, setup_context=_save)
