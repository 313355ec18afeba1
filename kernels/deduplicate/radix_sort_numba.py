"""A stable sort of table rows on one CPU core, in passes over 11 bits."""

import numpy as np
from numpy.typing import NDArray

from kernels.numba_intrinsics import compiled

_BITS = 11
_BINS = 1 << _BITS


def sort_rows(rows_N: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Sorts non-negative integers; equal ones keep their order.

    Returns:
        the sorted integers, and the original position of each.
    """
    highest = int(rows_N.max(initial=0))
    return _sort(rows_N, -(-max(1, highest.bit_length()) // _BITS))


@compiled
def _sort(rows, passes):  # type: ignore[no-untyped-def]
    order = np.arange(len(rows), dtype=np.int32)
    rows = rows.copy()
    sorted_rows, sorted_order = np.empty_like(rows), np.empty_like(order)
    for turn in range(passes):
        shift = turn * _BITS
        ends = np.zeros(_BINS + 1, np.int64)
        for row in rows:
            ends[((row >> shift) & (_BINS - 1)) + 1] += 1
        for digit in range(_BINS):
            ends[digit + 1] += ends[digit]
        for place in range(len(rows)):
            digit = (rows[place] >> shift) & (_BINS - 1)
            target = ends[digit]
            ends[digit] += 1
            sorted_rows[target], sorted_order[target] = rows[place], order[place]
        rows, sorted_rows = sorted_rows, rows
        order, sorted_order = sorted_order, order
    return rows, order
