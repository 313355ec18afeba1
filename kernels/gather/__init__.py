"""Gathers table rows for every lookup; the backward sums the lookups' gradients row by row, in a planned order.

Both directions are custom operators, which torch.compile takes as they are: it copies no table and sorts nothing.

N lookups (batch x sequence x sub-tables), U rows, D columns of a row, V segments: the lookups of one row.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import compiled_loops, recycled
from kernels.gather.segment_sum import segment_sum
from kernels.gather.values import RowValues


class RowIndex(NamedTuple):
    """The row that every lookup reads, and the lookups in segments, one per row. `row_index` builds it when planning.

    Its size depends on the lookups alone, however many rows none of them reads.
    """

    rows_V: Tensor
    """int32; the rows that are read, ascending: one per segment. If all U are read, only its length is used."""
    segment_N: Tensor
    """int32; the segment of every lookup, lookups in (batch, token, sub-table) order."""
    order_N: Tensor
    """int32; the lookups sorted by segment, in lookup order within each."""
    offsets_V: Tensor
    """int32; where every segment starts in `order_N`."""
    num_rows: int
    """U, the number of rows to look up in."""
    stored: RowValues | None = None
    """Those that are read where they are stored, one per segment, if they are looked up there."""

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The index itself."""
        return self.rows_V, self.segment_N, self.order_N, self.offsets_V

    @property
    def index_N(self) -> Tensor:
        """int32; the row of every lookup."""
        return _rows_of(self.rows_V, self.segment_N, self.num_rows)

    @property
    def compact(self) -> "RowIndex":
        """The same lookups into only the rows that are read, side by side."""
        return self._replace(num_rows=len(self.rows_V))

    def map(self, change: Callable[[Tensor], Tensor]) -> "RowIndex":
        """The index with every tensor replaced."""
        rows_V, segment_N, order_N, offsets_V = map(change, self.tensors)
        return self._replace(rows_V=rows_V, segment_N=segment_N, order_N=order_N, offsets_V=offsets_V)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "RowIndex":
        """The same index on `device`."""
        return self.map(lambda part: part.to(device, non_blocking=non_blocking))


def row_index(index_N: Tensor, num_rows: int) -> RowIndex:
    """Puts the lookups of each row into a segment.

    Args:
        index_N: integer row of every lookup, of any shape, read in row-major order.
        num_rows: the number of rows U.

    Raises:
        ValueError: a lookup reads a row outside [0, num_rows).
    """
    index_N = index_N.flatten()
    if index_N.numel() > 0:
        low, high = index_N.aminmax()
        if low < 0 or high >= num_rows:
            raise ValueError(f"lookups read rows {int(low)} to {int(high)}, but the table has rows 0 to {num_rows - 1}")
    # The type of the sort's input matters: torch sorts 32-bit integers by radix, twice as fast as 64-bit ones.
    sorted_N, order_N = index_N.to(torch.int32).sort(stable=True)
    rows_V, segments_N, counts_V = sorted_N.unique_consecutive(return_inverse=True, return_counts=True)
    segment_N = torch.empty_like(segments_N).scatter_(0, order_N, segments_N)
    offsets_V = counts_V.cumsum(0) - counts_V
    return RowIndex(rows_V, segment_N, order_N, offsets_V, num_rows).map(lambda part: part.to(torch.int32))


def gather(rows_UD: Tensor, index: RowIndex, *, out_dtype: torch.dtype | None = None) -> Tensor:
    """Row of every lookup, [N, D].

    The gradient of `rows_UD` is the sum over each row's lookups, in lookup order and in the chunks of
    `kernels.gather.segment_sum`: it has the same bits on every run, at any number of threads, on CPU and GPU, and zeros
    for rows that no lookup reads.

    With `index.stored` the values are read there, and `rows_UD` only receives the gradient.

    Args:
        rows_UD: the rows, float32 in training.
        index: built by `row_index` for U rows, on the device of the rows.
        out_dtype: type of the result, by default that of the rows. Gradients arrive in it and are summed in the
            type of the rows, or in float32 where that is narrower.

    Raises:
        ValueError: the index was built for another number of rows.
    """
    if index.num_rows != rows_UD.shape[0]:
        raise ValueError(f"the index was built for {index.num_rows} rows, but {rows_UD.shape[0]} are given")
    out_dtype = out_dtype or rows_UD.dtype
    if index.stored is None:
        return _gather(rows_UD, *index.tensors, out_dtype)
    return _gather_stored(rows_UD, *index.tensors, out_dtype, *index.stored)


def _rows_of(rows_V: Tensor, segment_N: Tensor, num_rows: int) -> Tensor:
    # Where every row is read, segment and row have the same number.
    return segment_N if len(rows_V) == num_rows else rows_V.index_select(0, segment_N)


