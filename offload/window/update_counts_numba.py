"""The passes of `offload.window.update_counts`, compiled: without the GIL, see `directory_numba`."""

import numpy as np

from kernels.numba_intrinsics import compiled


@compiled
def add(counts, rows, most):  # type: ignore[no-untyped-def]
    """Counts one more update of each row, up to `most`."""
    for index in range(len(rows)):
        count = counts[rows[index]]
        if count < most:
            counts[rows[index]] = np.uint8(count + 1)


@compiled
def updated_first(counts, rows, slots, sorted_rows, sorted_slots):  # type: ignore[no-untyped-def]
    """Writes rows and slots, those of rows that were ever updated first; returns how many they are."""
    updated = 0
    for index in range(len(rows)):
        updated += counts[rows[index]] != 0
    front, back = 0, updated
    for index in range(len(rows)):
        fresh = counts[rows[index]] == 0
        to = back if fresh else front
        sorted_rows[to], sorted_slots[to] = rows[index], slots[index]
        back += fresh
        front += not fresh
    return updated
