"""Gathers rows, and sums their gradients in the order of kernels/gather/segment_sum.py, in Triton.

N lookups, U rows, V segments: the lookups of one row, D columns, R lanes of a program, C columns of a program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gather.segment_sum import CHUNK, GROUP

_CHUNK = tl.constexpr(CHUNK)
_GROUP = tl.constexpr(GROUP)
_ELEMENTS = 2048
_WARPS = 4
# These differ in every step: nothing is recompiled for their sizes and alignments.
_PLAN = ["segment", "order", "offsets", "num_lookups", "num_segments"]
_LOADS = tl.constexpr(8)  # in flight together, in a sum that is otherwise one by one


def gather_rows(rows_UD: Tensor, rows_V: Tensor, segment_N: Tensor, out_ND: Tensor) -> None:
    """Writes the row of every lookup to `out_ND`, converted to its type: `rows_V[segment_N]`, or, where all rows are
    read, `segment_N`. Both may have any strides.
    """
    columns, blocks = column_blocks(rows_UD.shape[1])
    if out_ND.numel() == 0:
        return
    lanes = max(1, _ELEMENTS // columns)
    _gather_kernel[(blocks * triton.cdiv(out_ND.shape[0], lanes),)](
        rows_UD, rows_V, segment_N, out_ND, out_ND.shape[0], *rows_UD.stride(), *out_ND.stride(),
        ALL=len(rows_V) == len(rows_UD), D=rows_UD.shape[1], BLOCKS=blocks, R=lanes, C=columns, num_warps=_WARPS,
    )  # fmt: skip


def sum_gradients(grad_ND: Tensor, segment_N: Tensor, order_N: Tensor, offsets_V: Tensor, dtype: torch.dtype) -> Tensor:
    """`segment_sum` [V, D] of the gradients converted to `dtype`, with the same bits. Any strides.

    Args:
        grad_ND: gradient of every lookup.
        segment_N: int32; the segment of every lookup. No segment is empty.
        order_N: int32; the lookups sorted by segment.
        offsets_V: int32; where every segment starts in `order_N`.
        dtype: float32 or float64, of the sums.
    """
    (num_lookups, dim), num_segments = grad_ND.shape, offsets_V.shape[0]
    sums_VD = torch.empty(num_segments, dim, dtype=dtype, device=grad_ND.device)
    columns, blocks = column_blocks(dim)
    if sums_VD.numel() == 0:
        return sums_VD
    lanes = max(1, _ELEMENTS // columns)
    # A chunk after a segment's first lies here at its first lookup's place divided by CHUNK: no two are closer.
    later_ED = torch.empty(triton.cdiv(num_lookups, CHUNK), dim, dtype=dtype, device=grad_ND.device)
    plan = (segment_N, order_N, offsets_V, num_lookups, num_segments)
    lanes = max(1, _ELEMENTS // 4 // columns)
    shape = {"D": dim, "BLOCKS": blocks, "R": lanes, "C": columns, "num_warps": _WARPS}
    windows = triton.cdiv(num_lookups, CHUNK)
    _sum_chunks[(blocks * triton.cdiv(windows, lanes),)](sums_VD, later_ED, grad_ND, *plan, *grad_ND.stride(), **shape)
    apart = CHUNK
    while apart < num_lookups:
        parts = triton.cdiv(num_lookups, apart)
        _sum_groups[(blocks * triton.cdiv(parts, lanes),)](sums_VD, later_ED, *plan, apart, **shape)
        apart *= GROUP
    return sums_VD


def column_blocks(dim: int) -> tuple[int, int]:
    """Columns of a program, a power of two, and how many programs cover `dim` with the fewest idle columns."""
    widths = [32, 64, 128, 256, 512] if dim > 32 else [triton.next_power_of_2(max(1, dim))]
    columns = min(widths, key=lambda width: (triton.cdiv(dim, width) * width, -width))
    return columns, triton.cdiv(dim, columns)


@triton.jit
def tile(
    D: tl.constexpr, BLOCKS: tl.constexpr, R: tl.constexpr, C: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """This program's lanes, its columns, and which of these exist. Neighbours in the grid share their lanes."""
    lane_R = (tl.program_id(0) // BLOCKS).to(tl.int64) * R + tl.arange(0, R)
    column_C = (tl.program_id(0) % BLOCKS).to(tl.int64) * C + tl.arange(0, C)
    return lane_R, column_C, column_C < D


@triton.jit(do_not_specialize=["read", "segment", "num_lookups"])
def _gather_kernel(
    rows: tl.tensor, read: tl.tensor, segment: tl.tensor, out: tl.tensor, num_lookups: tl.int64,
    row_stride: tl.tensor, row_column: tl.tensor, out_stride: tl.tensor, out_column: tl.tensor,
    ALL: tl.constexpr, D: tl.constexpr, BLOCKS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
) -> None:  # fmt: skip
    lookup_R, column_C, real_C = tile(D, BLOCKS, R, C)
    live_R = lookup_R < num_lookups
    row_R = tl.load(segment + lookup_R, live_R, 0).to(tl.int64)
    if not ALL:
        row_R = tl.load(read + row_R, live_R, 0).to(tl.int64)
    live_RC = live_R[:, None] & real_C[None, :]
    values = tl.load(rows + row_R[:, None] * row_stride + column_C[None, :] * row_column, live_RC)
    tl.store(out + lookup_R[:, None] * out_stride + column_C[None, :] * out_column, values, live_RC)


@triton.jit
def segment_bounds(
    offsets: tl.tensor, segment_R: tl.tensor, live_R: tl.tensor, num_lookups: tl.tensor, num_segments: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Where a segment starts and ends in the sorted order."""
    start_R = tl.load(offsets + segment_R, live_R, 0).to(tl.int64)
    end_R = tl.load(offsets + segment_R + 1, live_R & (segment_R + 1 < num_segments), 0).to(tl.int64)
    return start_R, tl.where(segment_R + 1 < num_segments, end_R, num_lookups)


@triton.jit
def _next_chunk(
    place_R: tl.tensor, segment: tl.tensor, order: tl.tensor, offsets: tl.tensor,
    num_lookups: tl.tensor, num_segments: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """The first place at or after `place_R` where a chunk starts, at most `num_lookups`, and whether a segment does."""
    live_R = place_R < num_lookups
    lookup_R = tl.load(order + place_R, live_R, 0).to(tl.int64)
    segment_R = tl.load(segment + lookup_R, live_R, 0).to(tl.int64)
    start_R, end_R = segment_bounds(offsets, segment_R, live_R, num_lookups, num_segments)
    chunk_R = start_R + (place_R - start_R + _CHUNK - 1) // _CHUNK * _CHUNK
    return tl.where(live_R, tl.minimum(chunk_R, end_R), num_lookups), (chunk_R >= end_R) | (chunk_R == start_R)


@triton.jit(do_not_specialize=_PLAN)
def _sum_chunks(
    sums: tl.tensor, later: tl.tensor, grads: tl.tensor,
    segment: tl.tensor, order: tl.tensor, offsets: tl.tensor, num_lookups: tl.int64, num_segments: tl.int64,
    grad_stride: tl.tensor, grad_column: tl.tensor,
    D: tl.constexpr, BLOCKS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
) -> None:  # fmt: skip
    """Every lane sums the chunks that start in its stretch of the sorted lookups: at most two stretches' lookups."""
    window_R, column_C, real_C = tile(D, BLOCKS, R, C)
    place_R, first_R = _next_chunk(window_R * _CHUNK, segment, order, offsets, num_lookups, num_segments)
    end_R, _ = _next_chunk((window_R + 1) * _CHUNK, segment, order, offsets, num_lookups, num_segments)
    begin_R, segment_R = place_R, tl.full([R], -1, tl.int32)
    total_RC = tl.zeros([R, C], sums.dtype.element_ty)
    steps = tl.max(end_R - place_R)
    for _ in range(0, steps, _LOADS):
        # The compiler keeps loads in this order: none may wait for another of its kind or come after a store.
        lookups, segments, values = (), (), ()
        for ahead in tl.static_range(_LOADS):
            lookups += (tl.load(order + place_R + ahead, place_R + ahead < end_R, 0).to(tl.int64),)  # type: ignore[assignment]
        for ahead in tl.static_range(_LOADS):
            live_R = place_R + ahead < end_R
            addresses = grads + lookups[ahead][:, None] * grad_stride + column_C[None, :] * grad_column
            values += (tl.load(addresses, live_R[:, None] & real_C[None, :], 0),)  # type: ignore[assignment]
            segments += (tl.load(segment + lookups[ahead], live_R, -1).to(tl.int32),)  # type: ignore[assignment]
        for ahead in tl.static_range(_LOADS):
            starts_R = (segments[ahead] != segment_R) | (place_R - begin_R == _CHUNK)
            ended_R = starts_R & (segment_R >= 0)
            _store_chunk(sums, later, total_RC, segment_R, begin_R, first_R, ended_R, column_C, real_C, D)
            first_R = tl.where(ended_R, segments[ahead] != segment_R, first_R)
            begin_R = tl.where(starts_R, place_R, begin_R)
            total_RC = tl.where(starts_R[:, None], 0, total_RC) + values[ahead].to(total_RC.dtype)
            segment_R = segments[ahead]
            place_R += 1
    _store_chunk(sums, later, total_RC, segment_R, begin_R, first_R, segment_R >= 0, column_C, real_C, D)


@triton.jit
def _store_chunk(
    sums: tl.tensor, later: tl.tensor, total_RC: tl.tensor, segment_R: tl.tensor, begin_R: tl.tensor,
    first_R: tl.tensor, live_R: tl.tensor, column_C: tl.tensor, real_C: tl.tensor, D: tl.constexpr,
) -> None:  # fmt: skip
    live_RC = live_R[:, None] & real_C[None, :]
    tl.store(sums + segment_R.to(tl.int64)[:, None] * D + column_C[None, :], total_RC, live_RC & first_R[:, None])
    places_R = begin_R // _CHUNK
    tl.store(later + places_R[:, None] * D + column_C[None, :], total_RC, live_RC & ~first_R[:, None])


@triton.jit(do_not_specialize=[*_PLAN, "apart"])
def _sum_groups(
    sums: tl.tensor, later: tl.tensor,
    segment: tl.tensor, order: tl.tensor, offsets: tl.tensor,
    num_lookups: tl.int64, num_segments: tl.int64, apart: tl.int64,
    D: tl.constexpr, BLOCKS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
) -> None:  # fmt: skip
    """Sums the parts of long segments, `apart` lookups each, in groups, each group into the place of its first part.

    A lane looks for the second part of a group in its own `apart` places of the sorted lookups: there is at most one.
    """
    lane_R, column_C, real_C = tile(D, BLOCKS, R, C)
    place_R = lane_R * apart
    live_R = place_R < num_lookups
    segment_R = tl.load(segment + tl.load(order + place_R, live_R, 0).to(tl.int64), live_R, 0).to(tl.int64)
    start_R, end_R = segment_bounds(offsets, segment_R, live_R, num_lookups, num_segments)
    second_R = (place_R - start_R + apart - 1) // apart
    live_R = live_R & (second_R % _GROUP == 1) & (start_R + second_R * apart < end_R)
    parts_R = tl.minimum((end_R - start_R + apart - 1) // apart - (second_R - 1), _GROUP)
    parts_R = tl.where(live_R, parts_R, 0)
    first_R = live_R & (second_R == 1)
    to_first = sums + segment_R[:, None] * D + column_C[None, :]
    to_later = later + ((start_R + (second_R - 1) * apart) // _CHUNK)[:, None] * D + column_C[None, :]
    in_first, in_later = first_R[:, None] & real_C[None, :], (live_R & ~first_R)[:, None] & real_C[None, :]
    # From zero, as every sum: only one of the two is read.
    total_RC = 0 + tl.load(to_first, in_first, 0) + tl.load(to_later, in_later, 0)
    steps = tl.max(parts_R)
    for part in range(1, steps, _LOADS):
        values = ()
        for ahead in tl.static_range(_LOADS):
            place_R = (start_R + (second_R - 1 + part + ahead) * apart) // _CHUNK
            mask = (part + ahead < parts_R)[:, None] & real_C[None, :]
            values += (tl.load(later + place_R[:, None] * D + column_C[None, :], mask, 0),)  # type: ignore[assignment]
        for ahead in tl.static_range(_LOADS):
            total_RC += values[ahead]
    tl.store(to_first, total_RC, in_first)
    tl.store(to_later, total_RC, in_later)
