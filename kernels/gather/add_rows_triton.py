"""`kernels.gather.add_rows` in Triton. torch's `index_add_` uses atomics, which flush subnormal numbers to zero.

Shape suffixes as there, R lanes and C columns of a program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gather.triton import column_blocks, tile

_ELEMENTS = 2048
_WARPS = 4


def add_rows_on_gpu(table_UD: Tensor, rows_V: Tensor, added_VD: Tensor) -> None:
    """See `kernels.gather.add_rows.add_rows`. What is added may have any strides."""
    if added_VD.numel() == 0:
        return
    columns, blocks = column_blocks(table_UD.shape[1])
    lanes = max(1, _ELEMENTS // columns)
    with torch.cuda.device_of(table_UD):
        _add_rows[(blocks * triton.cdiv(len(rows_V), lanes),)](
            table_UD, rows_V, added_VD, len(rows_V), *added_VD.stride(),
            D=table_UD.shape[1], BLOCKS=blocks, R=lanes, C=columns, num_warps=_WARPS,
        )  # fmt: skip


# These differ in every micro-batch: nothing is recompiled for their sizes and alignments.
@triton.jit(do_not_specialize=["rows", "num_rows"])
def _add_rows(
    table: tl.tensor, rows: tl.tensor, added: tl.tensor, num_rows: tl.int64,
    added_stride: tl.tensor, added_column: tl.tensor,
    D: tl.constexpr, BLOCKS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
) -> None:  # fmt: skip
    lane_R, column_C, real_C = tile(D, BLOCKS, R, C)
    live_R = lane_R < num_rows
    live_RC = live_R[:, None] & real_C[None, :]
    row_R = tl.load(rows + lane_R, live_R, 0).to(tl.int64)
    places = table + row_R[:, None] * D + column_C[None, :]
    values = tl.load(added + lane_R[:, None] * added_stride + column_C[None, :] * added_column, live_RC)
    tl.store(places, tl.load(places, live_RC) + values, live_RC)
