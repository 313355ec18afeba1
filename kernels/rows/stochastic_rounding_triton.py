"""Rounding to bfloat16 inside Triton kernels: bits and integer arithmetic of kernels/rows/stochastic_rounding.py.

Blocks stay fp32 until they are stored. Conversions use integer arithmetic, since Triton's interpreter rounds ties and
subnormal numbers differently from a GPU.

U rows, D columns of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.rows.rounding_key import Part, rounding_key
from kernels.splitmix64_triton import counter_keys, mix

_ROWS = 16
_COLUMNS = 128


@triton.jit
def stochastic_round(values: tl.tensor, row_ids: tl.tensor, columns: tl.tensor, key: tl.tensor) -> tl.tensor:
    """The values, each rounded to one of its two bfloat16 neighbours, with its expectation kept: still fp32.

    Args:
        values: a block of fp32.
        row_ids: job-wide row ids, integers, broadcastable to the block: [R, 1].
        columns: of the values, from 0, integers, broadcastable to the block: [1, C].
        key: uint64 scalar, from `kernels.rows.stochastic_rounding.rounding_key`.
    """
    words = mix(counter_keys(row_ids, key) ^ counter_keys((columns >> 2) + 1, 0))
    fields = (words >> ((columns & 3) << 4).to(tl.uint64)).to(tl.uint32) & 0xFFFF
    bits = values.to(tl.uint32, bitcast=True)
    rounded = (bits + fields) & 0xFFFF0000
    return tl.where(_is_finite(bits), rounded, _keep(bits)).to(tl.float32, bitcast=True)


@triton.jit
def round_to_nearest(values: tl.tensor) -> tl.tensor:
    """The fp32 values rounded to the nearest bfloat16, ties to the even one: still fp32."""
    bits = values.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(_is_finite(bits), rounded, _keep(bits)).to(tl.float32, bitcast=True)


@triton.jit
def as_bf16(values: tl.tensor) -> tl.tensor:
    """The fp32 values as bfloat16; those that bfloat16 cannot represent are cut off."""
    return (values.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def as_fp32(values: tl.tensor) -> tl.tensor:
    """A block of bfloat16 as fp32."""
    return (values.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _is_finite(bits: tl.tensor) -> tl.tensor:
    return (bits & 0x7F800000) != 0x7F800000


@triton.jit
def _keep(bits: tl.tensor) -> tl.tensor:
    # A NaN whose payload lies in the bits that are cut off would become an infinity.
    return (bits & 0xFFFF0000) | tl.where((bits & 0x007FFFFF) != 0, 0x00400000, 0).to(tl.uint32)


def stochastic_round_bf16_(
    values_UD: Tensor, row_ids_U: Tensor, *, seed: int, step: int, part: Part = "weights"
) -> None:
    """See `kernels.rows.stochastic_rounding.stochastic_round_bf16_`; the same bits, NaNs' payloads apart."""
    num_rows, dim = values_UD.shape
    if values_UD.numel() == 0:
        return
    grid = (triton.cdiv(num_rows, _ROWS), triton.cdiv(dim, _COLUMNS))
    with torch.cuda.device_of(values_UD):
        _round_kernel[grid](
            values_UD,
            row_ids_U,
            rounding_key(seed, step, part),
            num_rows,
            dim,
            *values_UD.stride(),
            row_ids_U.stride(0),
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
        )


@triton.jit(do_not_specialize=["key", "num_rows"])
def _round_kernel(
    values: tl.tensor,
    row_ids: tl.tensor,
    key: tl.uint64,
    num_rows: tl.int32,
    dim: tl.int32,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    id_stride: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    ids = tl.load(row_ids + rows * id_stride, mask=rows < num_rows, other=0)
    places = values + rows[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    inside = (rows < num_rows)[:, None] & (columns < dim)[None, :]
    block = tl.load(places, mask=inside, other=0.0)
    tl.store(places, stochastic_round(block, ids[:, None], columns[None, :], key), mask=inside)