@torch.library.custom_op("engram::gather", mutates_args=())
def _gather(
    rows_UD: Tensor, rows_V: Tensor, segment_N: Tensor, order_N: Tensor, offsets_V: Tensor, out_dtype: torch.dtype
) -> Tensor:
    if rows_UD.is_cuda:
        from kernels.gather.triton import gather_rows

        out_ND = rows_UD.new_empty(len(segment_N), rows_UD.shape[1], dtype=out_dtype)
        gather_rows(rows_UD, rows_V, segment_N, out_ND)
        return out_ND
    index_N = _rows_of(rows_V, segment_N, len(rows_UD))
    # Casting commutes with selecting; the smaller of the two tensors is the cheaper one to cast.
    if rows_UD.shape[0] <= index_N.shape[0]:
        return _select(rows_UD.to(out_dtype), index_N)
    return _select(rows_UD, index_N).to(out_dtype)


def _select(rows_UD: Tensor, index_N: Tensor) -> Tensor:
    out_ND = recycled.empty((len(index_N), rows_UD.shape[1]), rows_UD.dtype)
    return torch.index_select(rows_UD, 0, index_N, out=out_ND)


@_gather.register_fake
def _(
    rows_UD: Tensor, rows_V: Tensor, segment_N: Tensor, order_N: Tensor, offsets_V: Tensor, out_dtype: torch.dtype
) -> Tensor:
    return rows_UD.new_empty(segment_N.shape[0], rows_UD.shape[1], dtype=out_dtype)


@torch.library.custom_op("engram::gather_stored", mutates_args=())
def _gather_stored(
    rows_UD: Tensor, rows_V: Tensor, segment_N: Tensor, order_N: Tensor, offsets_V: Tensor, out_dtype: torch.dtype,
    table_CW: Tensor, places_V: Tensor, apart_UD: Tensor, bf16: bool,
) -> Tensor:  # fmt: skip
    return RowValues(table_CW, places_V, apart_UD, bf16).look_up(segment_N, out_dtype)


@_gather_stored.register_fake
def _(
    rows_UD: Tensor, rows_V: Tensor, segment_N: Tensor, order_N: Tensor, offsets_V: Tensor, out_dtype: torch.dtype,
    table_CW: Tensor, places_V: Tensor, apart_UD: Tensor, bf16: bool,
) -> Tensor:  # fmt: skip
    return rows_UD.new_empty(segment_N.shape[0], rows_UD.shape[1], dtype=out_dtype)


@torch.library.custom_op("engram::gather_backward", mutates_args=())
def _gather_backward(
    grad_ND: Tensor,
    rows_V: Tensor,
    segment_N: Tensor,
    order_N: Tensor,
    offsets_V: Tensor,
    num_rows: int,
    rows_dtype: torch.dtype,
) -> Tensor:
    sum_dtype = torch.promote_types(rows_dtype, torch.float32)
    if grad_ND.is_cuda:
        from kernels.gather.triton import sum_gradients

        sums_VD = sum_gradients(grad_ND, segment_N, order_N, offsets_V, sum_dtype)
    elif sum_dtype == torch.float32 and compiled_loops.available():
        from kernels.gather.segment_sum_numba import segment_sum as compiled_sum

        sums_VD = compiled_sum(grad_ND.to(sum_dtype).contiguous(), segment_N, offsets_V)
    else:
        sums_VD = segment_sum(grad_ND.to(sum_dtype), order_N, offsets_V)
    sums_VD = sums_VD.to(rows_dtype)
    if len(rows_V) == num_rows:
        return sums_VD
    return sums_VD.new_zeros(num_rows, grad_ND.shape[1]).index_copy_(0, rows_V.long(), sums_VD)


@_gather_backward.register_fake
def _(
    grad_ND: Tensor,
    rows_V: Tensor,
    segment_N: Tensor,
    order_N: Tensor,
    offsets_V: Tensor,
    num_rows: int,
    rows_dtype: torch.dtype,
) -> Tensor:
    return grad_ND.new_empty(num_rows, grad_ND.shape[1], dtype=rows_dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows_UD, *index = inputs[:5]
    ctx.save_for_backward(*index)
    ctx.num_rows, ctx.rows_dtype, ctx.num_inputs = rows_UD.shape[0], rows_UD.dtype, len(inputs)


def _differentiate(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
    sums_UD = _gather_backward(grad_ND, *ctx.saved_tensors, ctx.num_rows, ctx.rows_dtype)
    return sums_UD, *(None,) * (ctx.num_inputs - 1)


_gather.register_autograd(_differentiate, setup_context=_save)
_gather_stored.register_autograd(_differentiate, setup_context=_save)
