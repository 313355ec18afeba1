"""Initial rows inside Triton kernels: the bits of kernels/records/row_init.py.

U rows, D columns of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.records.draws import draw_key, draw_scale
from kernels.splitmix64_triton import counter_keys, mix

_ROWS = 16
_COLUMNS = 128


@triton.jit
def draw_initial(row_ids: tl.tensor, columns: tl.tensor, key: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """The initial fp32 values of rows.

    Args:
        row_ids: job-wide row ids, integers, broadcastable to the block: [R, 1].
        columns: from 0, integers, broadcastable to the block: [1, C].
        key: uint64 scalar, from `kernels.records.row_init.draw_key`.
        scale: fp32 scalar, from `kernels.records.row_init.draw_scale`.
    """
    words = mix(counter_keys(row_ids, key) ^ counter_keys(columns + 1, 0))
    low, high = words.to(tl.uint32), (words >> 32).to(tl.uint32)
    total = (low & 0xFFFF) + (low >> 16) + (high & 0xFFFF) + (high >> 16)
    return (total.to(tl.int32) - 2 * 0xFFFF).to(tl.float32) * scale


def initial_rows(row_ids_U: Tensor, dim: int, *, seed: int, std: float) -> Tensor:
    """See `kernels.records.row_init.initial_rows`."""
    num_rows = row_ids_U.shape[0]
    values_UD = torch.empty(num_rows, dim, dtype=torch.float32, device=row_ids_U.device)
    if values_UD.numel() == 0:
        return values_UD
    grid = (triton.cdiv(num_rows, _ROWS), triton.cdiv(dim, _COLUMNS))
    with torch.cuda.device_of(row_ids_U):
        _draw_kernel[grid](
            values_UD,
            row_ids_U,
            row_ids_U.stride(0),
            draw_key(seed),
            draw_scale(std),
            num_rows,
            dim,
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
        )
    return values_UD


@triton.jit(do_not_specialize=["key", "num_rows"])
def _draw_kernel(
    values: tl.tensor,
    row_ids: tl.tensor,
    id_stride: tl.tensor,
    key: tl.uint64,
    scale: tl.float32,
    num_rows: tl.int32,
    dim: tl.int32,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    ids = tl.load(row_ids + rows * id_stride, mask=rows < num_rows, other=0)
    block = draw_initial(ids[:, None], columns[None, :], key, scale)
    inside = (rows < num_rows)[:, None] & (columns < dim)[None, :]
    tl.store(values + rows[:, None] * dim + columns[None, :], block, mask=inside)
