"""`kernels.gather.parts` in Triton: each lane has a row, and adds its parts one after another.

Shape suffixes as there, R lanes and C columns of a program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gather.triton import column_blocks, segment_bounds, tile

_ELEMENTS = 1024
_WARPS = 4
_LOADS = tl.constexpr(4)  # in flight together: a row has at most one part from each rank


def sum_parts_in_order(parts_AD: Tensor, order_A: Tensor, starts_O: Tensor) -> Tensor:
    """See `kernels.gather.parts.sum_parts`. Parts of any strides."""
    (num_parts, dim), num_rows = parts_AD.shape, len(starts_O)
    sums_OD = parts_AD.new_empty(num_rows, dim)
    if sums_OD.numel() == 0:
        return sums_OD
    columns, blocks = column_blocks(dim)
    lanes = max(1, _ELEMENTS // columns)
    with torch.cuda.device_of(sums_OD):
        _sum_parts[(blocks * triton.cdiv(num_rows, lanes),)](
            sums_OD, parts_AD, order_A, starts_O, num_parts, num_rows, *parts_AD.stride(),
            D=dim, BLOCKS=blocks, R=lanes, C=columns, num_warps=_WARPS,
        )  # fmt: skip
    return sums_OD


# These differ in every step: nothing is recompiled for their sizes and alignments.
@triton.jit(do_not_specialize=["order", "starts", "num_parts", "num_rows"])
def _sum_parts(
    sums: tl.tensor, parts: tl.tensor, order: tl.tensor, starts: tl.tensor, num_parts: tl.int64, num_rows: tl.int64,
    part_stride: tl.tensor, part_column: tl.tensor,
    D: tl.constexpr, BLOCKS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
) -> None:  # fmt: skip
    row_R, column_C, real_C = tile(D, BLOCKS, R, C)
    start_R, end_R = segment_bounds(starts, row_R, row_R < num_rows, num_parts, num_rows)
    end_R = tl.where(row_R < num_rows, end_R, start_R)
    total_RC = tl.zeros([R, C], sums.dtype.element_ty)
    steps = tl.max(end_R - start_R)
    for step in range(0, steps, _LOADS):
        values = ()
        for ahead in tl.static_range(_LOADS):
            live_R = start_R + step + ahead < end_R
            part_R = tl.load(order + start_R + step + ahead, live_R, 0).to(tl.int64)
            addresses = parts + part_R[:, None] * part_stride + column_C[None, :] * part_column
            values += (tl.load(addresses, live_R[:, None] & real_C[None, :], 0),)  # type: ignore[assignment]
        for ahead in tl.static_range(_LOADS):
            total_RC += values[ahead]
    tl.store(sums + row_R[:, None] * D + column_C[None, :], total_RC, (row_R < num_rows)[:, None] & real_C[None, :])
