"""Moves whole row records between host memory and the window's slots, and draws records that were never stored.

A record is a row of 32-bit words (kept in fp32 tensors): first the row's weights, last its version as an int32. The
record of a row that was never updated is not stored, but drawn in its slot: weights from (seed, row id), and zeros.

On a GPU a few programs copy straight over the bus, each on one SM: `host_RW` is then a device view of pinned memory.
They run on the current stream and wait for nothing. On a CPU both sides are ordinary memory.

R rows of the shard, C slots, U rows to move, W words of a record, D columns of a row, M modules.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels import compiled_loops
from kernels.records.row_init import initial_rows

PROGRAMS = 8
"""How many programs run for a copy by default, each on one SM, of which it takes up a sixth or less.

Four fetch whole lines as fast, but write them back at half the rate: an SM has only a limited number of stores in
flight on the bus."""

_CHUNK_BYTES = 1 << 20  # of records that stay in a core's cache between two copies


def fetch_records(
    host_RW: Tensor,
    rows_U: Tensor,
    window_CW: Tensor,
    slots_U: Tensor,
    *,
    padded: bool = False,
    programs: int = PROGRAMS,
) -> None:
    """Copies records of rows into slots.

    Args:
        host_RW: fp32, the shard. The words of a row are contiguous, rows any distance apart; likewise in the window.
        rows_U: int64 or int32, contiguous, unique, in any order; ascending ones are fastest.
        window_CW: fp32, on the device.
        slots_U: int64 or int32, contiguous, unique.
        padded: on both sides, what lies between two records and after the last one is padding. A GPU may then copy it
            along, so that whole lines travel: records must be equally far apart on both sides.
        programs: the most programs that copy at a time. GPU only.

    Rows and slots are on the window's device.

    Raises:
        ValueError: sizes or layouts do not fit together.
    """
    _check(host_RW, rows_U, window_CW, slots_U, padded)
    if window_CW.is_cuda:
        from kernels.records.triton import fetch_records as on_gpu

        on_gpu(host_RW, rows_U, window_CW, slots_U, padded=padded, programs=programs)
        return
    _copy(host_RW, rows_U, window_CW, slots_U)


def write_records(
    window_CW: Tensor,
    slots_U: Tensor,
    host_RW: Tensor,
    rows_U: Tensor,
    *,
    padded: bool = False,
    programs: int = PROGRAMS,
) -> None:
    """Copies records of slots to their rows in host memory. Arguments and errors as for `fetch_records`."""
    _check(host_RW, rows_U, window_CW, slots_U, padded)
    if window_CW.is_cuda:
        from kernels.records.triton import write_records as on_gpu

        on_gpu(window_CW, slots_U, host_RW, rows_U, padded=padded, programs=programs)
        return
    _copy(window_CW, slots_U, host_RW, rows_U)


def draw_records(
    window_CW: Tensor,
    slots_U: Tensor,
    rows_U: Tensor,
    *,
    id_ranges_M2: Tensor,
    dim: int,
    row_dtype: torch.dtype,
    seed: int,
    std: float,
) -> None:
    """Writes the records of rows that were never updated: initial weights, and zeros for all other words.

    Args:
        window_CW, slots_U, rows_U: as for `fetch_records`.
        id_ranges_M2: int64, contiguous. For each range of the shard's rows its first row, ascending, and what to add to
            its rows for their job-wide ids. The first range starts at row 0. On the window's device.
        dim: columns of a row (D).
        row_dtype: of the weights: torch.float32, or torch.bfloat16 with two in a word.
        seed: of the table; see `kernels.records.row_init.initial_rows`.
        std: of the initial values, which are rounded to the nearest value of the rows' dtype.

    Raises:
        ValueError: sizes or layouts do not fit together.
    """
    _check(window_CW, rows_U, window_CW, slots_U, padded=False)
    if window_CW.is_cuda:
        from kernels.records.fresh_triton import draw_records as on_gpu

        on_gpu(window_CW, slots_U, rows_U, id_ranges_M2=id_ranges_M2, dim=dim, row_dtype=row_dtype, seed=seed, std=std)
        return
    ids_U = job_wide_ids(rows_U, id_ranges_M2)
    if row_dtype == torch.float32 and compiled_loops.available():
        from kernels.records.numba import draw_fp32_records

        draw_fp32_records(window_CW, slots_U.long(), ids_U, dim=dim, seed=seed, std=std)
        return
    for part in _chunks(window_CW, rows_U):
        records_BW = window_CW.new_zeros(len(rows_U[part]), window_CW.shape[1])
        records_BW.view(row_dtype)[:, :dim] = initial_rows(ids_U[part], dim, seed=seed, std=std)
        window_CW.index_copy_(0, slots_U[part].long(), records_BW)


def job_wide_ids(rows_U: Tensor, id_ranges_M2: Tensor) -> Tensor:
    """The job-wide ids of a shard's rows: int64 [U]. Arguments as for `draw_records`."""
    ranges = torch.searchsorted(id_ranges_M2[:, 0].contiguous(), rows_U.long(), right=True) - 1
    return rows_U + id_ranges_M2[ranges, 1]


def _copy(from_RW: Tensor, rows_U: Tensor, to_CW: Tensor, slots_U: Tensor) -> None:
    if compiled_loops.available():
        from kernels.records.numba import copy_records

        copy_records(from_RW, rows_U.long(), to_CW, slots_U.long())
        return
    for part in _chunks(from_RW, rows_U):
        to_CW.index_copy_(0, slots_U[part].long(), from_RW.index_select(0, rows_U[part]))


def _chunks(records_RW: Tensor, rows_U: Tensor) -> Iterator[slice]:
    rows = max(1, _CHUNK_BYTES // (4 * records_RW.shape[1]))
    for start in range(0, len(rows_U), rows):
        yield slice(start, start + rows)


def _check(host_RW: Tensor, rows_U: Tensor, window_CW: Tensor, slots_U: Tensor, padded: bool) -> None:
    if host_RW.shape[1] != window_CW.shape[1]:
        raise ValueError(f"records of {host_RW.shape[1]} words do not fit slots of {window_CW.shape[1]} words")
    if len(rows_U) != len(slots_U):
        raise ValueError(f"{len(rows_U)} rows cannot be moved to or from {len(slots_U)} slots")
    for name, records in (("host memory", host_RW), ("the window", window_CW)):
        if records.dtype != torch.float32 or records.stride(1) != 1:
            raise ValueError(f"the words of a record in {name} must be float32 and lie side by side")
        if padded and not _padding_is_there(records):
            raise ValueError(f"{name} ends before the padding of its last record")
    if padded and host_RW.stride(0) != window_CW.stride(0):
        raise ValueError(f"padded records lie {host_RW.stride(0)} words apart, but slots {window_CW.stride(0)} words")
    for name, places in (("rows", rows_U), ("slots", slots_U)):
        if places.dtype not in (torch.int64, torch.int32) or not places.is_contiguous():
            raise ValueError(f"{name} must be contiguous integers of 32 or 64 bits")


def _padding_is_there(records_RW: Tensor) -> bool:
    end = records_RW.storage_offset() + len(records_RW) * records_RW.stride(0)
    return 4 * end <= records_RW.untyped_storage().nbytes()
